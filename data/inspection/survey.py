"""One pass over a cache, episode by episode: what warnings, tables and figures are made from.

Numbers are read whole (they are small), pictures by sample. Shape letters: N frames of an episode, S state dims, A action
dims, E episodes, K = `PROFILE_POINTS`, P pairs of frames, C = 3 colours.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm import tqdm

from ..cache import Cache
from ..episodes import DataError
from ..noops import moving_frames
from ..robots.card import RobotCard

PROFILE_POINTS = 50
"""Places, evenly spread from an episode's first frame to its last, at which episodes of any length are compared."""
LIMIT_TOLERANCE = 1e-5
"""Relative: float32 may round a limit up."""
BLANK_LEVELS = 2
"""Of 255: a picture whose colours differ by no more shows nothing."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the pass found."""

    episodes: pd.DataFrame
    """The cache's episodes, with the columns that `_numbers` and `_pictures` give."""
    magnitude_EK: np.ndarray
    """Norm of the action without its gripper, action units."""
    closed_EK: np.ndarray
    """0 to 1: whether the action asks for a closed gripper."""
    opening_EK: np.ndarray | None
    """The fingers' opening in the state's unit; None where the state does not tell it."""


def survey(cache: Cache, num_pairs: int) -> Survey:
    """Look at every episode. Raises `DataError` if a number is not finite, which `prepare` never writes."""
    opening_dims = finger_dims(cache.robot)
    found, magnitude, closed, opening = [], [], [], []
    starts, sources = cache.episodes["start"].tolist(), cache.episodes["source"].tolist()
    ends = [*starts[1:], cache.num_frames]
    for start, end, source in tqdm(
        zip(starts, ends, sources, strict=True), desc="inspect", unit="episode", total=len(starts)
    ):
        frames = slice(start, end)
        state_NS, actions_NA = cache.state_NS[frames], cache.actions_NA[frames]
        if not (np.isfinite(state_NS).all() and np.isfinite(actions_NA).all()):
            raise DataError(
                f"{source} has NaN or infinity in the cache {cache.path}: it is damaged; run `vlatune verify {cache.path}`"
            )
        opening_N = np.abs(state_NS[:, opening_dims]).sum(axis=1)
        closed_N = asks_closed(cache.robot, actions_NA)
        found.append(_numbers(cache.robot, state_NS, actions_NA, opening_N) | _pictures(cache, frames, num_pairs))
        magnitude.append(_profile(np.linalg.norm(np.delete(actions_NA, cache.robot.gripper_action, axis=1), axis=1)))
        closed.append(_profile(closed_N))
        opening.append(_profile(opening_N))
    facts = pd.DataFrame(found, index=cache.episodes.index)
    return Survey(
        episodes=pd.concat([cache.episodes, facts], axis=1),
        magnitude_EK=np.stack(magnitude),
        closed_EK=np.stack(closed),
        opening_EK=np.stack(opening) if opening_dims else None,
    )


def finger_dims(robot: RobotCard) -> list[int]:
    """Where the state tells how far the gripper is open: its finger joints (which count by their distance from 0, closed), or
    one number for the whole. Empty where no name says so."""
    fingers = [dim for dim, name in enumerate(robot.state_names) if "finger" in name]
    return fingers or [dim for dim, name in enumerate(robot.state_names) if name.startswith("gripper_opening")]


def asks_closed(robot: RobotCard, actions_NA: np.ndarray) -> np.ndarray:
    """(N,) bool: the gripper's action is nearer to the card's `gripper_closed` than to its `gripper_open`."""
    gripper_N = actions_NA[:, robot.gripper_action]
    return np.asarray(np.abs(gripper_N - robot.gripper_closed) < np.abs(gripper_N - robot.gripper_open))


def outside_limit(robot: RobotCard, actions: np.ndarray) -> np.ndarray:
    """Bool, of the actions' shape: beyond the card's limit by more than rounding."""
    return np.asarray(np.abs(actions) > robot.action_limit * (1 + LIMIT_TOLERANCE))


def _numbers(
    robot: RobotCard, state_NS: np.ndarray, actions_NA: np.ndarray, opening_N: np.ndarray
) -> dict[str, object]:
    """`content` tells equal episodes; `outside_frames`, `closed_frames` and `idle_frames` count; `finger_travel` is how far the
    fingers went and `finger_obeyed` that distance with a sign: + where they opened on `open` and closed on `closed`. Fingers that
    follow late stand still meanwhile, which counts for nothing."""
    closed_N = asks_closed(robot, actions_NA)
    change_N = np.diff(opening_N)
    asked_N = np.where(closed_N, -1.0, 1.0)[:-1]
    return {
        "content": hashlib.sha256(state_NS.tobytes() + actions_NA.tobytes()).hexdigest(),
        "outside_frames": int(outside_limit(robot, actions_NA).any(axis=1).sum()),
        "closed_frames": int(closed_N.sum()),
        "idle_frames": len(actions_NA) - int(moving_frames(actions_NA, robot.gripper_action).sum()),
        "finger_travel": float(np.abs(change_N).sum()),
        "finger_obeyed": float((asked_N * change_N).sum()),
    }


def _pictures(cache: Cache, frames: slice, num_pairs: int) -> dict[str, object]:
    """For each camera: `frozen_<camera>`, whether most of the sampled pairs of consecutive pictures are identical although the
    state changed between them; `blank_<camera>`, the first sampled frame of the cache that shows nothing, or -1."""
    first, count = frames.start, frames.stop - frames.start
    moved = np.flatnonzero((np.diff(cache.state_NS[frames], axis=0) != 0).any(axis=1))
    chosen = moved[np.unique(np.linspace(0, len(moved) - 1, min(num_pairs, len(moved))).round().astype(int))]
    found: dict[str, object] = {}
    for camera, images in cache.images.items():
        found[f"frozen_{camera}"] = _mostly_equal(images, first + chosen)
        looked_at = first + np.unique(np.linspace(0, count - 1, min(3, count)).round().astype(int))
        blank = (int(n) for n in looked_at if is_blank(images[n], cache.image_rule.background))
        found[f"blank_{camera}"] = next(blank, -1)
    return found


def _mostly_equal(images_NHWC: np.ndarray, first_P: np.ndarray) -> bool:
    """Whether more than half of the pairs (n, n + 1) are equal; stops reading as soon as that is known."""
    num_equal = num_different = 0
    for n in first_P:
        same = np.array_equal(images_NHWC[n], images_NHWC[n + 1])
        num_equal, num_different = num_equal + same, num_different + (not same)
        if 2 * num_different >= len(first_P):
            return False
    return num_equal > num_different


def is_blank(picture_HWC: np.ndarray, background: tuple[int, int, int]) -> bool:
    """Whether there is one colour only, besides the padding's."""
    pixels_PC = picture_HWC.reshape(-1, 3)
    inside_PC = pixels_PC[(pixels_PC != np.array(background, np.uint8)).any(axis=1)]
    return len(inside_PC) == 0 or bool((np.ptp(inside_PC, axis=0) <= BLANK_LEVELS).all())


def _profile(values_N: np.ndarray) -> np.ndarray:
    """(K,) float64: linearly interpolated over the episode's time."""
    here_N = np.linspace(0, 1, len(values_N)) if len(values_N) > 1 else np.zeros(1)
    return np.interp(np.linspace(0, 1, PROFILE_POINTS), here_N, values_N.astype(np.float64))
