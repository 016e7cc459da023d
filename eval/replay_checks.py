"""What a file stores against what the simulator shows: which moment, which order, which way up, which sign. Numbers only.

Shape letters: T rows of a demonstration (P of them, where few are compared), n numbers; H rows and W columns of a picture, C = 3.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..data.robots.libero_panda import FINGER_TRAVEL_M
from ..data.rotations import axis_angle_to_quaternion, quaternion_to_axis_angle

LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "obs/joint_states": ("joints",),
    "obs/ee_pos": ("position",),
    "obs/ee_ori": ("axis angle",),
    "obs/gripper_states": ("fingers",),
    "obs/ee_states": ("position", "axis angle"),
    "robot_states": ("fingers", "position", "quaternion"),
}
"""Dataset -> what LIBERO puts into it, in this order."""
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "joints": tuple("1234567"),
    "position": ("x", "y", "z"),
    "axis angle": ("x", "y", "z"),
    "quaternion": ("x", "y", "z", "w"),
    "fingers": ("left", "right"),
}
SIZES = {block: len(names) for block, names in COLUMNS.items()}
TOLERANCES = {"joints": 0.02, "position": 0.01, "axis angle": 0.05, "quaternion": 0.05, "fingers": 0.003}
"""Radians and metres. Below a fifth of them nothing is doubted; above them a part does not agree."""
NOTHING_TO_DOUBT = 0.2
CLEARLY_BETTER = 5.0
"""Another order must fit so many times better before it is named."""
FINEST_LAG = 0.04
"""A physics substep, as a share of a control step: robosuite samples what it observes at one of 25."""
STANDS_STILL = 1e-4
"""Metres or radians: what moves no further in a control step tells no moment."""
ANTIPODAL_RAD = 0.1
ANTIPODAL_SHARE = 0.01

TURNS = {
    "": lambda picture: picture,
    "turned by 180 degrees": lambda picture: picture[:, ::-1, ::-1],
    "mirrored, their rows in reverse": lambda picture: picture[:, ::-1],
    "mirrored, their columns in reverse": lambda picture: picture[:, :, ::-1],
    "turned by 90 degrees": lambda picture: np.rot90(picture, 1, (1, 2)),
    "turned by 270 degrees": lambda picture: np.rot90(picture, 3, (1, 2)),
}
PICTURES_ALIKE = 1.0
"""Grey levels, on average: below this nothing is doubted."""
TURNED_RATIO = 0.5
"""Another way of showing them must leave less than this share of the difference."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the simulator measures in each of the recorded states."""

    joints: np.ndarray
    """(T, 7)"""
    position: np.ndarray
    """(T, 3)"""
    quaternion: np.ndarray
    """(T, 4) x, y, z, w"""
    fingers: np.ndarray
    """(T, 2)"""

    def at(self, lag: float) -> dict[str, np.ndarray]:
        """Block -> (T, n), `lag` control steps after each row; NaN where that is before the first state or after the last."""
        quaternion = _later(self.quaternion, lag)  # of a body, not of a matrix: its sign changes steadily
        quaternion /= np.linalg.norm(quaternion, axis=1, keepdims=True)
        return {
            "joints": _later(self.joints, lag),
            "position": _later(self.position, lag),
            "quaternion": quaternion,
            "axis angle": quaternion_to_axis_angle(quaternion),
            "fingers": _later(self.fingers, lag),
        }


def _later(rows_TN: np.ndarray, lag: float) -> np.ndarray:
    moments_T = np.arange(len(rows_TN)) + lag
    return np.stack(
        [np.interp(moments_T, np.arange(len(rows_TN)), column, np.nan, np.nan) for column in rows_TN.T], axis=1
    )


