"""How good sampled paths are: valid, on both sides, as far apart as demonstrations are, and distributed like them.

N paths, S starts with D draws each (N = S * D, a start's draws beside one another), H waypoints, 2 coordinates.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .two_ways import goes_right, is_clear, reaches_goal


@dataclass(frozen=True, kw_only=True)
class PathScores:
    """Of all paths sampled from one trained expert. Lengths are in the world's units; the way to the goal is 2 long."""

    num_paths: int
    """Paths sampled."""
    num_valid: int
    """Of these, paths that keep clear of the obstacle and reach the goal."""
    num_right: int
    """Of the valid ones, those that pass the obstacle on its right."""
    num_starts: int
    """Starts that they were sampled from, as many from each."""
    num_both_ways: int
    """Of these, starts from which valid paths lead on both sides."""
    valid: float
    """num_valid / num_paths."""
    clear: float
    """Share of all paths that keep clear of the obstacle."""
    reaches_goal: float
    """Share of all paths that end at the goal."""
    right: float | None
    """num_right / num_valid; empty without a valid path. To be compared with the demonstrated share."""
    both_ways: float
    """num_both_ways / num_starts: modes covered given the start, not only over all starts together."""
    distance: float
    """From a path to the nearest fresh demonstration: root mean square over waypoints, mean over paths."""
    spread: float
    """Standard deviation between draws from one start, root mean square over all coordinates. 0: the noise is ignored."""
    energy_distance: float
    """Between the distributions of paths and of as many fresh demonstrations from the same starts; where they are the same it is
    about 0, and can be a little below."""


def score(starts_N2: np.ndarray, paths_NH2: np.ndarray, fresh_NH2: np.ndarray, num_starts: int) -> PathScores:
    """Score paths against fresh demonstrations from the same starts."""
    clear, reaches, right = is_clear(starts_N2, paths_NH2), reaches_goal(paths_NH2), goes_right(paths_NH2)
    valid = clear & reaches
    by_start = (num_starts, -1)
    both_ways = (valid & right).reshape(by_start).any(axis=1) & (valid & ~right).reshape(by_start).any(axis=1)
    draws_SDH2 = paths_NH2.reshape(num_starts, -1, *paths_NH2.shape[1:])
    spread = np.sqrt(draws_SDH2.var(axis=1, ddof=1).mean()) if draws_SDH2.shape[1] > 1 else 0.0
    to_fresh_NN = _distances(paths_NH2, fresh_NH2)
    energy = 2 * to_fresh_NN.mean() - _mean_between(paths_NH2) - _mean_between(fresh_NH2)
    num_valid, num_right = int(valid.sum()), int((valid & right).sum())
    return PathScores(
        num_paths=len(paths_NH2),
        num_valid=num_valid,
        num_right=num_right,
        num_starts=num_starts,
        num_both_ways=int(both_ways.sum()),
        valid=float(valid.mean()),
        clear=float(clear.mean()),
        reaches_goal=float(reaches.mean()),
        right=num_right / num_valid if num_valid else None,
        both_ways=float(both_ways.mean()),
        distance=float(to_fresh_NN.min(axis=1).mean()),
        spread=float(spread),
        energy_distance=float(energy),
    )


def _distances(first_NH2: np.ndarray, second_MH2: np.ndarray) -> np.ndarray:
    """(N, M) float64: root mean square over waypoints."""
    first, second = (torch.from_numpy(paths).double().flatten(1) for paths in (first_NH2, second_MH2))
    return np.asarray(torch.cdist(first, second)) / np.sqrt(first_NH2.shape[1])


def _mean_between(paths_NH2: np.ndarray) -> float:
    """Mean distance of two different paths."""
    number = len(paths_NH2)
    return float(_distances(paths_NH2, paths_NH2).sum() / max(1, number * (number - 1)))
