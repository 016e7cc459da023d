"""An exponential moving average of the trained weights, in float32, sharded as the engine shards its masters.

ZeRO-1 and 2 keep each rank's share of the float32 masters in flat tensors; the average lies beside them, costs 4 bytes per parameter
over all ranks, and needs no communication. Without DeepSpeed the parameters themselves are averaged.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data.episodes import DataError


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """How fast the average forgets. After n updates its decay is the smaller of `decay` and 1 - (1 + n) ** -power."""

    decay: float = 0.0
    """Share of the average that stays at each step, such as openpi's 0.999; 0: there is no average."""
    power: float | None = None
    """Of the warm-up, such as RDT's 0.75; none: the decay is constant."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}; it must be at least 0 (no average) and less than 1")
        if self.power is not None and self.power <= 0:
            raise ValueError(f"ema.power is {self.power}; it must be more than 0, or left out")

    def decay_at(self, num_updates: int) -> float:
        """The decay of the update after `num_updates` others."""
        return self.decay if self.power is None else min(self.decay, 1 - (1 + num_updates) ** -self.power)


class Ema:
    """The average of one engine's masters. All ranks do everything with it together."""

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        """`model` as the accelerator prepared it. Starts at its weights."""
        self.config = config
        self.num_updates = 0
        self._zero = getattr(model, "optimizer", None) if hasattr(model, "zero_optimization") else None
        self._masters = masters_of(model)
        self.shadows = [master.detach().clone() for master in self._masters]

    @torch.no_grad()
    def update(self) -> None:
        """Call after an optimizer step that changed the weights."""
        decay = self.config.decay_at(self.num_updates)
        torch._foreach_lerp_(self.shadows, [master.detach() for master in self._masters], 1 - decay)
        self.num_updates += 1

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Within the block the model has the averaged weights, in its own dtype."""
        kept = [master.detach().clone() for master in self._masters]
        self._write(self.shadows)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for master, value in zip(self._masters, values, strict=True):
            master.data.copy_(value)
        if self._zero is not None:
            self._zero.update_lp_params()

    def save(self, folder: Path, rank: int) -> None:
        """This rank's share."""
        shares = {str(index): shadow.cpu() for index, shadow in enumerate(self.shadows)}
        save_file(shares, folder / _file_name(rank), metadata={"num_updates": str(self.num_updates)})

    def load(self, folder: Path, rank: int) -> None:
        """What `save` wrote on as many ranks. Raises DataError if it is not there."""
        from safetensors import safe_open

        file = folder / _file_name(rank)
        if not file.is_file():
            raise DataError(
                f"{folder} has no {file.name}: the run was trained without an average; leave ema.decay at 0"
            )
        for index, share in load_file(file).items():
            self.shadows[int(index)].copy_(share)
        with safe_open(file, framework="pt") as stored:
            self.num_updates = int(stored.metadata()["num_updates"])


def masters_of(model: nn.Module) -> list[Tensor]:
    """This rank's float32 weights that the optimizer updates; not under ZeRO-3, which has others."""
    if not hasattr(model, "zero_optimization"):
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    zero: Any = model.optimizer
    return list(zero.single_partition_of_fp32_groups)


def _file_name(rank: int) -> str:
    return f"ema_rank{rank}.safetensors"
