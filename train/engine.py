"""The Accelerator: DeepSpeed through Accelerate's plugin, or plain."""

import importlib
import importlib.resources
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler
from torch import Tensor

from ..policy.objectives.objective import Loss
from .config import AdamWConfig, Engine, TrainConfig


def world_size() -> int:
    """How many ranks the launcher started; 1 without a launcher. Known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's place among them."""
    return int(os.environ.get("RANK", "0"))


def resolve_precision(config: TrainConfig) -> str:
    """`bf16` or `fp32`."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def deepspeed_config(config: TrainConfig, num_ranks: int) -> dict[str, Any]:
    """The engine's JSON with the recipe's numbers filled in where it says `auto`."""
    text = importlib.resources.files("vlatune.ds_configs").joinpath(f"{config.engine}.json").read_text()
    settings: dict[str, Any] = json.loads(text)
    settings["train_micro_batch_size_per_gpu"] = config.micro_batch_size(num_ranks)
    settings["gradient_accumulation_steps"] = config.num_accumulation_steps
    settings["gradient_clipping"] = config.optimizer.gradient_clip_norm
    settings["bf16"]["enabled"] = resolve_precision(config) == "bf16"
    return settings


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Joins the process group. The scheduler is never prepared: Accelerate would step it once per rank."""
    on_gpu = torch.cuda.is_available()
    # DeepSpeed 0.19 calls it by the name that torch 2.13 renamed; nothing a user could mend.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if os.access(sys.prefix, os.W_OK):
        # What DeepSpeed compiles belongs to this environment: environments that share one folder rebuild it in turns.
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    plugin = None
    # Gradients lie in DDP's buckets, which would otherwise be another copy of them; buffers are the same on all ranks.
    handlers: list[KwargsHandler] = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    ]
    if config.engine != "plain":
        if not on_gpu:
            _without_shared_memory_collective()
        # Without a launcher DeepSpeed still wants to know the address of its group of one.
        for name, value in {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29511",
        }.items():
            os.environ.setdefault(name, value)
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(config, world_size()))
        # Accelerate does not choose gloo by itself under DeepSpeed: every rank would believe to be alone.
        handlers = [] if on_gpu else [InitProcessGroupKwargs(backend="gloo")]
    return Accelerator(
        mixed_precision="bf16" if resolve_precision(config) == "bf16" else "no",
        gradient_accumulation_steps=config.num_accumulation_steps,
        deepspeed_plugin=plugin,
        step_scheduler_with_optimizer=False,
        cpu=plugin is None and not on_gpu,
        kwargs_handlers=handlers,
    )


def _without_shared_memory_collective() -> None:
    """DeepSpeed compiles one for CPUs and uses it in inference alone. Training would wait a minute for the compiler, for ever where a
    kill left the compiler's lock behind, and leave 66 MB of /dev/shm behind per rank and start."""
    backend: Any = importlib.import_module("deepspeed.comm.torch")  # in an import statement this name is torch itself
    backend.build_shm_op = lambda: None


def is_zero3(accelerator: Accelerator) -> bool:
    """Whether a rank has only its share of every weight."""
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def prepare(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: AdamWConfig
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The engine around both, with this stage's clipping."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config["gradient_clipping"] = config.gradient_clip_norm
    prepared: tuple[torch.nn.Module, torch.optim.Optimizer] = accelerator.prepare(model, optimizer)
    if (
        plugin is not None
        and plugin.zero_stage in (1, 2)
        and not plugin.deepspeed_config["zero_optimization"].get("offload_optimizer")
    ):
        # The gradient's norm sees every infinity and NaN, and the step is skipped on a bad one: the separate scan of every tensor
        # finds nothing more, and costs 13 small kernels each.
        zero: Any = prepared[0].optimizer
        zero.has_overflow = lambda *_args, **_kwargs: False
    return prepared


def clip_gradients(
    accelerator: Accelerator, model: torch.nn.Module, engine: Engine, config: AdamWConfig
) -> Tensor | float:
    """Call after `backward`. The gradient's norm before clipping, left on the device; 0 within an accumulation.

    DeepSpeed has clipped, and stepped, inside `backward`; Accelerate's own call would only read the norm, at the price of
    a host synchronisation a step."""
    if not accelerator.sync_gradients:
        return 0.0
    if engine == "plain":
        norm: Tensor = accelerator.clip_grad_norm_(model.parameters(), config.gradient_clip_norm)
    else:
        norm = model.get_global_grad_norm()  # type: ignore[operator]
    return norm


def mean_over_ranks(accelerator: Accelerator, loss: Loss) -> Tensor:
    """The weighted mean over all ranks' entries, scaled so that averaging gradients over ranks gives its gradient."""
    total_weight = accelerator.reduce(loss.weight_BHA.sum().detach(), reduction="sum").clamp(min=1)
    return (loss.entries_BHA * loss.weight_BHA).sum() * accelerator.num_processes / total_weight
