"""Candidates: what a sweep chooses among. One is a checkpoint (its weights, raw or averaged) under one sampling setting."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..results import success_by

CANDIDATE = ["checkpoint", "step", "weights_hash", "sampling", "num_sampling_steps", "num_executed_steps"]
"""Rows of one run that agree in these are of one candidate."""
GRID = ["num_sampling_steps", "num_executed_steps"]
"""N, denoising steps of a chunk, and H, actions executed of it."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One checkpoint under several N and H, all else equal."""

    checkpoint: str
    weights_hash: str
    settings: str
    """What else the sampling settings say, where the run has grids that differ in it; else empty."""
    cells: pd.DataFrame
    """A row a pair of N and H: the columns of `success_by`."""


def by_candidate(rows: pd.DataFrame, also: Sequence[str] = ()) -> pd.DataFrame:
    """Success of each candidate (and of each value of the columns `also`), by step."""
    table = success_by(rows, [*CANDIDATE, *also])
    return table.sort_values(["step", "checkpoint", *GRID, "sampling", *also], ignore_index=True)


def of_candidate(rows: pd.DataFrame, candidate: Mapping[Any, Any]) -> pd.Series:
    """Whether each row is of the candidate, which is told by weights and settings."""
    return (rows["weights_hash"] == candidate["weights_hash"]) & of_settings(rows, candidate)


def of_settings(rows: pd.DataFrame, settings: Mapping[Any, Any]) -> pd.Series:
    """Whether each row was sampled and executed as `settings` say."""
    return (rows["sampling"] == settings["sampling"]) & (rows["num_executed_steps"] == settings["num_executed_steps"])


def of_candidate_and_controls(rows: pd.DataFrame, candidate: Mapping[Any, Any]) -> pd.Series:
    """Whether each row is of the candidate, of a control of it (the untrained policy under the same settings) or of no policy."""
    untrained = (rows["actor"] == "untrained") & of_settings(rows, candidate)
    return of_candidate(rows, candidate) | untrained | (rows["weights_hash"] == "")


def averages(table: pd.DataFrame) -> pd.Series:
    """Which weights each row's checkpoint names: empty for the raw ones, `ema` for `step_000400-ema`."""
    return table["checkpoint"].str.extract(r"^step_\d+-?(.*)$", expand=False).fillna("")


def candidate_names(table: pd.DataFrame) -> list[str]:
    """What to call each row of a table of candidates: the checkpoint, and those settings in which they differ."""
    settings = [
        json.loads(sampling or "{}") | {"num_executed_steps": int(executed)}
        for sampling, executed in zip(table["sampling"], table["num_executed_steps"], strict=True)
    ]
    keys = dict.fromkeys(["num_sampling_steps", "num_executed_steps", *(key for each in settings for key in each)])
    differing = [key for key in keys if len({json.dumps(each.get(key)) for each in settings}) > 1]
    hashes = table.groupby("checkpoint")["weights_hash"].nunique()
    names = []
    for checkpoint, digest, each in zip(table["checkpoint"], table["weights_hash"], settings, strict=True):
        weights = f"{checkpoint} ({digest[:6]})" if hashes[checkpoint] > 1 else checkpoint
        names.append(", ".join([weights, *(f"{_short(key)} {each[key]}" for key in differing if key in each)]))
    return names


def _short(key: str) -> str:
    return {"num_sampling_steps": "N", "num_executed_steps": "H"}.get(key, key.replace("_", " "))


def grids(rows: pd.DataFrame, preferred_weights: str | None) -> list[Grid]:
    """The H × N grids of one checkpoint: of the one with `preferred_weights` where it has any, else of the one with most cells.

    `rows` are one policy's on one half. Settings that differ in more than N and H are grids of their own; a grid has two cells at
    least, so that most runs have none."""
    rows = rows.dropna(subset=["num_sampling_steps"])
    rest = {text: _without_steps(text) for text in rows["sampling"].unique()}
    found = []
    for (checkpoint, weights, settings), group in rows.assign(settings=rows["sampling"].map(rest)).groupby(
        ["checkpoint", "weights_hash", "settings"]
    ):
        cells = success_by(group, GRID)
        if len(cells) > 1:
            found.append(
                Grid(checkpoint=str(checkpoint), weights_hash=str(weights), settings=str(settings), cells=cells)
            )
    if not found:
        return []
    best = max(found, key=lambda grid: (grid.weights_hash == preferred_weights, len(grid.cells)))
    same = [grid for grid in found if grid.weights_hash == best.weights_hash]
    return same if len(same) > 1 else [Grid(**{**vars(best), "settings": ""})]


def _without_steps(sampling: str) -> str:
    settings = {key: value for key, value in json.loads(sampling or "{}").items() if key != "num_sampling_steps"}
    return ", ".join(f"{_short(key)} {value}" for key, value in sorted(settings.items()))
