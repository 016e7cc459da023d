"""A cache against the demonstrations that it was made from, read again.

Shape letters: N frames of one episode, K of them that are compared, H rows, W columns, C = 3 colours.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
from tqdm import tqdm

from .cache import Cache
from .cache_checks import damaged, settings_of
from .cache_writer import differences
from .episodes import DataError, Episode
from .images import Orientation
from .noops import without_noops
from .prepare import open_source


def check_source(cache: Cache, demos: Path) -> str:
    """They are the same demonstrations; says what was looked at, or raises `DataError`."""
    source = open_source(settings_of(cache, demos))
    changes = differences(cache.manifest.source, {}, source.fingerprint(), {})
    if changes:
        raise DataError(
            f"{demos} is not what the cache {cache.path} was made from ({changes}); give the right --demos, or prepare again"
        )
    for name in ("state_names", "action_names", "cameras"):
        if getattr(source.robot, name) != getattr(cache.robot, name):
            raise damaged(
                cache, f"has {name} {getattr(cache.robot, name)}, and {demos} has {getattr(source.robot, name)}"
            )
    if list(source.keys()) != list(cache.episodes["source"]):
        raise damaged(cache, f"has other episodes than {demos}")
    return f"{demos}: {len(cache.manifest.source)} files unchanged, the same {len(source.keys())} episodes"


def check_frames(cache: Cache, demos: Path, samples: int, seed: int) -> str:
    """`samples` random frames: the same pictures bit for bit, and all the numbers of their episodes. Says what was looked at, or
    raises `DataError`; the demonstrations must be those of `check_source`."""
    settings = settings_of(cache, demos)
    source = open_source(settings)
    random = np.random.default_rng(seed)
    wanted = np.sort(random.choice(cache.num_frames, size=min(samples, cache.num_frames), replace=False))
    episode_of = np.searchsorted(cache.episodes["start"], wanted, side="right") - 1
    chosen = np.unique(episode_of)
    for k in tqdm(chosen, desc="verify", unit="episode"):
        episode = source.read(cache.episodes["source"].iloc[k])
        if settings.drop_noops:
            episode = without_noops(episode, cache.robot.gripper_action)
        _compare_episode(cache, k, episode, wanted[episode_of == k] - int(cache.episodes["start"].iloc[k]))
    return (
        f"{len(wanted)} of {cache.num_frames} frames, in {len(chosen)} episodes: the same pictures of "
        f"{', '.join(cache.manifest.cameras)}, states and actions"
    )


def _compare_episode(cache: Cache, k: int, episode: Episode, frames_K: np.ndarray) -> None:
    """All of an episode's numbers, and its pictures at `frames_K` (ascending), against row `k` of the cache's episodes."""
    row = cache.episodes.iloc[k]
    start, length = int(row["start"]), int(row["length"])
    for name in ("suite", "task", "instruction"):
        if row[name] != getattr(episode, name):
            raise damaged(
                cache, f"has {name} {row[name]!r} for {episode.key}, and its source says {getattr(episode, name)!r}"
            )
    for name, cached, there in (
        ("states", cache.state_NS, episode.state_NS),
        ("actions", cache.actions_NA, episode.actions_NA),
    ):
        if len(there) != length:
            raise damaged(cache, f"has {length} frames of {episode.key}, and its source has {len(there)}")
        same_N = (cached[start : start + length] == there.astype(np.float32)).all(axis=1)
        if not same_N.all():
            raise damaged(cache, f"has other {name} than {episode.key}, first in frame {int((~same_N).argmax())}")
    for camera in cache.manifest.cameras:
        for n, picture_HWC in _pictures_at(episode, camera, frames_K):
            cached_HWC = cache.images[camera][start + n]
            if not np.array_equal(cache.image_rule.prepare(picture_HWC[None])[0], cached_HWC):
                hint = _other_orientation(cache, picture_HWC, cached_HWC)
                raise damaged(cache, f"has another picture of {camera} than frame {n} of {episode.key}{hint}")


def _pictures_at(episode: Episode, camera: str, frames_K: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(frame, picture as it was recorded); no block behind the last wanted frame is read. Raises `DataError` if one is
    missing."""
    left, first = frames_K.tolist(), 0
    for block in episode.images[camera]:
        while left and left[0] < first + len(block):
            n = left.pop(0)
            yield n, block[n - first]
        first += len(block)
        if not left:
            return
    raise DataError(
        f"{episode.key} has {first} pictures of {camera}, and frame {left[0]} was looked for; copy the demonstrations again"
    )


def _other_orientation(cache: Cache, picture_HWC: np.ndarray, cached_HWC: np.ndarray) -> str:
    """A remark if the cache holds the picture turned in another way than it says."""
    for way in get_args(Orientation):
        rule = replace(cache.image_rule, orientation=way)
        if np.array_equal(rule.prepare(picture_HWC[None])[0], cached_HWC):
            return f" (it is turned {way}, and the cache says {cache.image_rule.orientation})"
    return ""
