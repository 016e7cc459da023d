"""Where a robot's numbers stand in the wider vector that a pretrained policy reads and writes.

π0, π0.5 and SmolVLA put them first in a vector of 32; RDT has a named slot for every quantity in a vector of 128. A checkpoint
keeps its layouts: weights that learnt one would act on nonsense under another.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class VectorLayout:
    """The place of each of the robot's dimensions in a vector of `width`; the other entries are 0."""

    name: str
    """What it is called where it comes from."""
    width: int
    """Entries of the model's vector."""
    slots: tuple[int, ...] | None = None
    """The robot's dimension i stands at slots[i]; None: they come first, in order."""

    def __post_init__(self) -> None:
        slots = self.slots or ()
        if len(set(slots)) != len(slots) or any(not 0 <= slot < self.width for slot in slots):
            raise ValueError(f"layout {self.name!r}: slots {slots} must be distinct and within 0 to {self.width - 1}")

    def slots_of(self, num_dims: int) -> tuple[int, ...]:
        """Raises ValueError if a robot of `num_dims` dimensions does not fit."""
        slots = tuple(range(num_dims)) if self.slots is None else self.slots
        if len(slots) != num_dims or num_dims > self.width:
            raise ValueError(
                f"layout {self.name!r} places {self.width if self.slots is None else len(slots)} dimensions, the robot has "
                f"{num_dims}; choose the layout that was made for this robot"
            )
        return slots


class LaidOut(torch.nn.Module):
    """A layout applied to one robot: its numbers to the model's vector and back, over the last axis."""

    slots_D: Tensor
    mask_W: Tensor

    def __init__(self, layout: VectorLayout | None, num_dims: int) -> None:
        """Without a layout both are the same vector. Raises ValueError where the robot does not fit."""
        super().__init__()
        layout = VectorLayout(name="the robot's own", width=num_dims) if layout is None else layout
        self.width = layout.width
        slots = torch.tensor(layout.slots_of(num_dims))
        mask = torch.zeros(layout.width, dtype=torch.bool).index_fill_(0, slots, True)
        self.register_buffer("slots_D", slots, persistent=False)
        self.register_buffer("mask_W", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, width), zeros where the robot has nothing."""
        return x.new_zeros(*x.shape[:-1], self.width).index_copy(-1, self.slots_D, x)

    def inverse(self, x: Tensor) -> Tensor:
        """(…, width) -> (…, D)."""
        return x.index_select(-1, self.slots_D)
