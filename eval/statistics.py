"""Intervals and tests for success rates. Episodes count as exchangeable draws; their tasks are a fixed list."""

from typing import Literal


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a success rate, as shares in [0, 1]. (0, 1), nothing known, without an episode."""
    return _interval(successes, episodes, confidence, "wilson")


def clopper_pearson(successes: int, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact (conservative) interval of a success rate, as shares in [0, 1]."""
    return _interval(successes, episodes, confidence, "exact")


def _interval(
    successes: int, episodes: int, confidence: float, method: Literal["wilson", "exact"]
) -> tuple[float, float]:
    if episodes == 0 and successes == 0:
        return 0.0, 1.0
    if not 0 <= successes <= episodes:
        raise ValueError(f"{successes} successes of {episodes} episodes: successes lie between 0 and the episodes")
    from scipy.stats import binomtest

    interval = binomtest(successes, episodes).proportion_ci(confidence_level=confidence, method=method)
    return float(interval.low), float(interval.high)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar p-value of two policies on the same episodes (task, init state and seed).

    `only_first` episodes succeeded under the first policy alone, `only_second` under the second alone; those on which both
    agree say nothing about which is better. p = min(1, 2 P[Bin(b + c, 1/2) <= min(b, c)])."""
    if only_first < 0 or only_second < 0:
        raise ValueError(f"counts of discordant episodes are not negative; got {only_first} and {only_second}")
    if only_first + only_second == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)
