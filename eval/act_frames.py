"""Recorded observations as a robot would have handed them over, at chosen frames of chosen demonstrations.

Shapes: N frames of an episode, H steps of a chunk, A action dims, T observation offsets, S state dims."""

import difflib
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.episodes import DataError, Episode, EpisodeSource
from ..data.raw_observation import RawObservation

Pictures = Mapping[str, Mapping[int, np.ndarray]]
"""camera -> frame -> (rows, columns, 3) uint8, in the source's orientation."""


@dataclass(frozen=True, kw_only=True)
class ChosenEpisode:
    """A demonstration, and where in it decisions are asked for. Its pictures are on disk until `pictures_of` reads them."""

    index: int
    """Among the source's episodes, or among those of the task that was asked for."""
    episode: Episode
    frames: range

    def demonstrated(self, frame: int, horizon: int) -> np.ndarray:
        """(n, A) float32, raw units: the actions from `frame` on; n is the horizon, or less where the episode ends before."""
        return self.episode.actions_NA[frame : frame + horizon]

    def observed(
        self, frame: int, offsets: Sequence[int], pictures: Pictures, cameras: Sequence[str]
    ) -> RawObservation:
        """What a decision at `frame` reads. Before the episode's start its first observation stands in, as in training."""
        wanted_T = frame + np.asarray(offsets)
        read = np.maximum(wanted_T, 0)
        return RawObservation(
            images={camera: np.stack([pictures[camera][int(n)] for n in read]) for camera in cameras},
            state_TS=self.episode.state_NS[read],
            instruction=self.episode.instruction,
            there_T=wanted_T >= 0,
        )

    def pictures_of(self, cameras: Collection[str], offsets: Collection[int]) -> Pictures:
        """Of these cameras, what decisions with these observation offsets read, and no picture more."""
        wanted = {max(0, frame + offset) for frame in self.frames for offset in offsets}
        return {camera: _pictures_at(self.episode, camera, wanted) for camera in cameras}


def choose(source: EpisodeSource, indices: Sequence[int], *, task: str, every: int) -> list[ChosenEpisode]:
    """These episodes of the source; of those of `task` (its name, or its instruction) if it is not empty. Raises `DataError` for an
    index or a task that is not there."""
    found = _of_task(source, task, most=max(indices) + 1) if task else list(source.keys())
    missing = [str(index) for index in indices if index >= len(found)]
    if missing:
        of_task = f" of task {task!r}" if task else ""
        raise DataError(
            f"--episode {' '.join(missing)}: the demonstrations{of_task} are numbered 0 to {len(found) - 1}; give some of these"
        )
    episodes = [(index, source.read(found[index])) for index in indices]
    return [
        ChosenEpisode(index=index, episode=episode, frames=range(0, len(episode.actions_NA), every))
        for index, episode in episodes
    ]


def noise_at(seed: int, key: str, frame: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normal, of that shape, float32: a function of seed, episode and frame. Of a longer chunk the first steps have what
    a shorter one's have."""
    of_key = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])
    return np.random.default_rng([seed, of_key, frame]).standard_normal(tuple(shape), dtype=np.float32)


def _of_task(source: EpisodeSource, task: str, *, most: int) -> list[str]:
    """Keys of the task's episodes, in order; not more than `most`, since each must be read to know its task."""
    found: list[str] = []
    names: dict[str, None] = {}
    keys = source.keys()
    for key in keys:
        episode = source.read(key)
        names[episode.task] = None
        if task in (episode.task, episode.instruction):
            found.append(key)
        if len(found) == most:
            break
    if not found:
        close = difflib.get_close_matches(task, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
        raise DataError(f"--task {task}: no demonstration is of this task; {hint}")
    return found


def _pictures_at(episode: Episode, camera: str, wanted: Collection[int]) -> dict[int, np.ndarray]:
    found: dict[int, np.ndarray] = {}
    start = 0
    for block in episode.images[camera]:
        # Copies, because a view would keep its whole block in memory.
        found |= {n: block[n - start].copy() for n in range(start, start + len(block)) if n in wanted}
        start += len(block)
        if len(found) == len(wanted):
            break
    return found