def fit_lag(stored: Mapping[str, np.ndarray], measured: Measured) -> float | None:
    """How many control steps after (before: negative) the state of its row an observation was made, to a substep.

    Told by the joints, else by the gripper's position; None where neither fits any moment from one step before to one step after,
    or where nothing moves enough to tell."""
    lags = np.arange(-27, 28) * FINEST_LAG
    for name in ("obs/joint_states", "obs/ee_pos"):
        (block,) = LAYOUTS[name]
        if name in stored:
            errors = np.array([block_error(stored[name], measured.at(lag)[block], block) for lag in lags])
            best = int(errors.argmin())
            tells = errors[np.isfinite(errors)].max() > CLEARLY_BETTER * max(errors[best], STANDS_STILL)
            if tells and errors[best] < NOTHING_TO_DOUBT * TOLERANCES[block]:
                return float(lags[best])
    return None


def block_error(stored_TN: np.ndarray, true_TN: np.ndarray, block: str) -> float:
    """How far apart the two are in the median row: radians or metres. A rotation's two signs count as one."""
    if block in ("quaternion", "axis angle"):
        stored, true = (rows if block == "quaternion" else _quaternions(rows) for rows in (stored_TN, true_TN))
        cosine_T = np.abs(np.sum(stored * true, axis=1)) / np.maximum(np.linalg.norm(stored, axis=1), 1e-12)
        rows_T = 2 * np.arccos(np.clip(cosine_T, 0.0, 1.0))
    else:
        rows_T = np.abs(stored_TN - true_TN).max(axis=1)
    return float(np.nanmedian(rows_T)) if np.isfinite(rows_T).any() else np.inf


def _quaternions(axis_angle_TN: np.ndarray) -> np.ndarray:
    known_T = np.isfinite(axis_angle_TN).all(axis=1)
    found = np.full((len(axis_angle_TN), 4), np.nan)
    found[known_T] = axis_angle_to_quaternion(axis_angle_TN[known_T])
    return found


def check_order(name: str, stored_TN: np.ndarray, measured: Measured, lag: float) -> tuple[float, str]:
    """How far the dataset `name` is from what the simulator measures, in units of `TOLERANCES`, and what is wrong: a sentence, or
    nothing."""
    true, blocks = measured.at(lag), LAYOUTS[name]
    as_it_is = _error(stored_TN, true, blocks, {block: tuple(range(SIZES[block])) for block in blocks})
    if as_it_is <= NOTHING_TO_DOUBT:
        return as_it_is, _antipodal(name, stored_TN, true) if blocks == ("axis angle",) else ""
    others = [
        (_error(stored_TN, true, order, columns), order, columns) for order, columns in _orders(stored_TN, true, blocks)
    ]
    error, order, columns = min(others, key=lambda other: other[0], default=(np.inf, blocks, {}))
    if error * CLEARLY_BETTER < as_it_is:
        said = [f"the order {_listed(order)}, where LIBERO has {_listed(blocks)}"] if order != blocks else []
        said += [
            f"the numbers of its {block} in the order {_listed([COLUMNS[block][k] for k in columns[block]])}, where LIBERO has "
            f"{_listed(COLUMNS[block])}"
            for block in blocks
            if columns[block] != tuple(range(SIZES[block]))
        ]
        return as_it_is, f"`{name}` has {' and '.join(said)}"
    if as_it_is > 1:
        return (
            as_it_is,
            f"`{name}` is not what the simulator measures in the recorded states, in whatever order its numbers are read",
        )
    return as_it_is, ""


def _orders(
    stored_TN: np.ndarray, true: Mapping[str, np.ndarray], blocks: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], dict[str, tuple[int, ...]]]]:
    """Every order of the blocks but the right one, the numbers of each in their best order: `columns[block][i]` is which of the
    block's numbers stands at its i-th place."""
    for order in permutations(blocks):
        columns = {}
        for block, here in _places(order):
            columns[block] = _best_columns(stored_TN[:, here], true[block], block)
        if order != tuple(blocks) or any(places != tuple(range(SIZES[block])) for block, places in columns.items()):
            yield order, columns


