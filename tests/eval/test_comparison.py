"""Pairs by task, init state and seed; the bootstrap against the distribution that it draws from."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from vlatune.eval.comparison import bootstrap, compare, compare_all, pair, success_over_tasks
from vlatune.eval.statistics import mcnemar_exact, wilson


def episodes(solved_by_task: list[list[bool]], checkpoint: str = "a", seed: int = 0) -> pd.DataFrame:
    """Init state k of task t ended as `solved_by_task[t][k]`."""
    return pd.DataFrame(
        [
            {
                "benchmark": "libero",
                "suite": "libero_spatial",
                "task_id": task_id,
                "init_state": init_state,
                "seed": seed,
                "checkpoint": checkpoint,
                "outcome": "success" if success else "failure",
            }
            for task_id, solved in enumerate(solved_by_task)
            for init_state, success in enumerate(solved)
        ]
    )


def test_only_the_same_episode_is_a_pair():
    first = episodes([[True, True, False], [False, True, True]])
    second = episodes([[True, False], [True, True, True, True]]).sample(frac=1, random_state=1)
    second.loc[(second["task_id"] == 1) & (second["init_state"] == 2), "outcome"] = "error"
    pairs = pair(first, second).set_index(["task_id", "init_state"])
    assert dict(zip(pairs.index, zip(pairs["first"], pairs["second"], strict=True), strict=True)) == {
        (0, 0): (True, True),
        (0, 1): (True, False),
        (1, 0): (False, True),
        (1, 1): (True, True),
    }
    assert pair(first, second.assign(seed=1)).empty, "another seed is another episode"


def test_compare():
    """12 episodes that only the first solved, 3 that only the second did, of 100 on 2 tasks."""
    first = [[True] * 40 + [False] * 10, [True] * 45 + [False] * 5]
    second = [[True] * 33 + [False] * 7 + [True] * 2 + [False] * 8, [True] * 40 + [False] * 5 + [True] + [False] * 4]
    found = compare(episodes(first), episodes(second))
    assert (found.pairs, found.only_first, found.only_second) == (100, 12, 3)
    assert (found.first_rate, found.second_rate) == (0.85, 0.76)
    assert found.difference == pytest.approx(0.09) == found.task_difference
    assert found.discordance == 0.15
    assert round(found.p_exact, 3) == 0.035 and round(found.p_mid, 3) == 0.021
    assert 0 < found.low < 0.09 < found.high < 0.2
    assert abs(found.task_low - found.low) < 0.02 and abs(found.task_high - found.high) < 0.02
    assert compare(episodes(first), episodes(second)) == found, "seeded"
    back = compare(episodes(second), episodes(first))
    assert back.difference == -found.difference and back.p_exact == found.p_exact
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_tasks_count_alike_in_the_difference_over_tasks():
    found = compare(episodes([[True] * 2, [True] * 6]), episodes([[False] * 2, [True] * 6]))
    assert (found.difference, found.task_difference) == (0.25, 0.5)
    single = compare(episodes([[True], [True] * 6]), episodes([[False], [True] * 6]))
    assert math.isnan(single.task_low) and math.isnan(single.task_high), "one pair has nothing to be resampled"


def test_compare_refuses():
    both = pd.concat([episodes([[True]], "a"), episodes([[False]], "b")])
    with pytest.raises(ValueError, match="the second of two policies to compare has two rows of .*init_state 0"):
        compare(episodes([[True]]), both)
    with pytest.raises(ValueError, match="share no episode"):
        compare(episodes([[True]]), episodes([[True]], seed=3))


def test_every_pair_of_checkpoints_with_holm():
    rng = np.random.default_rng(0)
    solved = {name: rng.random((4, 25)) < rate for name, rate in (("a", 0.5), ("b", 0.55), ("c", 0.95))}
    elsewhere = episodes([[True] * 3], "d", seed=9)
    frame = pd.concat([*(episodes(outcomes.tolist(), name) for name, outcomes in solved.items()), elsewhere])
    table = compare_all(frame, "checkpoint", num_resamples=200)
    assert list(zip(table["first"], table["second"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]
    exact = [
        mcnemar_exact(int((solved[i] & ~solved[j]).sum()), int((~solved[i] & solved[j]).sum()))
        for i, j in ("ab", "ac", "bc")
    ]
    assert table["p_exact"].tolist() == exact
    ranked = sorted(exact)
    by_hand = {ranked[0]: 3 * ranked[0], ranked[1]: max(3 * ranked[0], 2 * ranked[1]), ranked[2]: ranked[2]}
    assert table["p_holm"].tolist() == pytest.approx([by_hand[p] for p in exact])
    assert compare_all(elsewhere, "checkpoint").empty


def test_bootstrap_draws_within_tasks():
    """The mean over tasks of resampled rates is a sum of binomials: its quantiles are known."""
    successes, n = [25, 20, 12, 3], 25
    distribution = np.ones(1)
    for k in successes:
        distribution = np.convolve(distribution, binom.pmf(np.arange(n + 1), n, k / n))
    quantile = np.searchsorted(np.cumsum(distribution), [0.025, 0.975]) / (n * len(successes))
    by_task = [np.arange(n) < k for k in successes]
    assert bootstrap(by_task) == pytest.approx(tuple(quantile), abs=0.0101)  # one episode is 0.01
    low, high = wilson(sum(successes), n * len(successes))
    assert np.diff(quantile) < 0.9 * (high - low), (
        "tasks that differ make pooled episodes look more random than they are"
    )
    new_low, new_high = bootstrap(by_task, resampled="tasks")
    assert new_low < low and new_high > high, "for other tasks than these little is known"


def test_success_over_tasks():
    frame = episodes([[True] * 8 + [False] * 2, [True] * 2 + [False] * 2])
    frame.loc[0, "outcome"] = "error"
    rate, low, high = success_over_tasks(frame)
    assert rate == pytest.approx((7 / 9 + 1 / 2) / 2)
    assert low < rate < high
    assert (rate, low, high) == success_over_tasks(frame.sample(frac=1, random_state=0)), "rows have no order"


def test_bootstrap_refuses():
    with pytest.raises(ValueError, match="a task has 1 of its episodes ended: at least 2"):
        bootstrap([np.ones(3), np.ones(1)])
    with pytest.raises(ValueError, match="1 task to draw tasks from: at least 2"):
        bootstrap([np.ones(3)], resampled="tasks")
