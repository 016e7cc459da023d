"""``vlatune runs [FOLDER …]``: the training runs that lie there, one line each: what they train, how far they are, and how well they do."""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro

from ..data.episodes import DataError
from ..policy.checkpoints.layout import complete_checkpoints, planned_steps

COLUMNS = (
    "run",
    "started",
    "changed",
    "state",
    "objective",
    "trained",
    "batch",
    "engine",
    "ranks",
    "loss",
    "validation_loss",
    "action_error",
    "samples_per_s",
)
FORMATS: Mapping[str, Callable[[float], str]] = {
    "loss": "{:.4g}".format,
    "validation_loss": "{:.4g}".format,
    "action_error": "{:.4g}".format,
    "action_magnitude": "{:.4g}".format,
    "samples_per_s": "{:.1f}".format,
    "seconds": "{:.0f}".format,
}
"""How a person reads a column; CSV keeps every digit."""


@dataclass(frozen=True, kw_only=True)
class RunsConfig:
    """List training runs: when they were started and last changed, how far they are, what they train and on how many ranks, and their last
    loss, validation loss, action error and speed."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path("runs"),)
    """Run folders, or folders in which runs lie, however deep."""
    csv: bool = False
    """Print CSV in place of a table."""


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(RunsConfig, args=argv, prog="vlatune runs")
    table = runs_table(config.folders)
    print(table.to_csv(index=False).rstrip() if config.csv else aligned(table))


def runs_table(folders: Sequence[Path]) -> pd.DataFrame:
    """A row a run, with `COLUMNS`. Raises `DataError` for a folder that is not there, or where none of them holds a run."""
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}; type `vlatune runs FOLDER` with one that holds runs")
    found = [run for folder in folders for run in find_runs(folder)]
    if not found:
        raise DataError(
            f"no run (a folder with config.json and checkpoints/) lies under {', '.join(map(str, folders))}; `vlatune train RECIPE --out "
            "runs/NAME` makes one"
        )
    table = pd.DataFrame([run_row(run) for run in dict.fromkeys(found)], columns=list(COLUMNS))
    return table.astype({"batch": "Int64", "ranks": "Int64"})  # whole numbers, also where a cell is empty


def is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()


def find_runs(folder: Path) -> Iterator[Path]:
    """Runs at or under `folder`, by name. Runs' own folders are not searched, nor hidden ones and what links point to (unless that is
    a run: large runs often lie on another disk)."""
    if is_run(folder):
        yield folder
        return
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.name.startswith(".") and (not inner.is_symlink() or is_run(inner)):
            yield from find_runs(inner)


def run_row(run: Path) -> dict[str, object]:
    """What can be known from the run's folder. Whether a process is at it cannot; `changed` is the time of its last row of metrics.csv."""
    config_file, metrics_file = run / "config.json", run / "metrics.csv"
    row: dict[str, object] = {
        "run": str(run),
        "started": _minute(config_file),  # it is written once, when a run begins
        "changed": _minute(metrics_file if metrics_file.exists() else config_file),
    }
    try:
        config = json.loads(config_file.read_text())
        stages = [config, *config["then"]]
        total_steps = planned_steps(run)
        objectives = [(config["policy"] if stage is config else stage)["objective"] for stage in stages]
        row |= {
            "objective": _each_once(objective["type"] for objective in objectives if objective is not None),
            "trained": _each_once(stage["trained"] for stage in stages),
            "batch": config["batch_size"],
            "engine": config["engine"],
            "ranks": config["world_size"],
        }
    except (ValueError, KeyError, TypeError):  # another program's folder: no reason to hide the other runs
        return row | {"state": "config.json is not of a run of vlatune"}
    last = last_values(run)
    is_finished = total_steps in complete_checkpoints(run)
    row["state"] = "finished" if is_finished else f"at step {last.get('step', 0):.0f} of {total_steps}"
    return row | {name: last.get(name) for name in ("loss", "validation_loss", "action_error", "samples_per_s")}


def last_values(run: Path) -> dict[str, float]:
    """The last number in every column of the run's metrics.csv; without those that have none yet."""
    path = run / "metrics.csv"
    if not path.exists():
        return {}
    whole_lines = path.read_text().rpartition("\n")[0]  # the last one may just be written
    columns = ((name, column.dropna()) for name, column in pd.read_csv(io.StringIO(whole_lines)).items())
    return {str(name): float(column.iloc[-1]) for name, column in columns if len(column)}


def aligned(table: pd.DataFrame) -> str:
    """For a terminal: a line a row, text to the left and numbers to the right; empty where nothing is known."""
    columns = []
    for name in table.columns:
        write = FORMATS.get(name, str)
        cells = [name, *("" if pd.isna(value) else write(value) for value in table[name])]
        pad = str.rjust if pd.api.types.is_numeric_dtype(table[name]) else str.ljust
        columns.append([pad(cell, max(map(len, cells))) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _minute(path: Path) -> str:
    """When the file was last written."""
    return datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")


def _each_once(names: Iterable[str]) -> str:
    """Of a run's stages, in their order."""
    return ", ".join(dict.fromkeys(names))
