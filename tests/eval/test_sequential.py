"""Evidence that may be looked at after every episode: its table, its formulas, and how often it errs."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import binom

from vlatune.eval.sequential import compare_in_order, log_e_different, log_e_first_better
from vlatune.eval.statistics import mcnemar_exact


@pytest.mark.parametrize(("only_first", "only_second", "e"), [(12, 3, 4.5), (25, 10, 5.2), (8, 1, 5.7), (10, 0, 93)])
def test_e_values(only_first, only_second, e):
    assert float(np.exp(log_e_different(only_first, only_second))) == pytest.approx(e, abs=0.1)
    assert log_e_different(only_second, only_first) == log_e_different(only_first, only_second)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (12, 3), (3, 12), (40, 40), (60, 0)])
def test_one_sided_evidence_is_the_mean_over_bets(b, c):
    mean, _ = quad(lambda theta: 2 * (2 * theta) ** b * (2 * (1 - theta)) ** c, 0.5, 1)
    assert float(np.exp(log_e_first_better(b, c))) == pytest.approx(mean, rel=1e-6)


def test_evidence_of_thousands_of_pairs_is_finite():
    assert np.isfinite(log_e_different(3000, 1000)) and np.isfinite(log_e_first_better(3000, 1000))
    assert log_e_first_better(0, 5000) < -5
    assert compare_in_order([True] * 5000, [False] * 5000).p_value > 0


def test_looking_after_every_pair_errs_as_rarely_as_stated():
    """Equal policies, 400 pairs, 3,000 times: McNemar's p is below 0.05 at some look far more often than that, the e-value no more
    often reaches 20."""
    draw = np.random.default_rng(0).random((3000, 400))
    b, c = np.cumsum(draw < 0.15, axis=1), np.cumsum(draw > 0.85, axis=1)
    b_BC, c_BC = np.ogrid[: b.max() + 1, : c.max() + 1]  # few different counts: each is looked up
    bound = binom.ppf(0.999, 3000, 0.05) / 3000
    for log_e_BC in (log_e_different(b_BC, c_BC), log_e_first_better(b_BC, c_BC)):
        assert 0.002 < np.mean(log_e_BC[b, c].max(axis=1) >= math.log(20)) <= bound
    p_BC = 2 * binom.cdf(np.minimum(b_BC, c_BC), b_BC + c_BC, 0.5)
    assert np.mean(p_BC[b, c].min(axis=1) < 0.05) > 0.15


def outcomes(
    rng: np.random.Generator, first_T: np.ndarray, second_T: np.ndarray, rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both policies' successes, round after round over the tasks."""
    return rng.random((rounds, len(first_T))) < first_T, rng.random((rounds, len(second_T))) < second_T


def test_tasks_on_which_equal_policies_differ():
    """Each is far better on half of the tasks: going round all tasks and looking after each round errs rarely, while task by task
    the first five look like a proof."""
    rng, times = np.random.default_rng(1), 1000
    first_T = np.array([0.9] * 5 + [0.4] * 5)
    drawn = [outcomes(rng, first_T, first_T[::-1], rounds=30) for _ in range(times)]
    in_rounds = [compare_in_order(a.ravel(), b.ravel(), look_every=10).decided_after is not None for a, b in drawn]
    by_task = [compare_in_order(a.T.ravel(), b.T.ravel()).decided_after is not None for a, b in drawn]
    assert np.mean(in_rounds) <= binom.ppf(0.999, times, 0.05) / times
    assert np.mean(by_task) > 0.9


def test_a_real_difference_is_found_early():
    rng = np.random.default_rng(2)
    first, second = outcomes(rng, np.full(10, 0.5), np.full(10, 0.8), rounds=50)
    found = compare_in_order(first.ravel(), second.ravel(), look_every=10)
    assert found.better == "second" and found.decided_after % 10 == 0 and found.decided_after < 300
    assert found.pairs == 500 and found.only_second > found.only_first
    assert found.p_value == 1 / found.largest_e <= 0.05
    cut = found.decided_after
    assert compare_in_order(first.ravel()[:cut], second.ravel()[:cut], look_every=10).decided_after == cut
    assert compare_in_order(first.ravel()[: cut - 10], second.ravel()[: cut - 10], look_every=10).better is None
    fixed = mcnemar_exact(found.only_first, found.only_second)
    assert fixed < found.p_value, "the price of looking at any time"


def test_without_a_pair_nothing_is_known():
    empty = compare_in_order([], [])
    assert (empty.pairs, empty.p_value, empty.decided_after, empty.better) == (0, 1.0, None, None)


def test_refusals():
    with pytest.raises(ValueError, match="2 and 1 outcomes: a pair needs one of each policy"):
        compare_in_order([True, False], [True])
    with pytest.raises(ValueError, match="alpha lies between 0 and 1"):
        compare_in_order([True], [True], alpha=5)
    with pytest.raises(ValueError, match="look_every is at least 1"):
        compare_in_order([True], [True], look_every=0)