def _best_columns(stored_TN: np.ndarray, true_TN: np.ndarray, block: str) -> tuple[int, ...]:
    if block == "joints":
        known_T = np.isfinite(true_TN).all(axis=1)
        cost_NN = np.abs(stored_TN[known_T, :, None] - true_TN[known_T, None, :]).mean(axis=0)
        return tuple(int(k) for k in linear_sum_assignment(cost_NN)[1])
    ways = permutations(range(SIZES[block]))
    return min(ways, key=lambda columns: block_error(_put_back(stored_TN, columns), true_TN, block))


def _error(
    stored_TN: np.ndarray, true: Mapping[str, np.ndarray], order: Sequence[str], columns: Mapping[str, tuple[int, ...]]
) -> float:
    """Of the worst block, in units of its tolerance."""
    return max(
        block_error(_put_back(stored_TN[:, here], columns[block]), true[block], block) / TOLERANCES[block]
        for block, here in _places(order)
    )


def _places(order: Sequence[str]) -> Iterator[tuple[str, slice]]:
    first = 0
    for block in order:
        yield block, slice(first, first + SIZES[block])
        first += SIZES[block]


def _put_back(stored_TN: np.ndarray, columns: tuple[int, ...]) -> np.ndarray:
    return stored_TN[:, np.argsort(columns)]


def _antipodal(name: str, stored_TN: np.ndarray, true: Mapping[str, np.ndarray]) -> str:
    apart_T = np.linalg.norm(stored_TN - true["axis angle"], axis=1)
    if np.mean(apart_T > ANTIPODAL_RAD) <= ANTIPODAL_SHARE:
        return ""
    return (
        f"`{name}` has the right rotations written with the other sign of their axis in some rows (a quaternion's two signs are one "
        "rotation, and two axis angles): a policy is given other numbers in this benchmark"
    )


@dataclass(frozen=True, kw_only=True)
class Looks:
    """One camera's stored pictures against rendered ones."""

    difference: float
    """Mean absolute difference, in grey levels of 255, as they are."""
    better: str
    """How they must be understood to differ far less: `turned by 180 degrees`; empty where they are as they should be."""
    better_difference: float
    """What is left of the difference then."""


def look(stored_PHWC: np.ndarray, rendered: Mapping[str, np.ndarray], camera: str) -> Looks:
    """`rendered`: camera -> (P, H, W, 3) uint8, of the same moments and size."""

    def apart(turn: str, flipped_colours: bool, seen_by: str) -> float:
        picture = TURNS[turn](rendered[seen_by])
        picture = picture[..., ::-1] if flipped_colours else picture
        return float(np.abs(stored_PHWC.astype(np.int16) - picture.astype(np.int16)).mean())

    cameras = [camera, *(other for other in rendered if other != camera)]
    ways = list(product(TURNS, (False, True), cameras))
    differences = [apart(*way) for way in ways]
    as_it_is, best = differences[0], int(np.argmin(differences))
    turn, flipped_colours, seen_by = ways[best]
    said = [
        *([f"those of camera {seen_by}"] if seen_by != camera else []),
        *([turn] if turn else []),
        *(["in BGR order"] if flipped_colours else []),
    ]
    doubted = as_it_is > PICTURES_ALIKE and differences[best] < TURNED_RATIO * as_it_is
    return Looks(difference=as_it_is, better=" and ".join(said) if doubted else "", better_difference=differences[best])


def gripper_agreement(asked_open_T: np.ndarray, fingers_TN: np.ndarray) -> float | None:
    """From 1 (the fingers open where the action of the same row asks them to, and close where it asks for that) to -1 (the reverse).

    `asked_open_T` is bool, `fingers_TN` (T, 2) the finger joints before each action. None where they go less than half of the way
    from open to closed."""
    change_T = np.diff(fingers_TN[:, 0] - fingers_TN[:, 1])
    travel = float(np.abs(change_T).sum())
    if travel < FINGER_TRAVEL_M:
        return None
    return float(np.sum(np.where(asked_open_T[:-1], change_T, -change_T)) / travel)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
