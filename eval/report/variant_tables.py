"""Tables over the variants of several runs: what variants.csv, comparisons.csv and candidates.csv hold, and small ones for the page."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from ..comparison import compare_all
from ..results import sampling_setting, success_by
from .candidates import by_candidate, candidate_names
from .tables import mean_policy_ms, time_parts
from .variants import Variant

COUNTS = ["episodes", "successes", "errors", "success_rate", "low", "high"]
NO_OBJECTIVE = "not recorded"


def variants_table(variants: Sequence[Variant]) -> pd.DataFrame:
    """A row a variant: what it is, its success with Wilson's interval (over all and by suite), what it costs and how it moves.

    `policy_ms` is the mean forward of a decision, of a whole batch where the sweep batched; `episode_s` adds up the episodes' own
    seconds, whatever the number of workers, and `episodes_per_h` is of one worker, recorded episodes left out."""
    return pd.DataFrame([_row(variant) for variant in variants]).astype({"num_candidates": "Int64"})


def records(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """The rows, with None where a value is missing."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def _row(variant: Variant) -> dict[str, object]:
    judged, candidate = variant.judged, variant.candidate
    ended = judged[judged["outcome"] != "error"]
    unrecorded = ended.loc[ended["video"] == "", "wall_s"]
    overall = success_by(judged, "run").iloc[0]
    by_suite = success_by(judged, "suite").set_index("suite")
    return {
        "variant": variant.name,
        **{name: candidate[name] for name in ("checkpoint", "step", "weights_hash")},
        "objective": objective_of(variant),
        **{name: candidate[name] for name in ("sampling", "num_sampling_steps", "num_executed_steps")},
        "protocol": judged["protocol"].iloc[0],
        "half": variant.half,
        "basis": variant.basis,
        "num_candidates": variant.num_candidates,
        **{name: overall[name] for name in COUNTS},
        **{
            f"{column}_{suite}": row[column]
            for suite, row in by_suite.iterrows()
            for column in ("episodes", "success_rate", "low", "high")
        },
        "policy_ms": mean_policy_ms(ended),
        "batch_size": judged["batch_size"].max(),
        "device": judged["device"].iloc[0],
        "episode_s": ended["wall_s"].sum(),
        "episodes_per_h": 3600 / unrecorded.mean() if len(unrecorded) else None,
        "median_steps_to_success": ended["steps_to_success"].astype(float).median(),
        "smoothness": ended["smoothness"].mean(),
        "action_saturation": ended["action_saturation"].mean(),
    }


def objective_of(variant: Variant) -> str:
    return str(sampling_setting(variant.judged, "objective").iloc[0] or NO_OBJECTIVE)


def judged_rows(variants: Sequence[Variant]) -> pd.DataFrame:
    """The episodes by which the variants are judged, with the column `variant`."""
    return pd.concat([variant.judged.assign(variant=variant.name) for variant in variants], ignore_index=True)


def in_order(table: pd.DataFrame, variants: Sequence[Variant]) -> pd.DataFrame:
    """The table's rows in the order in which the runs were given."""
    order = [variant.name for variant in variants]
    return table.sort_values("variant", key=lambda names: names.map(order.index), kind="stable", ignore_index=True)


def by_suite(variants: Sequence[Variant]) -> pd.DataFrame:
    """Success of each variant on each suite."""
    return in_order(success_by(judged_rows(variants), ["suite", "variant"]), variants)


def by_task(variants: Sequence[Variant]) -> pd.DataFrame:
    return success_by(judged_rows(variants), ["suite", "task_id", "task_language", "variant"])


def comparisons(variants: Sequence[Variant]) -> pd.DataFrame:
    """Every two variants on the episodes that both ended: what `comparison.compare_all` gives."""
    return compare_all(judged_rows(variants), "variant")


def unpaired(variants: Sequence[Variant], compared: pd.DataFrame) -> list[tuple[str, str]]:
    """Those two and two that share no episode."""
    pairs = {frozenset(pair) for pair in zip(compared["first"], compared["second"], strict=True)}
    names = [variant.name for variant in variants]
    every = [(first, second) for k, first in enumerate(names) for second in names[k + 1 :]]
    return [pair for pair in every if frozenset(pair) not in pairs]


def candidates_table(variants: Sequence[Variant]) -> pd.DataFrame:
    """Every candidate of every run on the half on which it was chosen, over all suites (`suite` empty) and by suite."""
    tables = []
    for variant in variants:
        for also in ([], ["suite"]):
            table = by_candidate(variant.selection, also)
            table.insert(0, "variant", variant.name)
            table.insert(1, "candidate", candidate_names(table))
            tables.append(table)
    front = ["variant", "candidate", "checkpoint", "step", "weights_hash", "sampling"]
    front += ["num_sampling_steps", "num_executed_steps", "suite"]
    return pd.concat(tables, ignore_index=True)[[*front, *COUNTS]]


def time_by_variant(variants: Sequence[Variant]) -> pd.DataFrame:
    """Mean seconds of an episode, a row a variant and a column a part; variants whose every episode was recorded have none."""
    means = {variant.name: time_parts(variant.judged).mean() for variant in variants}
    return pd.DataFrame(means).T.dropna(how="all").rename_axis("variant").reset_index()


def failure_modes(variants: Sequence[Variant]) -> pd.DataFrame:
    """Counts: a row a variant, a column a failure mode (the most frequent first), and `episodes`, how many ended."""
    rows = judged_rows(variants)
    failed = rows[rows["outcome"] == "failure"]
    counts = pd.crosstab(failed["variant"], failed["failure_mode"].str.replace("_", " ").replace("", "not said"))
    counts = counts.reindex([variant.name for variant in variants], fill_value=0)
    counts = counts[counts.sum().sort_values(ascending=False, kind="stable").index]
    ended = rows[rows["outcome"] != "error"].groupby("variant").size()
    return counts.assign(episodes=ended).rename_axis("variant").reset_index()


def by_objective(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the variants of each objective, from `variants_table`."""
    numbers = ["success_rate", "policy_ms", "smoothness", "action_saturation", "median_steps_to_success"]
    grouped = table.astype(dict.fromkeys(numbers, float)).groupby("objective", sort=True)
    return grouped.agg(variants=("variant", "size"), **{name: (name, "mean") for name in numbers}).reset_index()


def controls_table(variants: Sequence[Variant]) -> pd.DataFrame:
    """Success of every control that a run has: columns variant, actor and `success_by`'s."""
    rows = pd.concat([variant.controls.assign(variant=variant.name) for variant in variants], ignore_index=True)
    return in_order(success_by(rows, ["variant", "actor"]), variants)
