"""Intervals, McNemar and Holm against published tables."""

import numpy as np
import pytest
from scipy.stats import multinomial

from vlatune.eval.statistics import (
    clopper_pearson,
    holm,
    mcnemar_exact,
    mcnemar_mid_p,
    newcombe,
    paired_difference,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        (10, 10, 72.2, 100),
        (18, 20, 69.9, 97.2),
        (45, 50, 78.6, 95.7),
        (50, 50, 92.9, 100),
        (450, 500, 87.1, 92.3),
        (475, 500, 92.7, 96.6),
        (490, 500, 96.4, 98.9),
        (1940, 2000, 96.2, 97.7),
        (0, 10, 0, 27.8),
    ],
)
def test_wilson(successes, episodes, low, high):
    assert [round(100 * bound, 1) for bound in wilson(successes, episodes)] == [low, high]


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [(10, 10, 69.2, 100), (18, 20, 68.3, 98.8), (490, 500, 96.4, 99.0), (0, 10, 0, 30.8)],
)
def test_clopper_pearson(successes, episodes, low, high):
    assert [round(100 * bound, 1) for bound in clopper_pearson(successes, episodes)] == [low, high]


def test_no_episode_says_nothing():
    assert wilson(0, 0) == clopper_pearson(0, 0) == (0.0, 1.0)


def test_more_successes_than_episodes():
    with pytest.raises(ValueError, match="3 successes of 2 episodes"):
        wilson(3, 2)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(12, 3, 0.035), (20, 10, 0.099), (30, 15, 0.036), (25, 10, 0.017), (8, 1, 0.039), (0, 0, 1.0), (4, 4, 1.0)],
)
def test_mcnemar_exact(only_first, only_second, p):
    assert round(mcnemar_exact(only_first, only_second), 3) == p
    assert mcnemar_exact(only_first, only_second) == mcnemar_exact(only_second, only_first)


def test_mcnemar_refuses_negative_counts():
    with pytest.raises(ValueError, match="not negative"):
        mcnemar_exact(-1, 3)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(12, 3, 0.021), (20, 10, 0.071), (30, 15, 0.026), (25, 10, 0.011), (8, 1, 0.021), (0, 0, 1.0), (4, 4, 1.0)],
)
def test_mcnemar_mid_p(only_first, only_second, p):
    assert round(mcnemar_mid_p(only_first, only_second), 3) == p
    assert mcnemar_mid_p(only_first, only_second) == mcnemar_mid_p(only_second, only_first)


def test_newcombe():
    """The first example of Newcombe's paper: 56 of 70 against 48 of 80."""
    assert [round(bound, 4) for bound in newcombe(56, 70, 48, 80)] == [0.0524, 0.3339]
    low, high = newcombe(50, 50, 50, 50)
    assert low < -0.05 and high > 0.05, "rates of 1 are not known to the last digit"
    assert newcombe(1, 1, 0, 0) == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("only_first", "only_second", "pairs", "low", "high"),
    [(12, 2, 50, 0.061, 0.345), (1, 7, 21, -0.517, -0.026)],  # Tango 1998; Fagerland, Lydersen and Laake 2014
)
def test_paired_difference(only_first, only_second, pairs, low, high):
    assert [round(bound, 3) for bound in paired_difference(only_first, only_second, pairs)] == [low, high]


def test_paired_difference_of_every_small_table():
    for pairs in (1, 2, 7, 30):
        for only_first in range(pairs + 1):
            for only_second in range(pairs + 1 - only_first):
                low, high = paired_difference(only_first, only_second, pairs)
                assert -1 <= low <= (only_first - only_second) / pairs <= high <= 1 and low < high
                assert paired_difference(only_second, only_first, pairs) == pytest.approx((-high, -low))
    assert paired_difference(0, 0, 0) == (-1.0, 1.0)


@pytest.mark.parametrize(("first_only", "second_only"), [(0.06, 0.03), (0.2, 0.1), (0.02, 0.02)])
def test_paired_difference_covers_the_truth(first_only, second_only):
    """Over all outcomes of 60 pairs, each with its probability."""
    pairs, covered = 60, 0.0
    for b in range(pairs + 1):
        for c in range(pairs + 1 - b):
            weight = multinomial.pmf(
                [b, c, pairs - b - c], pairs, [first_only, second_only, 1 - first_only - second_only]
            )
            if weight > 1e-6:
                low, high = paired_difference(b, c, pairs)
                covered += weight * (low <= first_only - second_only <= high)
    assert 0.93 < covered < 0.985


def test_paired_difference_refuses():
    with pytest.raises(ValueError, match="5 and 6 discordant episodes of 10 pairs"):
        paired_difference(5, 6, 10)
    with pytest.raises(ValueError, match="not negative"):
        paired_difference(5, -1, 10)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_bounds_any_false_rejection():
    """Twenty true hypotheses: without adjusting, some p is below 0.05 nearly two times in three."""
    p_values = np.random.default_rng(0).random((2000, 20))
    assert np.mean([min(holm(list(p))) < 0.05 for p in p_values]) < 0.065
    assert np.mean(p_values.min(axis=1) < 0.05) > 0.6
