"""What a source of demonstrations offers: whole episodes, one at a time, by key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .robots.card import RobotCard


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One demonstration: N frames, each an observation and the action that was taken on it."""

    key: str
    """Stable within its source: `<file>/<demo>`."""
    task: str
    """The task's name, e.g. its HDF5 file without `_demo.hdf5`."""
    instruction: str
    images: Mapping[str, np.ndarray]
    """camera -> (N, rows, columns, 3) uint8, in the orientation of the source."""
    state_NS: np.ndarray
    """float32, raw units, in the robot card's order."""
    actions_NA: np.ndarray
    """float32, raw units."""


class EpisodeSource(Protocol):
    """Demonstrations on disk. Reading one never loads another."""

    robot: RobotCard

    def keys(self) -> Sequence[str]:
        """Every episode's key, in a stable order."""

    def read(self, key: str) -> Episode:
        """The episode; raises `DataError` with one clear sentence if it is damaged."""

    def fingerprint(self) -> Mapping[str, str]:
        """What the cache must have been built from: file -> size and content digest. Cheap enough to compute at each start."""


class DataError(Exception):
    """Something on disk is missing, damaged or not what it should be; the message says what, where and what to type."""
