"""The numbers of the report: from the rows of `episodes.csv` to small tables, each a DataFrame or a plain value."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ...data.episodes import DataError
from ..results import read, success_by
from ..statistics import mcnemar_exact

EPISODE = ["suite", "task_id", "init_state", "seed"]
"""What two policies must share for their episodes to be a pair."""
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
}
"""Actors as the report calls them, in its order."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One run's sweep, read from its folder."""

    folder: Path
    rows: pd.DataFrame
    """Episodes of the sweep that chose, or of the latest one where none has chosen yet."""
    num_other_rows: int
    """Episodes in the file that were run with other settings."""
    chosen: Mapping[str, Any] | None
    """`chosen.json`; None while the sweep has not come that far."""
    metrics: pd.DataFrame | None
    """The training curve; None where no metrics.csv lies in the folder above."""

    @property
    def name(self) -> str:
        return str(self.rows["run"].iloc[0])

    @property
    def selection(self) -> pd.DataFrame:
        return self.rows[(self.rows["split"] == "selection") & (self.rows["actor"] == "policy")]

    @property
    def judged(self) -> pd.DataFrame:
        """The report half: the chosen checkpoint, its controls and the baselines."""
        report = self.rows[self.rows["split"] == "report"]
        if self.chosen is None:
            return report.iloc[:0]
        own = report["weights_hash"] == self.chosen["weights_hash"]
        return report[own | ~report["actor"].isin(["policy", "blind", "wrong_instruction"])]

    def judged_as(self, actor: str) -> pd.DataFrame:
        return self.judged[self.judged["actor"] == actor]


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation of a run folder (or of an evaluation folder). Raises `DataError` if no sweep has written there."""
    folder = path / "evaluation" if (path / "evaluation").is_dir() else path
    rows = read(folder)
    if rows.empty:
        raise DataError(f"{folder / 'episodes.csv'} has no episode yet; `vlatune sweep {path}` runs them")
    chosen_file, metrics_file = folder / "chosen.json", folder.parent / "metrics.csv"
    chosen = json.loads(chosen_file.read_text()) if chosen_file.is_file() else None
    metrics = pd.read_csv(metrics_file) if metrics_file.is_file() else None
    kept = _same_settings(rows, chosen)
    return Evaluation(folder=folder, rows=kept, num_other_rows=len(rows) - len(kept), chosen=chosen, metrics=metrics)


def _same_settings(rows: pd.DataFrame, chosen: Mapping[str, Any] | None) -> pd.DataFrame:
    """The rows of one sweep: those that share the settings it chose with (else: those of the latest policy row)."""
    of_policy = rows[rows["weights_hash"] != ""]
    if chosen is not None:
        settings = chosen["settings"]
    elif len(of_policy):
        settings = {name: of_policy.iloc[-1][name] for name in ("protocol", "seed", "sampling", "num_executed_steps")}
    else:
        return rows
    shared = (rows["protocol"] == settings["protocol"]) & (rows["seed"] == settings["seed"])
    sampled = (rows["sampling"] == settings["sampling"]) & (
        rows["num_executed_steps"] == settings["num_executed_steps"]
    )
    return rows[shared & (sampled | (rows["weights_hash"] == ""))]


def by_checkpoint(evaluation: Evaluation) -> pd.DataFrame:
    """Success of each checkpoint on the selection half, over all tasks."""
    return success_by(evaluation.selection, ["checkpoint", "step"]).sort_values("step", ignore_index=True)


def by_checkpoint_and_task(evaluation: Evaluation) -> pd.DataFrame:
    return success_by(evaluation.selection, ["step", "suite", "task_id", "task_language"])


def by_actor(evaluation: Evaluation) -> pd.DataFrame:
    """Success of the chosen checkpoint, its controls and baselines on the report half, each beside the policy's pairs:
    columns `pairs`, `only_policy`, `only_other` (episodes that only one of them solved) and `p_value` (McNemar, exact)."""
    table = success_by(evaluation.judged, "actor")
    order = list(NAMES)
    table = table.sort_values("actor", key=lambda actors: actors.map(order.index), ignore_index=True)
    policy = evaluation.judged_as("policy")
    pairs = [paired(policy, evaluation.judged_as(actor)) for actor in table["actor"]]
    return table.assign(**{name: [pair[name] for pair in pairs] for name in pairs[0]}) if pairs else table


def paired(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, float]:
    """Exact McNemar over the episodes that both ended."""
    ended = [frame[frame["outcome"] != "error"][[*EPISODE, "success"]] for frame in (first, second)]
    both = ended[0].merge(ended[1], on=EPISODE, suffixes=("_first", "_second"))
    only_first = int((both["success_first"] & ~both["success_second"]).sum())
    only_second = int((~both["success_first"] & both["success_second"]).sum())
    return {
        "pairs": len(both),
        "only_policy": only_first,
        "only_other": only_second,
        "p_value": mcnemar_exact(only_first, only_second),
    }


def by_task(evaluation: Evaluation) -> pd.DataFrame:
    """Success of each actor on each task of the report half."""
    return success_by(evaluation.judged, ["suite", "task_id", "task_language", "actor"])


def failure_modes(evaluation: Evaluation) -> pd.DataFrame:
    """Rows: failure modes; columns: actors; counts on the report half."""
    failed = evaluation.judged[evaluation.judged["outcome"] == "failure"]
    table = pd.crosstab(failed["failure_mode"].str.replace("_", " "), failed["actor"])
    return table[[actor for actor in NAMES if actor in table]]


def time_split(rows: pd.DataFrame) -> dict[str, float]:
    """Mean seconds of an episode by what they were spent on. Recorded episodes are left out: they render every step."""
    rows = rows[(rows["outcome"] != "error") & (rows["video"] == "") & (rows["weights_hash"] != "")]
    if rows.empty:
        return {}
    parts = {
        "policy": rows["num_decisions"].astype(float) * rows["policy_ms_mean"] / 1000,
        "waiting for it": rows["num_decisions"].astype(float) * rows["queue_ms"] / 1000,
        "physics": rows["sim_s"],
        "rendering": rows["render_s"],
    }
    parts["other"] = (rows["wall_s"] - sum(parts.values())).clip(lower=0)
    return {name: float(seconds.mean()) for name, seconds in parts.items()}


def summary(evaluation: Evaluation) -> pd.DataFrame:
    """`summary.csv`: success of every split, actor and checkpoint, over all tasks (`task_id` empty) and by task."""
    rows = pd.concat([evaluation.selection, evaluation.judged])
    who = ["run", "benchmark", "suite", "split", "actor", "checkpoint", "step", "weights_hash"]
    parts = [success_by(rows, who), success_by(rows, [*who, "task_id", "task", "task_language"])]
    table = pd.concat(parts, ignore_index=True)
    steps = rows.groupby([*who, "task_id"], dropna=False)["steps_to_success"].mean().rename("mean_steps_to_success")
    table = table.merge(steps.reset_index(), on=[*who, "task_id"], how="left")
    table["chosen"] = table["weights_hash"] == (evaluation.chosen or {}).get("weights_hash")
    order = ["run", "split", "actor", "step", "suite", "task_id"]
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
