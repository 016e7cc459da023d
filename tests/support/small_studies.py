"""Studies without a simulator: reading what they write, and a pocket of points with policies that tremble."""

import csv
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from small_episodes import row

from vlatune.data.cache import Cache
from vlatune.eval.episode_log import EpisodeLog
from vlatune.eval.sweep import SweepConfig, sweep
from vlatune.launch.studies.pocket_run import PocketRun

FAKES = str(Path(__file__).parents[1] / "eval" / "fakes")
"""To be on the path: simulator workers import from it, too."""


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_a_picture(path: Path) -> bool:
    """A PNG of some size with more than one colour."""
    from matplotlib.image import imread

    pixels = imread(path)
    return min(pixels.shape[:2]) > 200 and float(pixels[..., :3].std()) > 0.02


class FakePocket:
    """Trains in no time, to a skill of its own for each run; sweeps in a benchmark without a simulator."""

    def __init__(self, trouble: Path | None = None, skills: Mapping[str, float] | None = None) -> None:
        """`skills` by a run's name, what it trains, or its objective: the first of these that is there."""
        import fake_point_world
        import fake_policy

        self.skills = skills or {"flow": 1.0, "l1": 0.9, "rs_imle": 0.0}
        self.trained: list[str] = []
        self.runs: list[PocketRun] = []
        self.swept: list[SweepConfig] = []
        self.write_run, self.load_policy = fake_policy.write_run, fake_policy.load_policy
        self.make_benchmark = partial(fake_point_world.make, trouble)

    def train(self, run: PocketRun) -> None:
        self.trained.append(run.out.name)
        self.runs.append(run)
        step = run.train_config.num_steps
        names = (run.out.name, run.trained, run.objective)
        skill = next(self.skills[name] for name in names if name in self.skills)
        self.write_run(run.out, {0: 0.0, step: skill})
        checkpoint, cache = run.out / "checkpoints" / f"step_{step:06d}", Cache.open(run.cache)
        # What a study reads of a policy that it goes on from.
        shutil.copytree(cache.path / "language", checkpoint / "language")
        cache.statistics.save(checkpoint / "normalisation.json")
        policy = {"objective": asdict(run.train_config.policy.objective)}
        (checkpoint / "config.json").write_text(json.dumps({"policy": policy}))
        (checkpoint / "model.safetensors").write_text(f"{run.out.name} {skill}")

    def tally(self, config: SweepConfig) -> list[Path]:
        """Evaluates in no time, too: in each of three tasks, the share of the episodes succeeds that the checkpoint's skill says."""
        self.swept.append(config)
        (run,), (suite,), (step,) = config.runs, config.suites, config.steps
        skill = json.loads((run / "checkpoints" / f"step_{step:06d}" / "fake.json").read_text())["skill"]
        with EpisodeLog(config.out or run / "evaluation") as log:
            for k in range(3 * config.report_episodes):
                won = k < round(skill * 3 * config.report_episodes)
                one = row(
                    run=run.name,
                    step=step,
                    suite=suite,
                    task_id=k % 3,
                    init_state=k,
                    split="report",
                    outcome="success" if won else "failure",
                    success=won,
                    num_executed_steps=config.num_executed_steps[0],
                )
                if one.key not in log.rows:
                    log.append(one)
        return []

    def evaluate(self, config: SweepConfig) -> list[Path]:
        self.swept.append(config)
        make_benchmark = partial(self.make_benchmark, suite=config.suites[0])
        return sweep(config, make_benchmark=make_benchmark, load_policy=self.load_policy)
