"""`episodes.csv`: one row an episode. The schema, the key that names an episode, and reading it all back with pandas."""

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..data.episodes import DataError
from .statistics import wilson

if TYPE_CHECKING:
    import pandas as pd

FILE_NAME = "episodes.csv"
OUTCOMES = ("success", "failure", "error")


COMPUTED_BY = {"compiled", "precision"}
"""Of `sampling`: how decisions are computed, not what they are."""
OPTIONS = COMPUTED_BY | {
    "num_candidates",
    "temporal_ensemble",
    "inference_delay",
    "while_waiting",
    "real_time_chunking",
    "max_guidance",
}
"""What stands in `sampling` only where it was asked for."""


@dataclass(frozen=True, kw_only=True)
class EpisodeKey:
    """What determines an episode. Two episodes of equal keys are the same episode, and only one of them is ever run."""

    weights_hash: str
    actor: str
    benchmark: str
    suite: str
    task_id: int
    init_state: int
    seed: int
    instruction: str
    protocol: str
    max_steps: int
    num_settle_steps: int
    image_px: int
    sampling: str
    num_sampling_steps: int | None
    num_executed_steps: int

    def digest(self) -> bytes:
        """32 bytes that stand for the key; part of its video's name."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()

    def noise_root(self) -> bytes:
        """32 bytes, what all of the episode's noise comes from: those of the key, however the same policy is computed. Compiled decisions and
        those in bfloat16 then differ from the plain ones by their arithmetic alone."""
        settings = json.loads(self.sampling) if self.sampling else {}
        if not COMPUTED_BY & settings.keys():
            return self.digest()
        plain = {name: value for name, value in settings.items() if name not in COMPUTED_BY}
        return replace(self, sampling=json.dumps(plain, sort_keys=True)).digest()


@dataclass(frozen=True, kw_only=True)
class EpisodeRow:
    """One finished episode. Fields are the columns, in their order; `None` is an empty cell."""

    run: str
    """Name of the run's folder."""
    checkpoint: str
    """Folder of the checkpoint: `step_000400`."""
    step: int | None
    """Optimizer step of the checkpoint."""
    weights_hash: str
    """Digest of the policy that acted: its weights (adapter and EMA choice included), its config and its statistics; empty without one."""
    actor: str
    """Who chose the actions: `policy`, `untrained` (the policy before its first step), `blind` (images black),
    `wrong_instruction`, `scripted` (an expert that knows true poses), `zero` (no motion) or `random` (uniform in the robot's limits)."""
    benchmark: str
    suite: str
    task_id: int
    task: str
    """The task's name in file-name form."""
    task_language: str
    """The instruction that belongs to the task; success is always judged for this one."""
    instruction: str
    """The instruction that was given; another than `task_language` under the actor `wrong_instruction`."""
    init_state: int
    """Index into the task's fixed init states."""
    seed: int
    split: str
    """`selection` (checkpoints are chosen on it) or `report` (the chosen one is judged on it): different init states. All are `report` where
    nothing was to be chosen."""
    outcome: str
    """`success`, `failure` or `error`. An error is not a failure: it is run again at the next start, never averaged in."""
    success: bool | None
    """Empty on error."""
    num_steps: int | None
    """Control steps taken after settling."""
    steps_to_success: int | None
    """`num_steps` of a success, else empty."""
    num_decisions: int | None
    """How often the actor was asked for a chunk of actions."""
    wall_s: float | None
    """Seconds from reset to the end, waiting for the policy included."""
    sim_s: float | None
    """Of these, seconds of physics (reset included)."""
    render_s: float | None
    """Of these, seconds of rendering; far more than usual where every step was rendered for a video (not of failures that were recorded
    by running them once more)."""
    queue_ms: float | None
    """Mean wait of a decision until its forward began."""
    policy_ms_mean: float | None
    """Mean duration of the forwards (of the whole batch) that served the episode."""
    policy_ms_p95: float | None
    smoothness: float | None
    """Mean L2 norm of the difference of successive actions, in action units; lower is smoother."""
    action_saturation: float | None
    """Share of action entries (gripper left out) that were clipped to the robot's limit."""
    failure_mode: str
    """`never_reached`, `missed_grasp`, `dropped`, `wrong_object` or `timeout`; empty unless the outcome is a failure."""
    video: str
    """The mp4, relative to this file; empty if none was recorded."""
    protocol: str
    max_steps: int
    num_settle_steps: int
    image_px: int
    """Side of the rendered images."""
    sampling: str
    """The policy's sampling settings, as JSON with sorted keys. Only where they were asked for: `num_candidates` chunks drawn for a
    decision, `temporal_ensemble`, `inference_delay` with `while_waiting`, `real_time_chunking` with `max_guidance`, `compiled`, `precision`."""
    num_sampling_steps: int | None
    """Integration (or denoising) steps per chunk: the paper's N."""
    num_executed_steps: int
    """Actions executed of each chunk before the next decision."""
    horizon: int | None
    """Actions in a chunk."""
    batch_size: int | None
    """The one batch size of every forward; spare rows are padding."""
    mujoco: str
    robosuite: str
    libero: str
    torch: str
    vlatune: str
    renderer: str
    """`osmesa`, `egl`, …"""
    device: str
    """Where the policy ran."""
    error: str
    """Why the outcome is `error`, in one line."""

    @property
    def key(self) -> EpisodeKey:
        return EpisodeKey(**{field.name: getattr(self, field.name) for field in fields(EpisodeKey)})

    def to_line(self) -> str:
        """The row as one CSV line, newline included; no cell contains another newline."""
        return _csv_line([_cell(getattr(self, column)) for column in COLUMNS])

    @classmethod
    def from_cells(cls, cells: Sequence[str]) -> Self:
        """The row from its cells; raises `ValueError` if one is missing or not of its type."""
        if len(cells) != len(COLUMNS):
            raise ValueError(f"{len(cells)} cells instead of {len(COLUMNS)}")
        return cls(**{name: _value(cell, _TYPES[name]) for name, cell in zip(COLUMNS, cells, strict=True)})


