"""The numbers of the report: from the rows of `episodes.csv` to small tables, each a DataFrame or a plain value."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ...data.episodes import DataError
from ..comparison import pair
from ..results import locate, read, success_by
from ..statistics import mcnemar_exact
from .candidates import CANDIDATE, by_candidate, candidate_names, of_candidate, of_candidate_and_controls, of_settings

SETTINGS = ["benchmark", "protocol", "max_steps", "num_settle_steps", "image_px", "seed"]
POLICY_SETTINGS = ["sampling", "num_sampling_steps", "num_executed_steps", "horizon", "batch_size", "device"]
VERSIONS = ["mujoco", "robosuite", "libero", "torch", "vlatune", "renderer"]
NAMES = {
    "policy": "policy",
    "untrained": "untrained (step 0)",
    "blind": "blind (black images)",
    "wrong_instruction": "wrong instruction",
    "scripted": "scripted expert (true poses)",
    "zero": "no motion",
    "random": "random actions",
}
"""Actors as the report calls them, in its order."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One run's sweep, read from its folder."""

    folder: Path
    rows: pd.DataFrame
    """Episodes under the protocol and seed of the choice (of the latest episode, where none has been made yet)."""
    num_other_rows: int
    """Episodes in the file under another protocol or seed."""
    chosen: Mapping[str, Any] | None
    """`chosen.json`; None while the sweep has not come that far."""
    metrics: pd.DataFrame | None
    """The training curve; None where no metrics.csv lies in the folder above."""

    @property
    def name(self) -> str:
        return str(self.rows["run"].iloc[0])

    @property
    def selection(self) -> pd.DataFrame:
        """Every candidate on the selection half."""
        return self.rows[(self.rows["split"] == "selection") & (self.rows["actor"] == "policy")]

    @property
    def candidate(self) -> Mapping[str, Any] | None:
        """Weights and settings of the chosen candidate."""
        return {"weights_hash": self.chosen["weights_hash"], **self.chosen["settings"]} if self.chosen else None

    @property
    def over_training(self) -> pd.DataFrame:
        """Every checkpoint on the selection half, sampled as the chosen candidate was (as the latest, where none is chosen yet)."""
        if self.selection.empty:
            return self.selection
        return self.selection[of_settings(self.selection, self.candidate or self.selection.iloc[-1].to_dict())]

    @property
    def judged(self) -> pd.DataFrame:
        """The report half: the chosen candidate, its controls and the baselines."""
        report = self.rows[self.rows["split"] == "report"]
        if self.candidate is None:
            return report.iloc[:0]
        return report[of_candidate_and_controls(report, self.candidate)]

    def judged_as(self, actor: str) -> pd.DataFrame:
        return self.judged[self.judged["actor"] == actor]


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation of a run folder (or of an evaluation folder). Raises `DataError` if no sweep has written there."""
    folder = locate(path).parent
    rows = read(folder)
    if rows.empty:
        raise DataError(f"{folder / 'episodes.csv'} has no episode yet; `vlatune sweep {path}` runs them")
    chosen_file, metrics_file = folder / "chosen.json", folder.parent / "metrics.csv"
    chosen = json.loads(chosen_file.read_text()) if chosen_file.is_file() else None
    metrics = pd.read_csv(metrics_file) if metrics_file.is_file() else None
    kept = same_protocol(rows, chosen)
    return Evaluation(folder=folder, rows=kept, num_other_rows=len(rows) - len(kept), chosen=chosen, metrics=metrics)


def same_protocol(rows: pd.DataFrame, chosen: Mapping[str, Any] | None) -> pd.DataFrame:
    """The rows under the protocol, with what overrides it, and the seed of the choice (else: of the latest policy row)."""
    of_policy = rows[rows["weights_hash"] != ""]
    if chosen is None and of_policy.empty:
        return rows
    settings = chosen["settings"] if chosen else of_policy.iloc[-1]
    kept = rows[(rows["protocol"] == settings["protocol"]) & (rows["seed"] == settings["seed"])]
    rules = ["max_steps", "num_settle_steps", "image_px"]  # they differ by suite
    latest = kept[kept["weights_hash"] != ""].groupby("suite")[rules].last()
    protocols = (chosen or {}).get("protocols") or latest.to_dict("index")
    fits = [
        all(row[rule] == protocols[row["suite"]][rule] for rule in rules) if row["suite"] in protocols else True
        for row in kept[["suite", *rules]].to_dict("records")
    ]
    return kept[pd.Series(fits, index=kept.index, dtype=bool)]


def candidates(evaluation: Evaluation) -> pd.DataFrame:
    """Success of each candidate on the selection half, over all tasks: `CANDIDATE`, `success_by`'s columns, `name` and `chosen`."""
    table = by_candidate(evaluation.selection)
    chosen = of_candidate(table, evaluation.candidate) if evaluation.candidate else False
    return table.assign(name=candidate_names(table), chosen=chosen)


def by_checkpoint(evaluation: Evaluation) -> pd.DataFrame:
    """Those of `candidates` that were sampled as the chosen one."""
    return by_candidate(evaluation.over_training)


def by_candidate_and_task(evaluation: Evaluation) -> pd.DataFrame:
    return by_candidate(evaluation.selection, ["suite", "task_id", "task_language"])


