"""One run's report: summary.csv and report/index.html in its evaluation folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ...data.files import write_whole
from ..results import read
from ..run_folder import find_run
from . import figures, tables
from .candidates import GRID, grids, of_candidate
from .gallery import ClipGroup, gallery, num_missing
from .markdown import p_value
from .rendering import render

FEW_CANDIDATES = 12
"""More of them are folded away."""


def num_runs(path: Path) -> int:
    """How many runs the CSV at `path` has rows of, at least 1. Raises `DataError` if there is no run or no CSV."""
    return max(1, read(find_run(path).path)["run"].nunique())


def write_run_report(path: Path) -> str:
    """Write `summary.csv` and `report/index.html` into the evaluation folder of the run at `path`; returns the table to
    print. Raises `DataError` if there is no run or no sweep."""
    evaluation = tables.read_evaluation(find_run(path).path)
    page = evaluation.folder / "report" / "index.html"
    page.parent.mkdir(exist_ok=True)
    write_whole(evaluation.folder / "summary.csv", tables.summary(evaluation).to_csv(index=False).encode())
    write_whole(page, _html(evaluation, page.parent))
    return f"{_text(evaluation)}\n\nsummary: {evaluation.folder / 'summary.csv'}\nreport:  {page}"


def _html(evaluation: tables.Evaluation, page_folder: Path) -> bytes:
    judged, checkpoints = tables.by_actor(evaluation), tables.by_checkpoint(evaluation).dropna(subset=["step"])
    chosen_step = evaluation.chosen["step"] if evaluation.chosen else None
    seconds = tables.time_split(evaluation.rows)
    policy = evaluation.judged_as("policy")
    ended = policy[policy["outcome"] != "error"]
    return render(
        "run.html",
        evaluation=evaluation,
        chosen=evaluation.chosen,
        names=tables.NAMES,
        candidates=tables.candidates(evaluation).to_dict("records"),
        few_candidates=FEW_CANDIDATES,
        judged=judged.to_dict("records"),
        by_suite=tables.by_suite(evaluation),
        by_task=_by_task(tables.by_task(evaluation), list(judged["actor"])),
        tasks=_by_candidate_and_task(tables.by_candidate_and_task(evaluation)),
        verdicts=_verdicts(judged.to_dict("records")),
        selection_states=tables.ranges(evaluation.selection["init_state"].tolist()),
        report_states=tables.ranges(evaluation.judged["init_state"].tolist()),
        failure_modes=tables.failure_modes(evaluation),
        seconds=seconds,
        videos=_videos(evaluation, page_folder),
        num_missing_videos=num_missing(evaluation.rows.assign(folder=str(evaluation.folder))),
        errors=evaluation.rows[evaluation.rows["outcome"] == "error"].to_dict("records"),
        settings=tables.settings_and_versions(evaluation),
        own={
            "steps_to_success": ended["steps_to_success"].astype(float).median(),
            "policy_ms": tables.mean_policy_ms(ended),
            "smoothness": ended["smoothness"].mean(),
            "action_saturation": ended["action_saturation"].mean(),
        },
        figure={
            "success": figures.success_curve(checkpoints, chosen_step, judged) if len(checkpoints) else "",
            "loss": figures.loss_curve(evaluation.metrics, chosen_step) if evaluation.metrics is not None else "",
            "actors": figures.actors_chart(judged, tables.NAMES) if len(judged) else "",
            "time": figures.time_chart(seconds) if seconds else "",
            "over_time": figures.success_over_time({"policy": policy}) if ended["success"].any() else "",
            "heat": heat_maps(evaluation.selection, evaluation.candidate),
        },
    )


def heat_maps(rows: pd.DataFrame, candidate: Mapping[str, Any] | None, name: str = "") -> list[tuple[str, str]]:
    """(title, figure) of each H × N grid among `rows`, of the candidate's checkpoint where it has one; its own cell is outlined."""
    weights = candidate["weights_hash"] if candidate else None
    found = grids(rows, weights)
    outlined = None
    if candidate and len(found) == 1 and found[0].weights_hash == weights:
        own = rows[of_candidate(rows, candidate)]
        outlined = next(own[GRID].itertuples(index=False, name=None), None)
    titles = [", ".join(filter(None, (name, grid.checkpoint, grid.settings))) for grid in found]
    return [(title, figures.heat_map(grid.cells, outlined)) for title, grid in zip(titles, found, strict=True)]


