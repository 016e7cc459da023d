"""``vlatune sweep RUN…``: every checkpoint × task × init state → episodes.csv; the best, and its controls, on fresh states."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .actors import POLICY_ACTORS
from .benchmarks import load_benchmark
from .episode_log import EpisodeLog
from .policy_server import PolicyServer, PolicyUnderTest
from .results import EpisodeRow
from .run_folder import Checkpoint, RunFolder, find_run
from .statistics import wilson
from .sweep_plan import Split, SweepPlan, executed_steps, make_plan
from .sweep_rows import best_step, installed_versions, row_of
from .video import remove_unfinished
from .workers import MakeBenchmark, SimulatorError, WorkerPool

if TYPE_CHECKING:
    from tqdm import tqdm

LoadPolicy = Callable[[Path, str, int], PolicyUnderTest]
"""(checkpoint folder, device, candidates per decision) -> the policy, ready to act."""

CONTROLS = ("untrained", "blind", "wrong_instruction")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Evaluate all complete checkpoints of training runs; choose the best on one half of the init states and judge it on the
    other. Stopped at any moment, the same command continues."""

    runs: tuple[Path, ...]
    """Run folders, as `vlatune train` writes them."""
    benchmark: str = "pocket"
    """`pocket` or `libero`."""
    suites: tuple[str, ...] = ()
    """Suites of the benchmark; its first one if none is named."""
    tasks: tuple[int, ...] = ()
    """Task ids; all of each suite if none is named."""
    steps: tuple[int, ...] = ()
    """Steps of the checkpoints to compare; all complete ones if none is named."""
    protocol: str = ""
    """Episode protocol by name; the suite's default if empty."""
    selection_episodes: int = 10
    """Init states per task, from the first half, on which every checkpoint is compared."""
    report_episodes: int = 25
    """Init states per task, from the second half, on which the chosen checkpoint (and each control) is judged."""
    controls: bool = False
    """Also judge the untrained policy (step 0), and the chosen one blind and with another task's instruction."""
    baselines: tuple[Literal["scripted", "zero"], ...] = ()
    """Actors without a policy to judge beside it: `scripted` (an expert that knows true poses), `zero` (no motion)."""
    num_executed_steps: int | None = None
    """Actions executed of each chunk; 8, or the whole chunk where it is shorter, if not given."""
    num_candidates: int = 1
    """Chunks drawn for every decision from one encoded observation; the one that best goes on with what the last chunk still had
    planned is executed, all through an episode. Stands in each row's `sampling`."""
    seed: int = 0
    """Seeds every reset; part of each episode's key."""
    videos: int = 1
    """Episodes recorded per task, checkpoint and actor in each half. Recording renders every step, which is slow."""
    num_workers: int | None = None
    """Simulator processes; one per CPU core if not given."""
    batch_size: int | None = None
    """Observations per forward, always; 1 on a CPU and one per worker (at most 32) on an accelerator if not given."""
    device: str = "auto"
    """Where policies run: `auto`, `cpu`, `cuda`, `cuda:1`, …"""
    timeout_s: float = 300.0
    """A simulator silent for so long has hung: it is replaced and its episode run once more."""
    out: Path | None = None
    """Folder for episodes.csv, videos/ and chosen.json instead of RUN/evaluation (OUT/<run> with several runs)."""

    @property
    def actors(self) -> tuple[str, ...]:
        """Who is judged on the report half."""
        return ("policy", *(CONTROLS if self.controls else ()), *self.baselines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; raises what `sweep` raises."""
    import tyro

    positional = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
    config = tyro.cli(positional(SweepConfig), args=None if argv is None else list(argv), prog="vlatune sweep")
    for folder in sweep(config):
        print(f"rows: {folder / 'episodes.csv'}   next: vlatune report {folder}")


def sweep(
    config: SweepConfig, *, make_benchmark: MakeBenchmark | None = None, load_policy: LoadPolicy | None = None
) -> list[Path]:
    """Run the sweep and return each run's evaluation folder. Raises `DataError`, `ValueError` or `SimulatorError` where it
    cannot; all that can be checked is checked before the first episode. `make_benchmark` and `load_policy` replace the
    registry and the checkpoint reader."""
    if not config.runs:
        raise ValueError("no run folder was given; type for instance: vlatune sweep runs/pocket")
    if config.num_candidates < 1:
        raise ValueError(f"--num-candidates {config.num_candidates}: a decision needs at least 1")
    make_benchmark = make_benchmark or partial(load_benchmark, config.benchmark)
    plan = make_plan(
        make_benchmark(),
        suites=config.suites,
        tasks=config.tasks,
        protocol=config.protocol,
        selection_episodes=config.selection_episodes,
        report_episodes=config.report_episodes,
        seed=config.seed,
        num_videos=config.videos,
        actors=config.actors,
    )
    runs = [find_run(path) for path in config.runs]
    for run in runs:
        run.checkpoints(config.steps)
        if config.controls:
            run.untrained()
    folders = []
    num_workers = config.num_workers or len(os.sched_getaffinity(0))
    with WorkerPool(make_benchmark, num_workers=num_workers, timeout_s=config.timeout_s) as pool:
        for run in runs:
            folder = run.evaluation
            if config.out is not None:
                folder = config.out / run.name if len(runs) > 1 else config.out
            with EpisodeLog(folder) as log:
                remove_unfinished(folder / "videos")
                RunSweep(config, plan, run, folder, log, pool, num_workers, load_policy or _load_policy).run()
            folders.append(folder)
    return folders


def _load_policy(path: Path, device: str, num_candidates: int) -> PolicyUnderTest:
    import torch

    from ..policy.acting import load_policy

    policy: PolicyUnderTest = load_policy(path, device=device, num_candidates=num_candidates)
    if str(policy.device) == "cpu":
        torch.set_num_threads(1)  # the simulators are the load, one a core; more threads only contend with them
    return policy


class RunSweep:
    """The sweep of one run."""

    def __init__(
        self,
        config: SweepConfig,
        plan: SweepPlan,
        run: RunFolder,
        folder: Path,
        log: EpisodeLog,
        pool: WorkerPool,
        num_workers: int,
        load_policy: LoadPolicy,
    ) -> None:
        self.config, self.plan, self.training_run, self.folder = config, plan, run, folder
        self.log, self.pool, self.num_workers, self.load_policy = log, pool, num_workers, load_policy
        self.versions = installed_versions()
        self.loaded: tuple[Path, PolicyServer] | None = None

    def run(self) -> None:
        from tqdm import tqdm

        checkpoints = self.training_run.checkpoints(self.config.steps)
        actors = self.config.actors
        total = len(checkpoints) * self.plan.num_episodes("selection") + len(actors) * self.plan.num_episodes("report")
        with tqdm(total=total, unit="episode", smoothing=0.05, dynamic_ncols=True, file=sys.stdout) as bar:
            selection = {c.step: self.episodes("selection", "policy", c, bar) for c in checkpoints}
            step = best_step(selection)
            if step is None:
                raise SimulatorError(
                    f"no checkpoint of {self.training_run.path} finished an episode of every task: {_first_error(selection)}"
                )
            chosen = next(checkpoint for checkpoint in checkpoints if checkpoint.step == step)
            self.write_choice(chosen, selection)
            judged = {}
            for actor in actors:
                checkpoint: Checkpoint | None = chosen if actor in POLICY_ACTORS else None
                if actor == "untrained":
                    checkpoint = self.training_run.untrained()
                judged[actor] = self.episodes("report", actor, checkpoint, bar)
        print(_table(self.training_run.name, chosen, selection, judged))

    def episodes(self, split: Split, actor: str, checkpoint: Checkpoint | None, bar: "tqdm") -> list[EpisodeRow]:
        """The rows of one actor on one half: those that are there, and the rest run now."""
        server = self.serve(checkpoint) if checkpoint else None
        specs = self.plan.specs(
            split,
            actor,
            policy=server.policy if server else None,
            checkpoint=checkpoint,
            num_executed_steps=self.executed_steps(server.policy) if server else 1,
            videos=self.folder / "videos",
        )
        missing = [spec for spec in specs if spec.key not in self.log.rows]
        rows = [self.log.rows[spec.key] for spec in specs if spec.key in self.log.rows]
        bar.total = (bar.total or 0) - len(rows)  # so that the remaining time is that of the episodes still to run
        bar.set_description(f"{checkpoint.name if checkpoint else ''} {actor} ({split})".strip())
        for result in self.pool.run(missing, server):
            row = row_of(
                result,
                folder=self.folder,
                run=self.training_run.name,
                checkpoint=checkpoint,
                split=split,
                server=server,
                versions=self.versions,
            )
            self.log.append(row)
            rows.append(row)
            successes, ended = _count(rows)
            bar.set_postfix_str(f"success {successes}/{ended}", refresh=False)
            bar.update()
        return rows

    def serve(self, checkpoint: Checkpoint) -> PolicyServer:
        """The checkpoint's policy; the one loaded last is kept."""
        if self.loaded is None or self.loaded[0] != checkpoint.path:
            self.loaded = None  # free the memory first
            policy = self.load_policy(checkpoint.path, self.config.device, self.config.num_candidates)
            on_cpu = str(policy.device) == "cpu"
            batch_size = self.config.batch_size or (1 if on_cpu else min(self.num_workers, 32))
            self.loaded = checkpoint.path, PolicyServer(policy, batch_size)
        return self.loaded[1]

    def executed_steps(self, policy: PolicyUnderTest) -> int:
        """How many of a chunk's actions are executed; raises `ValueError` where candidates could then not be compared."""
        steps = executed_steps(policy, self.config.num_executed_steps)
        if policy.num_candidates > 1 and steps == policy.horizon:
            raise ValueError(
                f"--num-candidates {policy.num_candidates}: candidates are compared on the steps of the last chunk that are left, and all "
                f"{steps} are executed; type --num-executed-steps with a number below {steps}"
            )
        return steps

    def write_choice(self, chosen: Checkpoint, selection: dict[int, list[EpisodeRow]]) -> None:
        """`chosen.json`: which checkpoint, out of how many, on which init states."""
        first = selection[chosen.step][0]
        text = json.dumps(
            {
                "run": self.training_run.name,
                "checkpoint": chosen.name,
                "step": chosen.step,
                "weights_hash": first.weights_hash,
                "rule": "highest success rate over tasks on the selection half; the later step of equals",
                "settings": {
                    "protocol": first.protocol,
                    "seed": first.seed,
                    "sampling": first.sampling,
                    "num_executed_steps": first.num_executed_steps,
                },
                "num_candidates": len(selection),
                "candidates": [
                    {"step": step, "successes": _count(rows)[0], "episodes": _count(rows)[1]}
                    for step, rows in selection.items()
                ],
            },
            indent=2,
        )
        temporary = self.folder / "chosen.json.partial"
        temporary.write_text(text + "\n")
        temporary.replace(self.folder / "chosen.json")


def _count(rows: Sequence[EpisodeRow]) -> tuple[int, int]:
    """(successes, episodes that ended)."""
    return sum(row.outcome == "success" for row in rows), sum(row.outcome != "error" for row in rows)


def _first_error(selection: dict[int, list[EpisodeRow]]) -> str:
    return next(row.error for rows in selection.values() for row in rows if row.error)


def _table(
    run: str, chosen: Checkpoint, selection: dict[int, list[EpisodeRow]], judged: dict[str, list[EpisodeRow]]
) -> str:
    def line(name: str, rows: Sequence[EpisodeRow], mark: str = "") -> str:
        successes, ended = _count(rows)
        low, high = wilson(successes, ended)
        share = f"{100 * successes / ended:5.1f} %" if ended else "    –  "
        errors = f", {len(rows) - ended} errors" if ended < len(rows) else ""
        return f"  {name:<20} {share}  [{100 * low:5.1f}, {100 * high:5.1f}]  {successes}/{ended}{errors}{mark}"

    lines = [f"\n{run}: checkpoints on the selection half (success, 95 % Wilson interval)"]
    lines += [
        line(f"step {step}", rows, "  <- chosen" if step == chosen.step else "") for step, rows in selection.items()
    ]
    lines += [f"{run}: {chosen.name} and its controls on the report half"]
    lines += [line(actor, rows) for actor, rows in judged.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
