"""A world of two ways: from a start at the bottom to a goal at the top, round a disc in the middle, by the left or the right.

Demonstrations are chunks of 16 waypoints in the plane; nothing in the start says which side is taken. Everything is about
as large as normalised actions are. A path is its start and the straight lines through its waypoints.

N paths, H waypoints, 2 coordinates (x to the right, y upwards).
"""

from dataclasses import dataclass

import numpy as np

HORIZON = 16
GOAL = np.array([0.0, 1.0])
GOAL_RADIUS = 0.15
"""A path that ends this near to the goal has reached it."""
OBSTACLE = np.array([0.0, 0.0])
OBSTACLE_RADIUS = 0.35
MEAN_BULGE = 0.75
"""How far out the middle of a demonstration is; its spread from one to the next is a tenth of it."""


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Starts and the paths from them, float32."""

    starts_N2: np.ndarray
    paths_NH2: np.ndarray


def demonstrate(starts_N2: np.ndarray, *, share_right: float, rng: np.random.Generator) -> Demonstrations:
    """One path from every start, `share_right` of them (rounded) to the right, whatever their starts. All are valid."""
    number = len(starts_N2)
    side_N1 = np.where(rng.permutation(number) < round(share_right * number), 1.0, -1.0)[:, None]
    bulge_N1 = side_N1 * MEAN_BULGE * (1 + 0.1 * rng.standard_normal(number).clip(-2, 2))[:, None]
    hurry_N1 = rng.uniform(-0.5, 0.5, number)[:, None]
    ends_N2 = GOAL + 0.02 * rng.standard_normal((number, 2)).clip(-2, 2)
    time_H = np.arange(1, HORIZON + 1) / HORIZON
    time_NH = time_H + hurry_N1 * np.sin(2 * np.pi * time_H) / (2 * np.pi)
    paths_NH2 = starts_N2[:, None] + (ends_N2 - starts_N2)[:, None] * time_NH[..., None]
    paths_NH2[..., 0] += bulge_N1 * np.sin(np.pi * time_NH)
    return Demonstrations(starts_N2=starts_N2.astype(np.float32), paths_NH2=paths_NH2.astype(np.float32))


def draw_starts(number: int, rng: np.random.Generator) -> np.ndarray:
    """(N, 2) at the bottom, over 0.6 in width and 0.2 in height."""
    return np.array([0.0, -1.0]) + rng.uniform([-0.3, -0.1], [0.3, 0.1], (number, 2))


def is_clear(starts_N2: np.ndarray, paths_NH2: np.ndarray) -> np.ndarray:
    """(N,) bool: no part of the path is inside the obstacle."""
    points = np.concatenate([starts_N2[:, None], paths_NH2], axis=1).astype(np.float64)
    begin, along = points[:, :-1], np.diff(points, axis=1)
    length_squared = (along**2).sum(axis=-1)
    nearest = ((OBSTACLE - begin) * along).sum(axis=-1) / np.where(length_squared > 0, length_squared, 1.0)
    offset = begin + nearest.clip(0, 1)[..., None] * along - OBSTACLE
    return np.asarray((np.linalg.norm(offset, axis=-1) >= OBSTACLE_RADIUS).all(axis=1))


def reaches_goal(paths_NH2: np.ndarray) -> np.ndarray:
    """(N,) bool: the last waypoint is at the goal."""
    return np.asarray(np.linalg.norm(paths_NH2[:, -1] - GOAL, axis=-1) <= GOAL_RADIUS)


def goes_right(paths_NH2: np.ndarray) -> np.ndarray:
    """(N,) bool: which side of the obstacle the path's waypoint nearest to its height is on."""
    abeam = np.abs(paths_NH2[..., 1] - OBSTACLE[1]).argmin(axis=1)
    return np.asarray(paths_NH2[np.arange(len(paths_NH2)), abeam, 0] > OBSTACLE[0])
