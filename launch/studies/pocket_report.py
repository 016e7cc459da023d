"""A pocket study's summary, paired comparisons, figure and findings, made from its rows and the episodes behind them."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.figure import Figure

from ...data.files import write_whole
from ...data.plotting import INK
from ...eval.statistics import holm, mcnemar_exact, wilson
from .figures import save_figure
from .intervals import Interval, mean_over_seeds, rate_over_seeds
from .prose import percent, rates
from .tables import write_csv

if TYPE_CHECKING:
    import pandas as pd

SAME_EPISODE = ["task_id", "init_state", "seed"]
"""Columns of episodes.csv that say which world a policy was put in; `seed` here is the simulator's."""


class Arm(NamedTuple):
    """One side of a comparison: the runs of all training seeds that differ in nothing else."""

    order: tuple[int, ...]
    """Arms are listed by it."""
    name: str
    """In tables."""
    label: str
    """In the figure and in findings."""
    colour: str


Episodes = Mapping[tuple[str, int], "pd.DataFrame"]
"""(run, executed steps) -> its judged episodes."""


def write_report(
    out: Path,
    records: Sequence[Mapping[str, Any]],
    episodes: Episodes,
    *,
    arm_of: Callable[[Mapping[str, Any]], Arm],
    question: str,
    remarks: Sequence[str] = (),
) -> None:
    """summary.csv, pairs.csv, figure.png and findings.md."""
    arms = sorted({arm_of(record) for record in records})
    by_arm = {arm: [record for record in records if arm_of(record) == arm] for arm in arms}
    success = {
        arm: rate_over_seeds([r["successes"] for r in rows], [r["episodes"] for r in rows])
        for arm, rows in by_arm.items()
    }
    write_csv(out / "summary.csv", [summary_line(arm, by_arm[arm], success[arm]) for arm in arms])
    pairs = compare(by_arm, episodes)
    if pairs:
        write_csv(out / "pairs.csv", pairs)
    size_in = (6.8, 1.1 + 0.5 * len(arms))
    save_figure(out / "figure.png", size_in, lambda figure: _draw(figure, by_arm, success))
    write_whole(out / "findings.md", (findings(question, by_arm, success, pairs, remarks) + "\n").encode())


def summary_line(arm: Arm, rows: Sequence[Mapping[str, Any]], success: Interval) -> dict[str, Any]:
    """Columns of summary.csv: the arm, how many seeds; successes, episodes and errors of all of them together with `pooled`, their
    rate, and its Wilson interval, for which episodes count as exchangeable; `success`, the mean over seeds, with the wider on
    each side of that interval and Student's t over seeds."""
    successes, ended = sum(row["successes"] for row in rows), sum(row["episodes"] for row in rows)
    low, high = wilson(successes, ended)
    return {
        "arm": arm.name,
        "seeds": len(rows),
        "successes": successes,
        "episodes": ended,
        "errors": sum(row["errors"] for row in rows),
        "pooled": successes / ended if ended else None,
        "pooled_low": low,
        "pooled_high": high,
        "success": success.mean,
        "success_low": success.low,
        "success_high": success.high,
    }


def compare(by_arm: Mapping[Arm, Sequence[Mapping[str, Any]]], episodes: Episodes) -> list[dict[str, Any]]:
    """Columns of pairs.csv, one row for two arms: seeds and episodes that both have; how many succeeded under one alone; the
    difference of the success rates (first minus second). `seed_difference` is its mean over training seeds, with Student's t
    interval: about training again. `mcnemar_p` is the exact paired test over these episodes, same init state and same
    training seed: about these weights. `holm_p` is it, adjusted for all pairs."""
    lines: list[dict[str, Any]] = []
    for first, second in combinations(by_arm, 2):
        rows = [{row["seed"]: row for row in by_arm[arm]} for arm in (first, second)]
        seeds = sorted(rows[0].keys() & rows[1].keys())
        only_first = only_second = together = 0
        differences = []
        for seed in seeds:
            a, b = (_outcomes(episodes[of[seed]["run"], of[seed]["num_executed_steps"]]) for of in rows)
            both = a.index.intersection(b.index)
            a, b = a[both], b[both]
            only_first, only_second = only_first + int((a & ~b).sum()), only_second + int((b & ~a).sum())
            together += len(both)
            if len(both):
                differences.append(float(a.mean() - b.mean()))
        if not differences:
            continue
        over_seeds = mean_over_seeds(differences)
        lines.append(
            {
                "first": first.name,
                "second": second.name,
                "seeds": len(differences),
                "episodes": together,
                "only_first": only_first,
                "only_second": only_second,
                "difference": (only_first - only_second) / together,
                "seed_difference": over_seeds.mean,
                "seed_difference_low": over_seeds.low,
                "seed_difference_high": over_seeds.high,
            }
        )
    p_values = [mcnemar_exact(line["only_first"], line["only_second"]) for line in lines]
    for line, p_value, adjusted in zip(lines, p_values, holm(p_values), strict=True):
        line |= {"mcnemar_p": p_value, "holm_p": adjusted}
    return lines


