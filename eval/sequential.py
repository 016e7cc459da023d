"""Comparing two policies while their episodes come in: evidence that may be looked at, and acted on, at any time.

Of b + c discordant pairs (b: the first policy alone succeeded, c: the second alone) each is a fair coin if the policies are equally
good. A bet on the coin's bias multiplies its stake by 2 θ for every b and by 2 (1 - θ) for every c; if the coin is fair no way of
betting is expected to win, so the stake, averaged over bets, ever reaches 1/alpha with probability at most alpha (Ville's
inequality). That average is an e-value: Robbins (Annals of Mathematical Statistics 41, 1970, p. 1397), Shafer (JRSS A 184, 2021, p. 407),
Ramdas et al. (Statistical Science 38, 2023, p. 576).

**Several tasks.** Policies may be equally good over all tasks and differ on each, and then a task's coin is not fair. Looking only
after rounds in which every task had equally many episodes keeps the bound: with λ = 2 θ - 1 and m_t the true difference on task t of
T, and episodes independent of each other, a round's expected factor is Π (1 + λ m_t) <= (1 + λ mean m_t)^T (geometric and arithmetic
mean), which is 1 where the policies are equal on average.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike


def log_e_different(only_first: ArrayLike, only_second: ArrayLike) -> np.ndarray:
    """Logarithm of the evidence against equally good policies: Beta(b + 1, c + 1) 2^(b + c), bets spread evenly over θ in [0, 1]."""
    from scipy.special import betaln

    b, c = np.asarray(only_first, dtype=float), np.asarray(only_second, dtype=float)
    return (b + c) * np.log(2) + betaln(b + 1, c + 1)


def log_e_first_better(only_first: ArrayLike, only_second: ArrayLike) -> np.ndarray:
    """Logarithm of the evidence against the first policy being no better than the second: bets spread evenly over θ in [1/2, 1].

    It is valid wherever the first's rate is at most the second's, not only where they are equal."""
    from scipy.special import betaincc

    b, c = np.asarray(only_first, dtype=float), np.asarray(only_second, dtype=float)
    with np.errstate(divide="ignore"):  # no evidence at all is -inf
        return np.log(2) + log_e_different(b, c) + np.log(betaincc(b + 1, c + 1, 0.5))


@dataclass(frozen=True, kw_only=True)
class SequentialComparison:
    """What the pairs have shown so far."""

    pairs: int
    only_first: int
    only_second: int
    largest_e: float
    """The largest e-value at any look."""
    p_value: float
    """1 / `largest_e`, at most 1: a p-value that stays valid however often it was looked at."""
    decided_after: int | None
    """Pairs after which the e-value first reached 1/alpha: no further episode was needed. None if it has not."""
    better: Literal["first", "second"] | None
    """Which, then, had more successes. None if undecided."""


def compare_in_order(
    first: ArrayLike, second: ArrayLike, *, alpha: float = 0.05, look_every: int = 1
) -> SequentialComparison:
    """The two-sided comparison of two policies' successes on the same episodes, given in the order in which they were run.

    `look_every` is how many pairs make a round: the number of tasks, where episodes go round all tasks in turn. Raises `ValueError`
    unless both have the same number of episodes and alpha is between 0 and 1."""
    solved = [np.asarray(outcomes, dtype=bool) for outcomes in (first, second)]
    if solved[0].shape != solved[1].shape or solved[0].ndim != 1:
        raise ValueError(f"{solved[0].size} and {solved[1].size} outcomes: a pair needs one of each policy")
    if not 0 < alpha < 1 or look_every < 1:
        raise ValueError(
            f"alpha {alpha}, look_every {look_every}: alpha lies between 0 and 1, look_every is at least 1"
        )
    only_first, only_second = np.cumsum(solved[0] & ~solved[1]), np.cumsum(~solved[0] & solved[1])
    looks = np.arange(look_every - 1, solved[0].size, look_every)
    e_values = np.exp(np.minimum(log_e_different(only_first[looks], only_second[looks]), 700.0))  # e^710 is no float
    decided = np.flatnonzero(e_values >= 1 / alpha)
    at = int(looks[decided[0]]) if decided.size else None
    largest = float(e_values.max(initial=1.0))
    return SequentialComparison(
        pairs=solved[0].size,
        only_first=int(only_first[-1]) if solved[0].size else 0,
        only_second=int(only_second[-1]) if solved[0].size else 0,
        largest_e=largest,
        p_value=1 / largest,
        decided_after=None if at is None else at + 1,
        better=None if at is None else "first" if only_first[at] > only_second[at] else "second",
    )
