"""Intervals and tests for success rates, from counts alone. Episodes count as exchangeable draws; their tasks are a fixed list.

`eval/comparison.py` counts pairs in the rows of `episodes.csv`, and resamples episodes within their tasks."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np


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


def newcombe(
    first_successes: int, first_episodes: int, second_successes: int, second_episodes: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the difference (first − second) of two rates from independent episodes, as shares in [-1, 1].

    Newcombe's hybrid of the two Wilson intervals (Statistics in Medicine 17, 1998, p. 873, method 10): unlike ± 1.96 standard
    errors it keeps its width at rates of 0 and 1. Pairs of the same init state are another case: `paired_difference`."""
    first_low, first_high = wilson(first_successes, first_episodes, confidence)
    second_low, second_high = wilson(second_successes, second_episodes, confidence)
    if first_episodes == 0 or second_episodes == 0:
        return -1.0, 1.0
    first, second = first_successes / first_episodes, second_successes / second_episodes
    low = first - second - math.hypot(first - first_low, second_high - second)
    return low, first - second + math.hypot(first_high - first, second - second_low)


def paired_difference(only_first: int, only_second: int, pairs: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the difference (first − second) of two policies' rates on the same `pairs` episodes, as shares in [-1, 1].

    Tango's score interval (Statistics in Medicine 17, 1998, p. 891): the differences d with |b - c - n d| <= z sqrt(n (2 q + d (1 - d))),
    q the likeliest share of episodes that the second alone solves if the difference were d. It is to McNemar's test what Wilson's
    is to a rate, and has a width where the policies never disagreed. (-1, 1), nothing known, without a pair."""
    _check_discordant(only_first, only_second)
    if only_first + only_second > pairs:
        raise ValueError(
            f"{only_first} and {only_second} discordant episodes of {pairs} pairs: there are more than pairs"
        )
    if pairs == 0:
        return -1.0, 1.0
    from scipy.optimize import brentq
    from scipy.stats import norm

    b, c, n, z = only_first, only_second, pairs, float(norm.ppf(0.5 + confidence / 2))

    def beyond(d: float) -> float:
        """Negative inside the interval: b/(q+d) + c/q = 2 (n-b-c)/(1-2q-d) solved for q, put into the condition above."""
        linear = (2 * n - b + c) * d - b - c
        root = math.sqrt(max(0.0, linear**2 + 8 * n * c * d * (1 - d)))  # rounding may leave a little below 0
        q = (root - linear) / (4 * n)
        return (b - c - n * d) ** 2 - z**2 * n * (2 * q + d * (1 - d))

    estimate, step = (b - c) / n, 1e-9  # the estimate itself is a second root where its variance is 0
    low = -1.0 if estimate <= step - 1 else brentq(beyond, -1, estimate - step)
    high = 1.0 if estimate >= 1 - step else brentq(beyond, estimate + step, 1)
    return float(low), float(high)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar p-value of two policies on the same episodes (task, init state and seed).

    `only_first` episodes succeeded under the first policy alone, `only_second` under the second alone; those on which both
    agree say nothing about which is better. p = min(1, 2 P[Bin(b + c, 1/2) <= min(b, c)])."""
    _check_discordant(only_first, only_second)
    if only_first + only_second == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)


def mcnemar_mid_p(only_first: int, only_second: int) -> float:
    """`mcnemar_exact` with the observed count weighed half: 2 P[Bin <= min(b, c)] - P[Bin = min(b, c)].

    Closer to its nominal error rate, and less often too cautious, but without the exact test's guarantee (Fagerland, Lydersen and
    Laake, BMC Medical Research Methodology 13:91, 2013)."""
    _check_discordant(only_first, only_second)
    if only_first == only_second:
        return 1.0
    from scipy.stats import binom

    observed = binom.pmf(min(only_first, only_second), only_first + only_second, 0.5)
    return mcnemar_exact(only_first, only_second) - float(observed)


def _check_discordant(only_first: int, only_second: int) -> None:
    if only_first < 0 or only_second < 0:
        raise ValueError(f"counts of discordant episodes are not negative; got {only_first} and {only_second}")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given (Scandinavian Journal of Statistics 6, 1979, p. 65).

    Of m tests the k-th smallest p is multiplied by m - k + 1, then raised to the largest before it. Rejecting those below alpha makes
    a false rejection among all m no likelier than alpha, however the tests depend on each other."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(value) for value in adjusted]
