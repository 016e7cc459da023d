"""Where a run's numbers go: metrics.csv, TensorBoard and the progress bar. Only the main rank has one."""

import csv
import time
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

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

    def __init__(self, run: Path, *, first_step: int, num_steps: int) -> None:
        self.path = run / "metrics.csv"
        self.rows: list[Mapping[str, object]] = []
        if self.path.exists():
            with self.path.open(newline="") as stream:
                self.rows = [row for row in csv.DictReader(stream) if int(row["step"]) <= first_step]
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
        self.bar.set_postfix_str(
            f"loss {values['loss']:.4f}, {values['samples_per_s']:.0f} samples/s, waiting for data {values['data_wait_share']:.0%}"
        )

    def close(self) -> None:
        self.bar.close()
        self.board.close()
