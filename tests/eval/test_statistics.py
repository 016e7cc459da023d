"""Intervals and McNemar against published tables."""

import pytest

from vlatune.eval.statistics import clopper_pearson, mcnemar_exact, wilson


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
