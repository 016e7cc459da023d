"""What a source of demonstrations offers: whole episodes, one at a time, by key."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .robots.card import RobotCard


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One demonstration: N frames, each an observation and the action that was taken on it."""

    key: str
    """Stable within its source: `<file>/<demo>`."""
    suite: str = ""
    """The family of tasks that the source says it belongs to, such as `libero_spatial`; empty where it does not say."""
    task: str
    """The task's name, e.g. its HDF5 file without `_demo.hdf5`."""
    instruction: str
    images: Mapping[str, Iterable[np.ndarray]]
    """camera -> blocks (n, rows, columns, 3) uint8 in the source's orientation, N pictures together. They are read while they
    are iterated over, so that a long episode is never in memory whole; damage found then raises `DataError`."""
    state_NS: np.ndarray
    """float32, raw units, in the robot card's order."""
    actions_NA: np.ndarray
    """float32, raw units."""

    def pictures(self, camera: str) -> np.ndarray:
        """(N, rows, columns, 3) uint8: all of a camera's pictures at once, for episodes that fit into memory."""
        return np.concatenate(list(self.images[camera]))


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
