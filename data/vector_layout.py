"""Where a robot's numbers stand in the wider vector that a pretrained policy reads and writes.

π0, π0.5 and SmolVLA put them first in a vector of 32; RDT has a named slot for every quantity in a vector of 128
(`unified_vector.py`), and some of its quantities have to be computed (`vector_encodings.py`). A checkpoint keeps its layouts:
weights that learnt one would act on nonsense under another.

Shape letters: D the robot's numbers, C what they are encoded as (D where the encoding is `as_is`), W the model's vector.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from .vector_encodings import ENCODINGS, EncodingName


@dataclass(frozen=True, kw_only=True)
class VectorLayout:
    """The place of each of the robot's dimensions in a vector of `width`; the other entries are 0."""

    name: str
    """What it is called where it comes from."""
    width: int
    """Entries of the model's vector."""
    slots: tuple[int, ...] | None = None
    """Encoded number i stands at slots[i]; None: they come first, in order."""
    encoding: EncodingName = "as_is"
    """What the robot's numbers are turned into before; any but as_is reads raw units, so nothing is normalised."""
    robots: tuple[str, ...] = ()
    """Names of the robot cards whose numbers it is for; empty: any robot of as many."""

    def __post_init__(self) -> None:
        if self.encoding not in get_args(EncodingName):
            raise ValueError(
                f"layout {self.name!r}: there is no encoding {self.encoding!r}; there are {', '.join(get_args(EncodingName))}"
            )
        slots = self.slots or ()
        if len(set(slots)) != len(slots) or any(not 0 <= slot < self.width for slot in slots):
            raise ValueError(f"layout {self.name!r}: slots {slots} must be distinct and within 0 to {self.width - 1}")
        encoding = ENCODINGS.get(self.encoding)
        if encoding is not None and len(slots) != encoding.num_encoded:
            raise ValueError(
                f"layout {self.name!r}: the encoding {self.encoding!r} gives {encoding.num_encoded} numbers and there are {len(slots)} "
                "slots; give one for each"
            )

    def slots_of(self, num_dims: int) -> tuple[int, ...]:
        """Where the C encoded numbers stand. Raises ValueError if a robot of `num_dims` dimensions does not fit."""
        encoding = ENCODINGS.get(self.encoding)
        if encoding is not None:
            slots, places = self.slots or (), encoding.num_dims
        elif self.slots is not None:
            slots, places = self.slots, len(self.slots)
        else:
            slots, places = tuple(range(num_dims)), min(num_dims, self.width)
        if places != num_dims:
            raise ValueError(
                f"layout {self.name!r} places {places} dimensions, the robot has {num_dims}; choose the layout that was made for "
                "this robot"
            )
        return slots

    def check_robot(self, robot: str) -> None:
        """Raises ValueError unless it is for the robot card called `robot`."""
        if self.robots and robot not in self.robots:
            raise ValueError(
                f"layout {self.name!r} is for the robot card {' or '.join(self.robots)}, and the data are of {robot!r}: the same numbers "
                f"mean something else; prepare with --robot {self.robots[0]}, or choose another layout"
            )


class LaidOut(torch.nn.Module):
    """A layout applied to one robot: its numbers to the model's vector and back, over the last axis."""

    slots_C: Tensor
    mask_W: Tensor

    def __init__(self, layout: VectorLayout | None, num_dims: int) -> None:
        """Without a layout both are the same vector. Raises ValueError where the robot does not fit."""
        super().__init__()
        layout = VectorLayout(name="the robot's own", width=num_dims) if layout is None else layout
        self.width = layout.width
        self.encoding = ENCODINGS.get(layout.encoding)
        slots = torch.tensor(layout.slots_of(num_dims))
        mask = torch.zeros(layout.width, dtype=torch.bool).index_fill_(0, slots, True)
        self.register_buffer("slots_C", slots, persistent=False)
        self.register_buffer("mask_W", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, W), zeros where the robot has nothing; float32 if the layout encodes."""
        if self.encoding is not None:
            x = self.encoding.encode(x.float())
        return x.new_zeros(*x.shape[:-1], self.width).index_copy(-1, self.slots_C, x)

    def inverse(self, x: Tensor) -> Tensor:
        """(…, W) -> (…, D)."""
        x = x.index_select(-1, self.slots_C)
        return x if self.encoding is None else self.encoding.decode(x.float())

    def slots_with(self, dim: int) -> Tensor:
        """The entries of W that the robot's dimension `dim` goes into, int64."""
        columns = (dim,) if self.encoding is None else self.encoding.columns[dim]
        return self.slots_C[list(columns)]