COLUMNS = tuple(field.name for field in fields(EpisodeRow))
CLOCK = ("wall_s", "sim_s", "render_s", "queue_ms", "policy_ms_mean", "policy_ms_p95")
"""Columns that differ between two runs of the same episode."""
_TYPES: dict[str, Any] = {field.name: field.type for field in fields(EpisodeRow)}
_DTYPES = {str: "str", int: "Int64", int | None: "Int64", float | None: "float64", bool | None: "boolean"}


def header() -> str:
    """The first line of `episodes.csv`."""
    return _csv_line(COLUMNS)


def _csv_line(cells: Iterable[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _cell(value: str | float | bool | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return " | ".join(line.strip() for line in value.splitlines() if line.strip())
    return repr(value)


def _value(cell: str, kind: Any) -> Any:
    if kind is str:
        return cell
    if kind is int:
        return int(cell)
    if cell == "":
        return None
    if kind == bool | None:
        return {"True": True, "False": False}[cell]
    return int(cell) if kind == int | None else float(cell)


def read(paths: str | Path | Iterable[str | Path]) -> "pd.DataFrame":
    """Every row of the given CSV files (or folders that hold an `episodes.csv`, or runs that hold `evaluation/episodes.csv`),
    with the dtypes of the schema: text is never missing but empty, counts are nullable integers. Raises `DataError` where
    there is no such file or its columns are others."""
    import pandas as pd

    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    frames = []
    for path in map(locate, map(Path, paths)):
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        check_columns(found, path)
        dtypes = {column: _DTYPES[_TYPES[column]] for column in COLUMNS}
        missing = {column: [""] for column, dtype in dtypes.items() if dtype != "str"}
        frames.append(pd.read_csv(path, dtype=dtypes, keep_default_na=False, na_values=missing))
    if not frames:
        raise DataError("no episodes.csv was given; name a file, an evaluation folder or a run")
    return pd.concat(frames, ignore_index=True)


def locate(path: Path) -> Path:
    """The CSV that `path` stands for: itself, or the `episodes.csv` of an evaluation folder or a run. Raises `DataError`."""
    for candidate in (path, path / FILE_NAME, path / "evaluation" / FILE_NAME):
        if candidate.is_file():
            return candidate
    raise DataError(f"no {FILE_NAME} at {path}; `vlatune sweep RUN` writes RUN/evaluation/{FILE_NAME}")


def check_columns(found: Sequence[str], path: Path) -> None:
    """Raises `DataError` unless the file's columns are this version's."""
    if tuple(found) != COLUMNS:
        extra, lacking = sorted(set(found) - set(COLUMNS)), sorted(set(COLUMNS) - set(found))
        raise DataError(
            f"{path} has other columns than this version writes (unknown: {', '.join(extra) or 'none'}; missing: "
            f"{', '.join(lacking) or 'none'}); move it away or use another --out"
        )


def sampling_setting(frame: "pd.DataFrame", name: str) -> "pd.Series":
    """One of the settings in the column `sampling`, `objective` for instance, a value a row; None where a row's lack it."""
    values = {text: json.loads(text).get(name) if text else None for text in frame["sampling"].unique()}
    return frame["sampling"].map(values).rename(name)


def success_by(frame: "pd.DataFrame", by: str | Sequence[str], confidence: float = 0.95) -> "pd.DataFrame":
    """Success of each group: columns `by`, episodes, successes, errors, success_rate, low, high (Wilson).

    Errors are counted apart: `episodes` are those that ended, in success or failure."""
    by = [by] if isinstance(by, str) else list(by)
    counts = (
        frame.assign(
            episodes=(frame["outcome"] != "error").astype(int),
            successes=(frame["outcome"] == "success").astype(int),
            errors=(frame["outcome"] == "error").astype(int),
        )
        .groupby(by, dropna=False, sort=True)[["episodes", "successes", "errors"]]
        .sum()
        .reset_index()
    )
    counts["success_rate"] = counts["successes"] / counts["episodes"].where(counts["episodes"] > 0)
    intervals = [wilson(k, n, confidence) for k, n in zip(counts["successes"], counts["episodes"], strict=True)]
    counts["low"] = [low for low, _ in intervals]
    counts["high"] = [high for _, high in intervals]
    return counts