def _outcomes(episodes: "pd.DataFrame") -> "pd.Series":
    """Success of each episode that ended, by what makes two episodes the same."""
    ended = episodes[episodes["outcome"] != "error"]
    return (ended.set_index(SAME_EPISODE)["outcome"] == "success").astype(bool)


def findings(
    question: str,
    by_arm: Mapping[Arm, Sequence[Mapping[str, Any]]],
    success: Mapping[Arm, Interval],
    pairs: Sequence[Mapping[str, Any]],
    remarks: Sequence[str] = (),
) -> str:
    """One paragraph, every number from the rows; the study's own `remarks` end it."""
    labels = {arm.name: arm.label for arm in by_arm}
    seeds = max(len(rows) for rows in by_arm.values())
    episodes = max(row["episodes"] for rows in by_arm.values() for row in rows)
    counted = f"{seeds} training seed{'s' if seeds > 1 else ''} of {episodes} episodes each"
    all_rates = rates({arm.label: interval for arm, interval in success.items()})
    sentences = [f"{question} Success over {counted}, mean with its 95 % interval: {all_rates}."]
    told_apart = [pair for pair in pairs if pair["holm_p"] < 0.05]
    for pair in told_apart:
        better, worse = (pair["first"], pair["second"]) if pair["difference"] > 0 else (pair["second"], pair["first"])
        bounds = sorted(abs(pair[f"seed_difference_{end}"]) for end in ("low", "high"))
        over_seeds = f"over training seeds {percent(bounds[0])} to {percent(bounds[1])}"
        if pair["seeds"] == 1:
            over_seeds = "one training seed"
        elif pair["seed_difference_low"] <= 0 <= pair["seed_difference_high"]:
            over_seeds = "the interval over training seeds includes 0"
        sentences.append(
            f"On the same episodes {labels[better]} succeeds in {percent(abs(pair['difference']))} more than {labels[worse]} "
            f"(McNemar's test with Holm's adjustment, p = {pair['holm_p']:.2g}; {over_seeds})."
        )
    if len(told_apart) < len(pairs):
        sentences.append(f"Not told apart at 5 %: {len(pairs) - len(told_apart)} of {len(pairs)} pairs.")
    return " ".join([*sentences, *remarks])


def _draw(figure: Figure, by_arm: Mapping[Arm, Sequence[Mapping[str, Any]]], success: Mapping[Arm, Interval]) -> None:
    axes = figure.add_subplot()
    for place, (arm, rows) in enumerate(by_arm.items()):
        mean, low, high = (100 * value for value in success[arm])
        if not math.isnan(mean):
            axes.barh([place], [mean], color=arm.colour, height=0.55, alpha=0.85)
            axes.errorbar(
                [mean], [place], xerr=[[mean - low], [high - mean]], fmt="none", ecolor=INK, elinewidth=1.2, capsize=4
            )
        rates_of_runs = [100 * row["success_rate"] for row in rows if row["success_rate"] is not None]
        axes.plot(rates_of_runs, [place] * len(rates_of_runs), "o", color="white", mec=INK, ms=4.5, zorder=4)
    axes.set_yticks(range(len(by_arm)), [arm.label for arm in by_arm])
    axes.invert_yaxis()
    axes.set(xlabel="success, % (mean over seeds, 95 % interval; circles: seeds)", xlim=(0, 102))
    axes.grid(axis="y", visible=False)
