"""What studies on pocket share: demonstrations and cache, training every run, judging it in the simulator, one row each.

Runs are trained as `vlatune train` does and judged as `vlatune sweep` does, on the same init states, so that episodes are paired.
"""

import csv
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ...data.cache import Cache
from ...data.prepare import PrepareConfig, prepare
from ...eval import results
from ...eval.collect import Collect, collect
from ...eval.statistics import wilson
from ...eval.sweep import SweepConfig, sweep
from .pocket_report import Arm, write_report
from .pocket_run import PocketRun, train_with_launcher
from .tables import ResultsTable, claim

if TYPE_CHECKING:
    import pandas as pd

IMAGE_PX = 64
"""Side of the images that the recipe reads."""
KEY = ("objective", "horizon", "num_executed_steps", "seed")


@dataclass(frozen=True, kw_only=True)
class PocketSettings:
    """What all runs of a study on pocket share."""

    num_steps: int = 600
    """Optimizer steps of 64 samples, for every run; 600 take about two minutes on two CPU cores. Enough to tell objectives apart,
    not to be good: the quickstart trains for 2,400."""
    episodes: int = 25
    """Init states per task on which every run is judged, at most 25."""
    demos: int = 75
    """Demonstrations per task, if there is no --cache."""
    noise: float = 0.3
    """On what the demonstrating expert executes, as in `vlatune collect`."""
    num_workers: int | None = None
    """Simulator processes; one per CPU core if not given."""

    def depended_on(self, *, own_cache: bool) -> dict[str, Any]:
        """What rows depend on besides their key and the cache's content."""
        demonstrations = {"demos": self.demos, "noise": self.noise} if own_cache else {}
        return {"num_steps": self.num_steps, "episodes": self.episodes, **demonstrations}


@dataclass(frozen=True, kw_only=True)
class PocketRow:
    """One training run, judged after its last step."""

    objective: str
    """Short name, as in methods.py."""
    horizon: int
    """Actions in a chunk."""
    num_executed_steps: int
    """Of these, actions executed before the next decision."""
    seed: int
    """Training seed."""
    run: str
    """The run's folder under runs/; its evaluation/episodes.csv has the episodes."""
    successes: int
    """Episodes that succeeded."""
    episodes: int
    """Episodes that ended, in success or failure."""
    errors: int
    """Episodes that crashed; they are run again at the next start."""
    success_rate: float | None
    """successes / episodes."""
    low: float
    """Lower end of its 95 % Wilson interval, which holds for these weights and not for another training seed."""
    high: float
    """Upper end."""
    steps_to_success: float | None
    """Control steps of successful episodes, mean."""
    smoothness: float | None
    """Mean difference of successive actions, as in episodes.csv; lower is smoother."""
    policy_ms: float | None
    """Milliseconds of a decision's forward, mean; with as many simulators beside it as there are workers."""
    validation_loss: float | None
    """After the last step. Objectives have losses of their own: compare seeds, not objectives."""
    samples_per_s: float | None
    """Training samples a second, median over the run."""


Train = Callable[[PocketRun], None]
Evaluate = Callable[[SweepConfig], Any]


def run_study(
    out: Path,
    cache: Path | None,
    settings: PocketSettings,
    runs: Sequence[PocketRun],
    *,
    executed: Sequence[int],
    arm_of: Callable[[Mapping[str, Any]], Arm],
    question: str,
    train: Train = train_with_launcher,
    evaluate: Evaluate = sweep,
) -> Path:
    """Compute the rows that are missing, then write summary, pairs, figure and findings; returns `out`.

    `runs` have `out` and `cache` filled in. Every run is judged once for each of `executed` that its chunks are long enough for.
    `arm_of` says of a row which arm of the comparison it belongs to."""
    digest = Cache.open(ready_cache(out, cache, settings)).digest
    claim(out, {**settings.depended_on(own_cache=cache is None), "cache_digest": digest})
    table = ResultsTable(out, PocketRow, KEY)
    planned = [(run, steps) for run in runs for steps in executed if steps <= run.horizon]

    def is_done(run: PocketRun, steps: int) -> bool:
        row = table.rows.get((run.objective, run.horizon, steps, run.seed))
        return row is not None and not row.errors

    missing = [(run, steps) for run, steps in planned if not is_done(run, steps)]
    with tqdm(total=len(planned), initial=len(planned) - len(missing), unit="run", dynamic_ncols=True) as bar:
        for run, steps in missing:
            bar.set_description(f"{run.out.name}, {steps} executed")
            if not run.is_trained:
                train(run)
            evaluate(
                SweepConfig(
                    runs=(run.out,),
                    steps=(run.num_steps,),
                    selection_episodes=1,
                    report_episodes=settings.episodes,
                    num_executed_steps=steps,
                    videos=0,
                    num_workers=settings.num_workers,
                )
            )
            table.add(row_of(run, judged_episodes(run.out, run.num_steps, steps), steps))
            bar.update()
    records = table.records()
    episodes = {
        (record["run"], record["num_executed_steps"]): judged_episodes(
            out / "runs" / record["run"], settings.num_steps, record["num_executed_steps"]
        )
        for record in records
    }
    write_report(out, records, episodes, arm_of=arm_of, question=question)
    return out


def ready_cache(out: Path, cache: Path | None, settings: PocketSettings) -> Path:
    """The cache that runs train on: the given one, or one made in `out`, as the quickstart makes its own."""
    if cache is not None:
        return cache
    made = out / "cache"
    if not made.exists():
        collect(Collect(out=out / "demos", episodes=settings.demos, noise=settings.noise))
        prepare(PrepareConfig(demos=out / "demos", out=made, image_px=IMAGE_PX))
    return made


def judged_episodes(run: Path, step: int, num_executed_steps: int) -> "pd.DataFrame":
    """The run's episodes that count: on init states of the reporting half, with so many steps executed."""
    episodes = results.read(run)
    return episodes[
        (episodes["split"] == "report")
        & (episodes["actor"] == "policy")
        & (episodes["step"] == step)
        & (episodes["num_executed_steps"] == num_executed_steps)
    ]


def row_of(run: PocketRun, episodes: "pd.DataFrame", num_executed_steps: int) -> PocketRow:
    """The run's row, from its judged episodes and its metrics.csv."""
    successes, ended = int((episodes["outcome"] == "success").sum()), int((episodes["outcome"] != "error").sum())
    low, high = wilson(successes, ended)

    def mean(column: str) -> float | None:
        values = episodes[column].dropna()
        return float(values.mean()) if len(values) else None

    with (run.out / "metrics.csv").open(newline="") as file:
        metrics = list(csv.DictReader(file))
    losses = [float(line["validation_loss"]) for line in metrics if line.get("validation_loss")]
    speeds = [float(line["samples_per_s"]) for line in metrics if line.get("samples_per_s")]
    return PocketRow(
        objective=run.objective,
        horizon=run.horizon,
        num_executed_steps=num_executed_steps,
        seed=run.seed,
        run=run.out.name,
        successes=successes,
        episodes=ended,
        errors=len(episodes) - ended,
        success_rate=successes / ended if ended else None,
        low=low,
        high=high,
        steps_to_success=mean("steps_to_success"),
        smoothness=mean("smoothness"),
        policy_ms=mean("policy_ms_mean"),
        validation_loss=losses[-1] if losses else None,
        samples_per_s=statistics.median(speeds) if speeds else None,
    )
