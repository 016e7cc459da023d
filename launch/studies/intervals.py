"""Intervals and tests over training seeds; eval/statistics.py has those over episodes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ...eval.statistics import wilson


class Interval(NamedTuple):
    """A mean and where it lies with 95 % confidence."""

    mean: float
    low: float
    high: float


def mean_over_seeds(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of independent runs; with one run it is unbounded, which says that nothing is known."""
    if not values:
        raise ValueError("a mean over seeds needs a value")
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    from scipy.stats import t

    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = float(t.ppf(0.975, len(values) - 1)) * math.sqrt(variance / len(values))
    return Interval(mean, mean - half, mean + half)


def rate_over_seeds(successes: Sequence[int], trials: Sequence[int]) -> Interval:
    """Mean of the runs' rates, with the wider on each side of two intervals, cut to [0, 1]: t over runs, and Wilson over all trials.

    t alone has no width where every run gives 0 or every run 1; Wilson alone forgets that runs differ. With one run only the
    second is left, and it says nothing of other seeds. Runs without a trial are left out; (NaN, 0, 1) if all are."""
    pairs = [(k, n) for k, n in zip(successes, trials, strict=True) if n]
    if not pairs:
        return Interval(math.nan, 0.0, 1.0)
    over_runs = mean_over_seeds([k / n for k, n in pairs])
    low, high = wilson(sum(k for k, _ in pairs), sum(n for _, n in pairs))
    if len(pairs) > 1:
        low, high = min(low, over_runs.low), max(high, over_runs.high)
    return Interval(over_runs.mean, max(0.0, low), min(1.0, high))
