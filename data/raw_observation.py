"""What comes in from a robot or a simulator. A file of its own, without torch: every simulator process imports it.

Shape letters as in `batch.py`: T observation offsets, S state dims."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RawObservation:
    """What a robot or a simulator saw at one decision: unprepared, unbatched."""

    images: Mapping[str, np.ndarray]
    """camera -> (T, rows, columns, 3) uint8, in the camera's own orientation and size (LIBERO: upside-down)."""
    state_TS: np.ndarray
    """float32, in the order of the robot card."""
    instruction: str
    there_T: np.ndarray | None = None
    """bool; False where an offset lies before the episode's start, whose first observation then stands in. None: all are there."""
