"""Policies on the same episodes: pairs by task, init state and seed; resampling within tasks; every pair of a set of CSVs.

All functions take frames as `vlatune.eval.results.read` gives them. Episodes that ended in an error take no part.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import numpy as np

from .statistics import holm, mcnemar_exact, mcnemar_mid_p, paired_difference

if TYPE_CHECKING:
    import pandas as pd

TASK = ["benchmark", "suite", "task_id"]
EPISODE = [*TASK, "init_state", "seed"]
"""What two policies must share for their episodes to be a pair."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two policies on the episodes that both ended. Rates and differences (first − second) are shares."""

    pairs: int
    first_rate: float
    second_rate: float
    only_first: int
    """Episodes that the first solved and the second did not."""
    only_second: int
    difference: float
    low: float
    """Of the difference: Tango's score interval, which counts pairs as exchangeable."""
    high: float
    task_difference: float
    """Mean over tasks of each task's difference; the same number where all tasks have equally many pairs."""
    task_low: float
    """Of `task_difference`: the bootstrap that resamples pairs within tasks; NaN where a task has a single pair."""
    task_high: float
    p_exact: float
    """McNemar, exact."""
    p_mid: float
    """McNemar, mid-p."""

    @property
    def discordance(self) -> float:
        """Share of pairs on which the two disagree: what `vlatune power --paired-discordance` asks for."""
        return (self.only_first + self.only_second) / self.pairs


def pair(first: "pd.DataFrame", second: "pd.DataFrame") -> "pd.DataFrame":
    """One row for each episode that both ended: the columns of `EPISODE`, and `first` and `second`, whether each succeeded.

    Raises `ValueError` where a frame holds an episode twice: then it is of several policies or settings."""
    ended = []
    for name, frame in (("first", first), ("second", second)):
        rows = frame.loc[frame["outcome"] != "error", [*EPISODE, "outcome"]]
        twice = rows[rows.duplicated(EPISODE)]
        if len(twice):
            episode = ", ".join(f"{column} {twice.iloc[0][column]}" for column in EPISODE)
            raise ValueError(
                f"the {name} of two policies to compare has two rows of {episode}; give the rows of one checkpoint, actor and "
                "sampling setting"
            )
        ended.append(rows.assign(**{name: rows["outcome"] == "success"}).drop(columns="outcome"))
    return ended[0].merge(ended[1], on=EPISODE, validate="one_to_one")


def compare(
    first: "pd.DataFrame", second: "pd.DataFrame", *, confidence: float = 0.95, num_resamples: int = 9999, seed: int = 0
) -> Comparison:
    """The paired comparison of two policies. Raises what `pair` raises, and `ValueError` where they share no episode."""
    pairs = pair(first, second)
    if pairs.empty:
        raise ValueError(
            "the two policies share no episode that both ended; pairs have the same suite, task, init state and seed"
        )
    difference = pairs["first"].astype(float) - pairs["second"].astype(float)
    only_first, only_second = int((difference > 0).sum()), int((difference < 0).sum())
    by_task = [values.to_numpy() for _, values in difference.groupby([pairs[column] for column in TASK])]
    task_low, task_high = math.nan, math.nan
    if min(map(len, by_task)) > 1:
        task_low, task_high = bootstrap(by_task, confidence=confidence, num_resamples=num_resamples, seed=seed)
    low, high = paired_difference(only_first, only_second, len(pairs), confidence)
    return Comparison(
        pairs=len(pairs),
        first_rate=float(pairs["first"].mean()),
        second_rate=float(pairs["second"].mean()),
        only_first=only_first,
        only_second=only_second,
        difference=(only_first - only_second) / len(pairs),
        low=low,
        high=high,
        task_difference=float(np.mean([values.mean() for values in by_task])),
        task_low=task_low,
        task_high=task_high,
        p_exact=mcnemar_exact(only_first, only_second),
        p_mid=mcnemar_mid_p(only_first, only_second),
    )


def compare_all(
    frame: "pd.DataFrame", by: str, *, confidence: float = 0.95, num_resamples: int = 9999, seed: int = 0
) -> "pd.DataFrame":
    """Every two of the groups in the column `by` (`checkpoint`, `weights_hash`, …) that share an episode, one row a pair: `first`,
    `second`, the fields of `Comparison`, and `p_holm`, the exact p adjusted for all rows of the table. Raises what `pair` raises."""
    import pandas as pd

    groups = {str(name): rows for name, rows in frame.groupby(by, sort=True)}
    lines = []
    for first, second in combinations(groups, 2):
        if pair(groups[first], groups[second]).empty:
            continue
        compared = compare(groups[first], groups[second], confidence=confidence, num_resamples=num_resamples, seed=seed)
        lines.append({"first": first, "second": second} | asdict(compared))
    columns = ["first", "second", *Comparison.__dataclass_fields__]
    table = pd.DataFrame(lines, columns=columns)
    return table.assign(p_holm=holm(table["p_exact"].tolist()))


def success_over_tasks(
    frame: "pd.DataFrame",
    *,
    resampled: Literal["episodes", "tasks"] = "episodes",
    confidence: float = 0.95,
    num_resamples: int = 9999,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean over tasks of the tasks' success rates, and its bootstrap interval (low, high). Raises what `bootstrap` raises."""
    ended = frame[frame["outcome"] != "error"]
    success = (ended["outcome"] == "success").astype(float)
    by_task = [values.to_numpy() for _, values in success.groupby([ended[column] for column in TASK])]
    low, high = bootstrap(by_task, resampled=resampled, confidence=confidence, num_resamples=num_resamples, seed=seed)
    return float(np.mean([values.mean() for values in by_task])), low, high


def bootstrap(
    by_task: Sequence[np.ndarray],
    *,
    resampled: Literal["episodes", "tasks"] = "episodes",
    confidence: float = 0.95,
    num_resamples: int = 9999,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean over tasks of each task's mean; `by_task` has one array of outcomes (or of paired
    differences) a task.

    `episodes` are drawn anew within each task: the interval for these very tasks. Drawing whole `tasks` anew instead is for claims
    about tasks that were not evaluated, and is wider. With n episodes a task the first is too narrow by a factor sqrt(1 - 1/n), and it
    has no width where every task's outcomes are all alike: read Wilson's beside it. Raises `ValueError` where there is nothing to
    draw from."""
    from scipy import stats

    fewest = min(map(len, by_task), default=0)
    if resampled == "tasks" and (len(by_task) < 2 or fewest < 1):
        raise ValueError(
            f"{len(by_task)} task to draw tasks from: at least 2 are needed, each with an episode that ended"
        )
    if resampled == "episodes" and fewest < 2:
        raise ValueError(
            f"a task has {fewest} of its episodes ended: at least 2 are needed to draw episodes within tasks"
        )
    samples = by_task if resampled == "episodes" else [np.array([np.mean(values) for values in by_task])]

    def mean_of_means(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean([values.mean(axis=axis) for values in drawn], axis=0)

    result = stats.bootstrap(
        [np.asarray(values, dtype=float) for values in samples],
        mean_of_means,
        vectorized=True,
        n_resamples=num_resamples,
        batch=1000,  # all resamples at once would take gigabytes for 2,000 episodes
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