def _by_task(table: pd.DataFrame, actors: Sequence[str]) -> dict[str, Any]:
    """Rows of the per-task table: instruction, then one cell per actor (None where it has no episode)."""
    cells = {(row["suite"], row["task_id"], row["actor"]): row for row in table.to_dict("records")}
    tasks = table[["suite", "task_id", "task_language"]].drop_duplicates().itertuples(index=False)
    rows = [(task.task_language, [cells.get((task.suite, task.task_id, actor)) for actor in actors]) for task in tasks]
    return {"actors": actors, "rows": rows}


def _by_candidate_and_task(table: pd.DataFrame) -> dict[str, Any]:
    """The tasks' instructions, and a function from a candidate (a row of `tables.candidates`) to its cell of each."""

    def place(row: Mapping[Any, Any]) -> tuple:
        return row["weights_hash"], row["sampling"], row["num_executed_steps"]

    cells = {(place(row), row["suite"], row["task_id"]): row for row in table.to_dict("records")}
    tasks = list(table[["suite", "task_id", "task_language"]].drop_duplicates().itertuples(index=False))
    return {
        "languages": [task.task_language for task in tasks],
        "cells": lambda candidate: [cells.get((place(candidate), task.suite, task.task_id)) for task in tasks],
    }


def _verdicts(judged: Sequence[Mapping[Any, Any]]) -> list[tuple[bool, str]]:
    """(is it well, sentence) for each control: its interval must lie below the policy's."""
    meaning = {
        "untrained": ("training made the difference", "no effect of training is shown"),
        "blind": ("the policy needs its images", "it is not shown that the policy sees"),
        "wrong_instruction": ("the policy heeds the instruction", "it is not shown that the policy listens"),
    }
    policy = next((row for row in judged if row["actor"] == "policy"), None)
    if policy is None:
        return []
    found = []
    for row in judged:
        if row["actor"] in meaning:
            apart = row["high"] < policy["low"]
            found.append((apart, meaning[row["actor"]][0 if apart else 1]))
    return found


def _videos(evaluation: tables.Evaluation, page_folder: Path) -> dict[str, list[ClipGroup]]:
    """Recorded episodes: `chosen` (the chosen candidate's own), `controls` and `others`, each by how it ended."""
    rows = evaluation.rows.assign(folder=str(evaluation.folder))
    policy = rows["actor"] == "policy"
    own = policy & (of_candidate(rows, evaluation.candidate) if evaluation.candidate else False)
    groups = {"chosen": rows[own], "controls": rows[~policy], "others": rows[policy & ~own]}
    most = {"chosen": 6, "controls": 12, "others": 12}
    return {name: gallery(rows, page_folder, by="actor", most=most[name]) for name, rows in groups.items()}


def _text(evaluation: tables.Evaluation) -> str:
    """The table for the terminal."""

    def percent(row: Any) -> str:
        share = f"{100 * row['success_rate']:5.1f} %" if row["episodes"] else "    –  "
        return (
            f"{share}  [{100 * row['low']:5.1f}, {100 * row['high']:5.1f}]  {row['successes']:>3}/{row['episodes']:<3}"
        )

    lines = [f"{evaluation.name}: success, 95 % Wilson interval, episodes"]
    if evaluation.chosen is None:
        lines.append("  the sweep has not chosen a checkpoint yet: selection half only")
    for row in tables.candidates(evaluation).to_dict("records"):
        lines.append(f"  {row['name']:<30} {percent(row)}  selection{' <- chosen' if row['chosen'] else ''}")
    for row in tables.by_actor(evaluation).to_dict("records"):
        p = p_value(row["p_value"])
        against = "" if row["actor"] == "policy" else f"  p {p if '<' in p else f'= {p}'} against the policy"
        lines.append(f"  {tables.NAMES[row['actor']]:<30} {percent(row)}  report{against}")
    per_task = tables.by_task(evaluation)
    for row in per_task[per_task["actor"] == "policy"].to_dict("records"):
        lines.append(f"    {row['task_language']:<60} {percent(row)}")
    return "\n".join(lines)
