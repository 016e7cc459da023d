"""How long one decision takes: π0.5 with random weights, batch 1, two cameras, a chunk of 10, ten Euler steps.

    python tests/bench/acting_latency.py                    full size, bfloat16, on a CUDA device
    python tests/bench/acting_latency.py --tiny --device cpu  the same program in seconds anywhere

Every time ends with a device synchronisation. Printed are milliseconds (median, fastest, slowest): the plain path, and with
torch.compile where asked. The physical floor of this shape on an H200 is 4.6 ms (3.96 GB of prefix weights read once, ten times
0.62 GB of the expert's)."""

import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from preset_policies import embodiment_for, make_batch
from preset_policies import statistics as some_statistics

from vlatune.data.normalise import Statistics
from vlatune.policy.policy import Policy
from vlatune.policy.presets import pi05


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to time."""

    device: str = "cuda"
    dtype: str = "bfloat16"
    """float32 or bfloat16."""
    tiny: bool = False
    """The tests' sizes instead of the published ones."""
    batch: int = 1
    """Observations a call."""
    compile: bool = False
    """Also through torch.compile (max-autotune-no-cudagraphs)."""
    num_calls: int = 30
    """Timed calls, after five that are not."""


def main() -> None:
    options = tyro.cli(Options)
    config = dataclasses.replace(pi05(tiny=options.tiny), horizon=10)
    torch.manual_seed(0)
    with torch.device(options.device):
        policy = Policy(
            config, embodiment_for(config), Statistics(state=some_statistics(8), actions=some_statistics(7))
        )
    policy = policy.to(getattr(torch, options.dtype)).eval().requires_grad_(False)
    observation = make_batch(config, batch=options.batch).observation.to(options.device)
    noise = torch.randn(options.batch, *policy.noise_shape, device=options.device)

    def sample() -> torch.Tensor:
        return policy.sample(observation, noise)

    with torch.inference_mode():
        report("plain", sample, options)
        if options.compile:
            report("compiled", torch.compile(sample, mode="max-autotune-no-cudagraphs"), options)


def report(name, call, options) -> None:
    for _ in range(5):
        call()
    times = []
    for _ in range(options.num_calls):
        synchronise(options.device)
        start = time.perf_counter()
        call()
        synchronise(options.device)
        times.append(1e3 * (time.perf_counter() - start))
    print(f"{name}: {statistics.median(times):.2f} ms ({min(times):.2f} to {max(times):.2f}), batch {options.batch}")


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
