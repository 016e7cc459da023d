"""Where a run's numbers go: metrics.csv, TensorBoard, W&B where it is asked for, and the progress bar. The main rank's, alone."""

import csv
import importlib
import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ..data.episodes import DataError
from ..data.files import json_bytes, write_whole

WANDB_PACKAGE = "wandb>=0.19"
WANDB_FILE = "wandb_run.json"
"""File of a run's folder that says which W&B run is its."""

COLUMNS = (
    "step",
    "loss",
    "validation_loss",
    "grad_norm",
    "learning_rate",
    "samples_per_s",
    "data_wait_share",
    "elapsed_s",
)


class Tracker:
    """Rows from before a resume are kept up to the step resumed from, so that a curve never doubles back."""

    def __init__(self, run: Path, *, first_step: int, num_steps: int, wandb_run: "WandbRun | None" = None) -> None:
        self.path = run / "metrics.csv"
        self.wandb_run = wandb_run
        self.rows: list[Mapping[str, object]] = [row for row in written_rows(run) if int(row["step"]) <= first_step]
        self.start = time.perf_counter() - (float(str(self.rows[-1]["elapsed_s"])) if self.rows else 0.0)
        self.columns = list(self.rows[0]) if self.rows else list(COLUMNS)
        self._rewrite()
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self.bar = tqdm(total=num_steps, initial=first_step, desc="train", unit="step", dynamic_ncols=True)

    def _rewrite(self) -> None:
        """The whole file, with the columns that are known by now; an objective's own metrics come with its first row."""
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        temporary.replace(self.path)

    def advance(self) -> None:
        self.bar.update()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row; `step` counts finished optimizer steps."""
        row = {"step": step, **values, "elapsed_s": time.perf_counter() - self.start}
        text = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        self.rows.append(text)
        new = sorted(row.keys() - set(self.columns))
        if new:
            self.columns += new
            self._rewrite()
        else:
            with self.path.open("a", newline="") as stream:
                csv.DictWriter(stream, self.columns).writerow(text)
        for name, value in values.items():
            self.board.add_scalar(f"train/{name}", value, step)
        if self.wandb_run is not None:
            self.wandb_run.log(step, values)
        self.bar.set_postfix_str(
            f"loss {values['loss']:.4f}, {values['samples_per_s']:.0f} samples/s, waiting for data {values['data_wait_share']:.0%}"
        )

    def close(self) -> None:
        self.bar.close()
        self.board.close()
        if self.wandb_run is not None:
            self.wandb_run.close()


def written_rows(run: Path) -> list[dict[str, str]]:
    """metrics.csv as it is; a last line that was never finished is not a row."""
    metrics = run / "metrics.csv"
    if not metrics.exists():
        return []
    *lines, _ = metrics.read_text().split("\n")
    return list(csv.DictReader(lines))


class WandbRun:
    """TensorBoard's numbers in Weights & Biases: one W&B run through all resumes."""

    def __init__(self, project: str, run: Path, config: Mapping[str, Any]) -> None:
        """Before a `Tracker` shortens metrics.csv. Raises ValueError where the package is missing, DataError where W&B refuses."""
        try:
            wandb: Any = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--wandb {project} needs a package that is not installed; type: pip install '{WANDB_PACKAGE}', or leave --wandb out"
            ) from error
        file = run / WANDB_FILE
        known = json.loads(file.read_text()) if file.exists() else {"project": project, "id": secrets.token_hex(4)}
        if known["project"] != project:
            raise DataError(f"{run} is in W&B's project {known['project']!r}; type --wandb {known['project']}")
        run.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(**known, name=run.name, config=dict(config), dir=str(run), resume="allow")
        except wandb.Error as error:
            raise DataError(
                f"W&B refuses the run ({str(error).strip().splitlines()[0].rstrip('.')}); type `wandb login`, or set WANDB_MODE=offline to "
                "keep it on this machine, or leave --wandb out"
            ) from error
        write_whole(file, json_bytes(known))
        # W&B says where a resumed run goes on; offline it does not know, and our own rows do.
        self._next_step = self._run.starting_step or max((int(row["step"]) for row in written_rows(run)), default=0) + 1

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row, unless W&B has it: what a resumed run computes again is equal."""
        if step >= self._next_step:
            self._run.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()
