"""What studies on pocket share: demonstrations and cache, training every run, judging it in the simulator, one row each.

Runs are trained as `vlatune train` does and judged as `vlatune sweep` does, on the same init states, so that episodes are paired.
"""

import csv
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
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
from .pocket_run import PocketRun, step_of, train_with_launcher
from .tables import ResultsTable, claim

if TYPE_CHECKING:
    import pandas as pd

IMAGE_PX = 64
"""Side of the images that the recipe reads."""
SUITE = "pocket"
KEY = ("objective", "horizon", "num_executed_steps", "seed")


@dataclass(frozen=True, kw_only=True)
class PocketSettings:
    """What all runs of a study on pocket share."""

    num_steps: int = 600
    """Optimizer steps of 64 samples, for every run; 600 take about two minutes on two CPU cores. Enough to tell objectives apart,
    not to be good: the quickstart trains for 2,400."""
    episodes: int = 15
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


@dataclass(frozen=True, kw_only=True)
class Judging:
    """On what every run of a study is judged, and the table that its rows go to."""

    episodes: int
    """Init states per task."""
    executed: tuple[int, ...]
    """Every run is judged once for each of these numbers of executed steps that its chunks are long enough for."""
    num_workers: int | None = None
    """Simulator processes; one per CPU core if not given."""
    suite: str = SUITE
    """Of the benchmark pocket."""
    row_type: type[PocketRow] = PocketRow
    """Columns that `PocketRun` has, too, are filled from it."""
    key: tuple[str, ...] = KEY
    """Columns that tell rows apart; fields of `PocketRun`, and `num_executed_steps`."""

    def key_of(self, run: PocketRun, steps: int) -> tuple[Any, ...]:
        """The key of the run's row, judged with so many executed steps."""
        values = {**asdict(run), "num_executed_steps": steps}
        return tuple(values[name] for name in self.key)


def run_study(
    out: Path,
    cache: Path | None,
    settings: PocketSettings,
    runs: Sequence[PocketRun],
    *,
    executed: tuple[int, ...],
    arm_of: Callable[[Mapping[str, Any]], Arm],
    question: str,
    train: Train = train_with_launcher,
    evaluate: Evaluate = sweep,
) -> Path:
    """A study of policies trained from random weights: its cache, then `compare_runs`; returns `out`.

    `runs` have `out` and `cache` filled in."""
    digest = Cache.open(cache or made_cache(out, demos=settings.demos, noise=settings.noise)).digest
    claim(out, {**settings.depended_on(own_cache=cache is None), "cache_digest": digest})
    judging = Judging(episodes=settings.episodes, executed=executed, num_workers=settings.num_workers)
    return compare_runs(out, runs, judging, arm_of=arm_of, question=question, train=train, evaluate=evaluate)


def compare_runs(
    out: Path,
    runs: Sequence[PocketRun],
    judging: Judging,
    *,
    arm_of: Callable[[Mapping[str, Any]], Arm],
    question: str,
    remarks: Sequence[str] = (),
    train: Train = train_with_launcher,
    evaluate: Evaluate = sweep,
) -> Path:
    """Compute the rows that are missing, then write summary, pairs, figure and findings; returns `out`.

    `arm_of` says of a row which arm of the comparison it belongs to; `remarks` are sentences that end the findings."""
    table = ResultsTable(out, judging.row_type, judging.key)
    planned = [(run, steps) for run in runs for steps in judging.executed if steps <= run.horizon]

    def is_done(run: PocketRun, steps: int) -> bool:
        row = table.rows.get(judging.key_of(run, steps))
        return row is not None and not row.errors

    missing = [(run, steps) for run, steps in planned if not is_done(run, steps)]
    with tqdm(total=len(planned), initial=len(planned) - len(missing), unit="run", dynamic_ncols=True) as bar:
        for run, steps in missing:
            bar.set_description(f"{run.out.name}, {steps} executed")
            if not run.is_trained:
                train(run)
            evaluate(
                SweepConfig(
                    runs=(run.judged.parents[1],),
                    suites=(judging.suite,),
                    steps=(step_of(run.judged),),
                    selection_episodes=1,
                    report_episodes=judging.episodes,
                    num_executed_steps=(steps,),
                    videos=0,
                    num_workers=judging.num_workers,
                    out=run.out / "evaluation",
                )
            )
            table.add(row_of(run, judged_episodes(run.out, judging.suite, steps), steps, judging.row_type))
            bar.update()
    records = table.records()
    episodes = {
        (record["run"], record["num_executed_steps"]): judged_episodes(
            out / "runs" / record["run"], judging.suite, record["num_executed_steps"]
        )
        for record in records
    }
    write_report(out, records, episodes, arm_of=arm_of, question=question, remarks=remarks)
    return out


def made_cache(folder: Path, *, demos: int, noise: float, suite: str = SUITE, tokenizer: str = "trained") -> Path:
    """FOLDER/cache, made from FOLDER/demos as the quickstart makes its own, or the one that is there."""
    made = folder / "cache"
    if not made.exists():
        collect(Collect(out=folder / "demos", suite=suite, episodes=demos, noise=noise))
        prepare(PrepareConfig(demos=folder / "demos", out=made, image_px=IMAGE_PX, tokenizer=tokenizer))
    return made


def judged_episodes(run: Path, suite: str, num_executed_steps: int) -> "pd.DataFrame":
    """The run's episodes that count: on the suite's init states of the reporting half, with so many steps executed of each chunk, and nothing
    else asked of sampling (several candidates, a delay, another precision)."""
    episodes = results.read(run)
    return episodes[
        (episodes["split"] == "report")
        & (episodes["actor"] == "policy")
        & (episodes["suite"] == suite)
        & episodes["sampling"].map(lambda settings: json.loads(settings).keys().isdisjoint(results.OPTIONS))
        & (episodes["num_executed_steps"] == num_executed_steps)
    ]


def row_of(
    run: PocketRun, episodes: "pd.DataFrame", num_executed_steps: int, row_type: type[PocketRow] = PocketRow
) -> PocketRow:
    """The run's row, from its judged episodes and its metrics.csv."""
    successes, ended = int((episodes["outcome"] == "success").sum()), int((episodes["outcome"] != "error").sum())
    low, high = wilson(successes, ended)

    def mean(column: str) -> float | None:
        values = episodes[column].dropna()
        return float(values.mean()) if len(values) else None

    losses, speeds = [], []
    if (run.out / "metrics.csv").exists():  # not of a policy that is judged as it was given
        with (run.out / "metrics.csv").open(newline="") as file:
            metrics = list(csv.DictReader(file))
        losses = [float(line["validation_loss"]) for line in metrics if line.get("validation_loss")]
        speeds = [float(line["samples_per_s"]) for line in metrics if line.get("samples_per_s")]
    columns = {field.name for field in fields(row_type)}
    about: dict[str, Any] = {name: value for name, value in asdict(run).items() if name in columns}
    return row_type(
        **about,
        num_executed_steps=num_executed_steps,
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