def by_actor(evaluation: Evaluation) -> pd.DataFrame:
    """Success of the chosen candidate, its controls and baselines on the report half, each beside the policy's pairs:
    columns `pairs`, `only_policy`, `only_other` (episodes that only one of them solved) and `p_value` (McNemar, exact)."""
    table = success_by(evaluation.judged, "actor")
    order = list(NAMES)
    table = table.sort_values("actor", key=lambda actors: actors.map(order.index), ignore_index=True)
    policy = evaluation.judged_as("policy")
    columns: dict[str, list[float]] = {"pairs": [], "only_policy": [], "only_other": [], "p_value": []}
    for actor in table["actor"]:
        both = pair(policy, evaluation.judged_as(actor))
        only_policy = int((both["first"] & ~both["second"]).sum())
        only_other = int((~both["first"] & both["second"]).sum())
        found = (len(both), only_policy, only_other, mcnemar_exact(only_policy, only_other))
        for values, value in zip(columns.values(), found, strict=True):
            values.append(value)
    return table.assign(**columns)


def by_task(evaluation: Evaluation) -> pd.DataFrame:
    """Success of each actor on each task of the report half."""
    return success_by(evaluation.judged, ["suite", "task_id", "task_language", "actor"])


def by_suite(evaluation: Evaluation) -> list[dict[Any, Any]]:
    """Success of the chosen candidate on each suite of the report half; empty where there is one suite only."""
    table = success_by(evaluation.judged_as("policy"), "suite")
    return table.to_dict("records") if len(table) > 1 else []


def failure_modes(evaluation: Evaluation) -> pd.DataFrame:
    """Rows: failure modes; columns: actors; counts on the report half."""
    failed = evaluation.judged[evaluation.judged["outcome"] == "failure"]
    table = pd.crosstab(failed["failure_mode"].str.replace("_", " "), failed["actor"])
    return table[[actor for actor in NAMES if actor in table]]


def time_parts(rows: pd.DataFrame) -> pd.DataFrame:
    """Seconds of each episode by what they were spent on, a column a part. Recorded episodes are left out: they render every step."""
    rows = rows[(rows["outcome"] != "error") & (rows["video"] == "") & (rows["weights_hash"] != "")]
    decisions = rows["num_decisions"].astype(float)
    parts = pd.DataFrame(
        {
            "policy": decisions * rows["policy_ms_mean"] / 1000,
            "waiting for it": decisions * rows["queue_ms"] / 1000,
            "physics": rows["sim_s"],
            "rendering": rows["render_s"],
        }
    )
    return parts.assign(other=(rows["wall_s"] - parts.sum(axis=1)).clip(lower=0))


def time_split(rows: pd.DataFrame) -> dict[str, float]:
    """Mean of `time_parts`; empty where every episode was recorded."""
    parts = time_parts(rows)
    return {str(name): float(seconds) for name, seconds in parts.mean().items()} if len(parts) else {}


def mean_policy_ms(rows: pd.DataFrame) -> float:
    """Mean forward of a decision; NaN where no policy was asked."""
    asked = rows.dropna(subset=["policy_ms_mean", "num_decisions"])
    decisions = asked["num_decisions"].astype(float)
    return float((asked["policy_ms_mean"] * decisions).sum() / decisions.sum()) if decisions.sum() else math.nan


def summary(evaluation: Evaluation) -> pd.DataFrame:
    """`summary.csv`: success of every split, actor and candidate, over all tasks (`task_id` empty) and by task."""
    rows = pd.concat([evaluation.selection, evaluation.judged])
    who = ["run", "benchmark", "suite", "split", "actor", *CANDIDATE]
    parts = [success_by(rows, who), success_by(rows, [*who, "task_id", "task", "task_language"])]
    table = pd.concat(parts, ignore_index=True)
    steps = rows.groupby([*who, "task_id"], dropna=False)["steps_to_success"].mean().rename("mean_steps_to_success")
    table = table.merge(steps.reset_index(), on=[*who, "task_id"], how="left")
    table["chosen"] = of_candidate(table, evaluation.candidate) if evaluation.candidate else False
    order = ["run", "split", "actor", "step", "checkpoint", "sampling", "num_executed_steps", "suite", "task_id"]
    front = [*who, "chosen", "task_id", "task", "task_language"]
    numbers = ["episodes", "successes", "errors", "success_rate", "low", "high", "mean_steps_to_success"]
    return table.sort_values(order, na_position="first", ignore_index=True)[[*front, *numbers]]


def settings_and_versions(evaluation: Evaluation) -> list[tuple[str, str]]:
    """(name, value or values) of everything that shapes a result."""
    policy_rows = evaluation.rows[evaluation.rows["weights_hash"] != ""]
    described = [(name, _values(evaluation.rows[name])) for name in SETTINGS]
    described += [(name, _values(policy_rows[name])) for name in POLICY_SETTINGS]
    described += [(name, _values(evaluation.rows[name])) for name in VERSIONS]
    return [(name.replace("_", " "), value) for name, value in described if value]


def _values(column: pd.Series) -> str:
    return ", ".join(str(value) for value in sorted(set(column.dropna())) if value != "")


def ranges(init_states: Sequence[int]) -> str:
    """`0–9`, or `0–3, 7` where some are left out."""
    parts: list[list[int]] = []
    for index in sorted(set(init_states)):
        if parts and index == parts[-1][-1] + 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)
