"""Whether every GPU here computes, and all of them together: `torchrun --standalone --nproc-per-node gpu -m vlatune.launch.check_gpus`."""

import os
import sys
import time

import torch
import torch.distributed as dist

SIDE = 4096
"""Of the multiplied matrices: 0.1 TFLOP, tenths of a second at worst."""


def main() -> None:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not torch.cuda.is_available():
        sys.exit(
            f"vlatune: torch {torch.__version__} sees no GPU here; type: VLATUNE_TORCH=cuda bash launch/install.sh"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    verify(device, rank=rank, world_size=world_size, backend="nccl")


def verify(device: torch.device, *, rank: int, world_size: int, backend: str, side: int = SIDE) -> None:
    """Multiply two bfloat16 matrices on `device` and, with several ranks, add them up over all. Ends the process with a sentence where a
    result is wrong."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    torch.manual_seed(rank)
    left, right = torch.randn(2, side, side)
    product = left.to(device, torch.bfloat16) @ right.to(device, torch.bfloat16)
    # A few rows are enough for the comparison, which is made on the CPU, in float32.
    expected = left[:8].bfloat16().float() @ right.bfloat16().float()
    error = float((product[:8].float().cpu() - expected).norm() / expected.norm())
    if not error < 0.01:
        sys.exit(f"vlatune: {device} ({name}) multiplies wrongly: bfloat16 is off by {error:.2g}; take another machine")
    print(f"{device} ({name}): bfloat16 is right to {error:.1g}", flush=True)
    if world_size == 1:
        return
    dist.init_process_group(backend, rank=rank, world_size=world_size)
    start = time.perf_counter()
    total = torch.full((side, side), float(rank + 1), device=device)
    dist.all_reduce(total)
    found, right_sum = float(total.mean()), world_size * (world_size + 1) / 2
    dist.destroy_process_group()
    if found != right_sum:
        sys.exit(
            f"vlatune: adding up over {world_size} ranks by {backend} gave {found}, not {right_sum}; take another machine"
        )
    if rank == 0:
        print(f"{backend} adds up over {world_size} ranks ({time.perf_counter() - start:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
