"""How much memory each engine takes on a GPU: weights, gradients and the optimizer's state, whole or divided among ranks.

Bytes per parameter follow from how DeepSpeed 0.19 and torch keep them (ZeRO: Rajbhandari et al. 2020), read in their code, with the
settings of ds_configs/. T trained parameters, W GPUs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .activation_memory import ActivationMemory
from .config import Engine, TrainConfig
from .ema import EmaConfig
from .engine import deepspeed_config


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Bytes on each GPU, but for `cpu`."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    buffers: float
    step: float
    cpu: float

    @property
    def kept(self) -> float:
        """What is there at every moment of a step."""
        return self.weights + self.gradients + self.optimizer + self.average

    def total(self, activations: float) -> float:
        return self.kept + max(self.buffers + activations, self.step)

    def largest_micro_batch(self, activations: ActivationMemory, memory: float) -> int:
        """0: not even one sample fits."""
        if self.kept + self.step > memory:
            return 0
        return max(0, int((memory - self.kept - self.buffers - activations.fixed) // activations.per_sample))


def engine_memory(
    engine: Engine, config: TrainConfig, gpus: int, sizes: Sequence[int], trained_sizes: Sequence[int]
) -> EngineMemory:
    """`sizes`: elements of each parameter, of all and of the trained ones. Without an average under ZeRO-3, which keeps none."""
    total, trained = sum(sizes), sum(trained_sizes)
    average = 4 * trained if config.ema.decay else 0
    if engine == "plain":
        # Gradients lie in DDP's buckets. Writing a checkpoint keeps the weights while the average stands in for them.
        return EngineMemory(
            weights=4 * total,
            gradients=4 * trained,
            optimizer=8 * trained,
            average=average,
            buffers=0,
            step=average,
            cpu=0,
        )
    return _zero_memory(replace(config, engine=engine, ema=EmaConfig()), gpus, sizes, trained_sizes, average / gpus)


def _zero_memory(
    config: TrainConfig, gpus: int, sizes: Sequence[int], trained_sizes: Sequence[int], average: float
) -> EngineMemory:
    settings = deepspeed_config(config, gpus)
    zero: Mapping[str, Any] = settings["zero_optimization"]
    element = 2 if is_bf16(config) else 4
    accumulated = 4 if settings.get("data_types", {}).get("grad_accum_dtype") == "fp32" else element
    total, trained, largest = sum(sizes), sum(trained_sizes), max(trained_sizes)
    share = trained / gpus
    # A bucket is made in full, and once more flat or scattered while it travels.
    buckets = element * (zero["reduce_bucket_size"] + min(zero["reduce_bucket_size"], trained))
    norm = 8 * min(largest, share)  # of the largest owned slice of a gradient, in float64
    if zero["stage"] == 3:
        small = sum(size for size in sizes if size <= zero["stage3_param_persistence_threshold"])
        gathered = min(total, zero["stage3_max_live_parameters"] + zero["stage3_prefetch_bucket_size"])
        return EngineMemory(
            weights=element * (total / gpus + small * (1 - 1 / gpus)),
            gradients=accumulated * share,
            optimizer=(12 if element == 2 else 8) * share,  # in float32 the weights' own partition is the master
            average=0,
            buffers=buckets + element * gathered,
            step=4 * share,
            cpu=0,
        )
    if "offload_optimizer" in zero:
        return EngineMemory(
            weights=element * total,
            gradients=accumulated * share,
            optimizer=0,
            average=0,
            buffers=buckets + element * largest + norm,
            step=0,
            # Masters, moments and gradients in float32, the weights to be sent back, and the largest gradient once more.
            cpu=(16 + element) * share + element * largest + average,
        )
    is_sharded = zero["stage"] == 2
    return EngineMemory(
        weights=element * total,
        gradients=accumulated * share if is_sharded else element * trained,
        optimizer=12 * share,
        average=average,
        buffers=buckets,
        # Gradients that are float32 in one piece already need no copy.
        step=max(norm + (0 if is_sharded and accumulated == 4 else (element + 4) * share), average),
        cpu=0,
    )


def is_bf16(config: TrainConfig) -> bool:
    """On the GPUs that are planned for, whatever this machine has."""
    return config.precision != "fp32"
