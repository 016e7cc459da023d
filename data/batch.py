"""What crosses the house: raw observations in, batches through, action chunks out.

Shape letters, used everywhere:
    B batch   T observation offsets   H horizon (chunk steps)   A action dims   S state dims
    L prompt tokens   E text-encoder width   N image tokens   D model width   K draws per prefix
Values are in **raw units** (metres, radians, the simulator's action units): normalising is the policy's business, so that
statistics travel with the weights and nobody else can apply them twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from .raw_observation import RawObservation

Whole = TypeVar("Whole")

__all__ = ["Batch", "Observation", "Prompts", "RawObservation", "Repeats", "mapped"]


class Movable:
    """A dataclass of tensors that can be brought to a device."""

    def to(self, device: torch.device | str) -> Self:
        return mapped(self, lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True, kw_only=True)
class Repeats(Movable):
    """Which rows of a batch have the same prompt: what depends on the prompt alone need be computed once for all of them."""

    row_R: Tensor
    """int64; for each of the R different prompts a row that has it."""
    which_B: Tensor
    """int64; which of those R the row's prompt is."""


@dataclass(frozen=True, kw_only=True)
class Prompts(Movable):
    """A batch of instructions, tokenised; padded on the right to a common bucket."""

    ids_BL: Tensor
    """int64; 0 where padded."""
    mask_BL: Tensor
    """bool; True at real tokens."""
    embedding_BLE: Tensor | None = None
    """float32, the text encoder's output for the same tokens, where the policy reads it."""
    repeats: Repeats | None = None
    """Of training batches, where the loader knows them. None in acting: an episode's last bits must not depend on which others share
    its batch."""


@dataclass(frozen=True, kw_only=True)
class HiddenConditions:
    """What training keeps from a policy beside what an `Observation` can leave out by itself; `Policy.prefix` obeys."""

    control_hz_B: Tensor
    """bool; True where the control frequency is 0, which stands for an unknown one."""
    action_mask_B: Tensor
    """bool; True where no entry of the action's vector counts as one that the robot has."""


@dataclass(frozen=True, kw_only=True)
class Observation(Movable):
    """A batch of prepared observations."""

    images: Mapping[str, Tensor]
    """camera -> (B, T, image_px, image_px, 3) uint8: upright, padded to square, resized. An absent camera has no key."""
    image_mask: Mapping[str, Tensor]
    """camera -> (B, T) bool; False where a sample lacks that picture: it has no such camera, or lies before its episode's start."""
    state_BTS: Tensor
    """float32."""
    prompts: Prompts
    features: Mapping[str, Tensor] | None = None
    """camera -> (B, T, N, D), what the policy's frozen vision tower makes of that picture, and stands in for it: `images` is then empty."""
    hidden: HiddenConditions | None = None
    """Drawn in training (`condition_dropout.py`); None: nothing is hidden."""


@dataclass(frozen=True, kw_only=True)
class Batch(Movable):
    """Training samples: an observation and the chunk of actions that follows it."""

    observation: Observation
    actions_BHA: Tensor
    """float32; beyond the episode's end the last action is repeated."""
    valid_BH: Tensor
    """bool; False beyond the episode's end."""
    sample_index_B: Tensor
    """int64: the frame's place in the cache. With the step it names a sample's noise, whatever the rank."""


def mapped(value: Whole, change: Callable[[Tensor], Tensor]) -> Whole:
    """`value` with `change` of every tensor in it, however deep."""
    changed: Any = value
    if isinstance(value, Tensor):
        changed = change(value)
    elif isinstance(value, Mapping):
        changed = {key: mapped(item, change) for key, item in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: mapped(getattr(value, field.name), change) for field in fields(value)}
        changed = replace(value, **parts)
    whole: Whole = changed
    return whole
