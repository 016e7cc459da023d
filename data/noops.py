"""Leaving out the moments in which a demonstrator did nothing, as OpenVLA's regenerated LIBERO data do.

A frame is dropped if its action moves by less than `STILL` (Euclidean norm over every entry but the gripper) and asks of
the gripper what the last kept frame asked; the first frame is dropped if it does not move. A policy that sees pauses learns to pause.
Source of the rule: OpenVLA's regenerate_libero_dataset.py.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from .episodes import DataError, Episode

STILL = 1e-4
"""In action units."""


def without_noops(episode: Episode, gripper_action: int) -> Episode:
    """The episode without its idle frames. Raises `DataError` if no other is left."""
    kept_N = moving_frames(episode.actions_NA, gripper_action)
    if not kept_N.any():
        raise DataError(f"{episode.key} has no action that moves anything; delete it, or prepare without --drop-noops")
    return replace(
        episode,
        images={camera: _Kept(blocks, kept_N) for camera, blocks in episode.images.items()},
        state_NS=episode.state_NS[kept_N],
        actions_NA=episode.actions_NA[kept_N],
    )


def moving_frames(actions_NA: np.ndarray, gripper_action: int) -> np.ndarray:
    """(N,) bool: which frames stay."""
    still_N = np.linalg.norm(np.delete(actions_NA, gripper_action, axis=1), axis=1) < STILL
    gripper_N = actions_NA[:, gripper_action]
    kept_N = ~still_N
    last_kept: int | None = None
    for n in range(len(actions_NA)):
        if still_N[n] and last_kept is not None:
            kept_N[n] = gripper_N[n] != gripper_N[last_kept]
        if kept_N[n]:
            last_kept = n
    return kept_N


@dataclass(frozen=True)
class _Kept:
    blocks: Iterable[np.ndarray]
    kept_N: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        first = 0
        for block in self.blocks:
            kept = self.kept_N[first : first + len(block)]
            first += len(block)
            if kept.any():
                yield block[kept]
