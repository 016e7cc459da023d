"""``vlatune study delay``: a policy whose decisions come late, and four ways to live with it, on pocket.

A robot can stand still until a decision is there, or go on with the chunk before. Then chunks have to be joined: as they come (naive),
by a mean of all that reach a step (temporal ensembling), or by sampling the new one so that it goes on with the old (real-time chunking).
Delays are control steps, not this machine's milliseconds: the figure is the same on any.
"""

import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import tyro
from tqdm import tqdm

from ...data.cache import Cache
from ...eval.benchmarks import load_benchmark
from ...eval.benchmarks.benchmark import Benchmark
from ...eval.policy_server import PolicyServer, PolicyUnderTest
from ...eval.run_folder import Checkpoint
from ...eval.run_sweep import LoadPolicy
from ...eval.simulator_process import EpisodeSpec, MakeBenchmark
from ...eval.sweep import SweepConfig, load_for_sweep
from ...eval.sweep_plan import Wanted, make_plan
from ...eval.workers import EpisodeResult, WorkerPool
from .delay_report import write_report
from .methods import check_methods
from .pocket import SUITE, PocketSettings, Train, made_cache
from .pocket_run import PocketRun, step_of, train_with_launcher
from .tables import ResultsTable, claim

Way = Literal["hold", "previous", "ensemble", "real_time"]
make_pocket: MakeBenchmark = partial(load_benchmark, "pocket")
KEY = ("way", "inference_delay", "seed", "task_id", "init_state")


@dataclass(frozen=True, kw_only=True)
class DelayConfig:
    """One policy on pocket whose decisions come late: success, time, jumps and clipping for four ways to bridge the wait. Stopped at any
    moment, the same command continues."""

    out: Path = Path("studies/delay")
    """Folder for results.csv (a row an episode), summary.csv, pairs.csv, figure.png, findings.md, and the trained runs."""
    cache: Path | None = None
    """A cache of pocket that is there, for instance runs/quickstart/cache; made in OUT if not given."""
    delays: tuple[int, ...] = (0, 1, 2, 4, 8)
    """Control steps from an observation to the first action that was decided from it; pocket has 20 a second."""
    ways: tuple[Way, ...] = get_args(Way)
    """What the robot does meanwhile: stand still; go on with the previous chunk; that, averaging what chunks planned for a step; or that,
    each chunk sampled to go on with the last."""
    horizon: int = 16
    """Actions in a chunk."""
    num_executed_steps: int = 8
    """Steps between the observations of two decisions, those spent standing still not counted."""
    objective: str = "flow"
    """The policy's; real-time chunking needs flow."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    temporal_ensemble: float = 0.01
    """The ensemble's coefficient, ACT's by default."""
    max_guidance: float = 5.0
    """The bound of real-time chunking's correction."""
    settings: PocketSettings = field(default_factory=lambda: PocketSettings(num_steps=2400, episodes=25))

    def __post_init__(self) -> None:
        check_methods([self.objective], "--objective")
        if not (self.seeds and self.delays and self.ways):
            raise ValueError("--seeds, --delays and --ways need at least one value each")
        most = min(self.num_executed_steps, self.horizon - self.num_executed_steps)
        if most < 1 or not 0 <= min(self.delays) <= max(self.delays) <= most:
            raise ValueError(
                f"--delays {' '.join(map(str, self.delays))}: with chunks of {self.horizon} and {self.num_executed_steps} executed a robot can go "
                f"on with the previous chunk for 0 to {max(0, most)} steps; give such delays, or a longer --horizon"
            )

    def run_of(self, seed: int) -> PocketRun:
        return PocketRun(
            out=self.out / "runs" / f"{self.objective}_chunk{self.horizon}_seed{seed}",
            cache=self.cache or self.out / "cache",
            objective=self.objective,
            horizon=self.horizon,
            seed=seed,
            num_steps=self.settings.num_steps,
        )

    def arms(self) -> list[tuple[Way, int]]:
        """(way, delay), each delay whole before the next. Without a delay there is nothing to wait for: going on with the previous chunk
        is then left out, being what standing still is."""
        return [
            (way, delay)
            for delay in sorted(set(self.delays))
            for way in get_args(Way)
            if way in self.ways and (delay or way != "previous" or "hold" not in self.ways)
        ]

    def sampling(self, way: Way, delay: int) -> SweepConfig:
        """The arm as `vlatune sweep` would be asked for it."""
        return SweepConfig(
            runs=(),
            num_executed_steps=(self.num_executed_steps,),
            inference_delay=delay,
            while_waiting="hold" if way == "hold" else "previous",
            temporal_ensemble=self.temporal_ensemble if way == "ensemble" else None,
            real_time_chunking="exponential" if way == "real_time" else "off",
            max_guidance=self.max_guidance,
        )


@dataclass(frozen=True, kw_only=True)
class DelayRow:
    """One episode."""

    way: str
    """What the robot does while it waits: `hold`, `previous`, `ensemble` or `real_time`."""
    inference_delay: int
    """Control steps by which decisions come late."""
    seed: int
    """Training seed."""
    task_id: int
    """Of pocket's suite."""
    init_state: int
    """Of the task's fixed ones."""
    outcome: str
    """`success`, `failure`, or `error`: then it is run again at the next start."""
    num_steps: int | None
    """Control steps, those spent waiting included."""
    num_decisions: int | None
    """How often the policy was asked."""
    smoothness: float | None
    """Mean L2 norm of the difference of successive actions."""
    seam_jump: float | None
    """The same, gripper left out, where one chunk gives way to the next or to standing still."""
    action_saturation: float | None
    """Share of action entries (gripper left out) that were clipped."""
    policy_ms: float | None
    """Milliseconds of a decision's forward, mean; with as many simulators beside it as there are workers."""


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(DelayConfig, args=argv, prog="vlatune study delay", config=(tyro.conf.OmitArgPrefixes,))
    print(f"figure and tables: {run(config)}")


def run(
    config: DelayConfig,
    *,
    train: Train = train_with_launcher,
    load: LoadPolicy = load_for_sweep,
    make_benchmark: MakeBenchmark = make_pocket,
) -> Path:
    """Run the episodes that are missing, then write summary, pairs, figure and findings; returns `config.out`."""
    settings = config.settings
    cache = config.cache or made_cache(config.out, demos=settings.demos, noise=settings.noise)
    names = ("objective", "horizon", "num_executed_steps", "temporal_ensemble", "max_guidance")
    depended_on = settings.depended_on(own_cache=config.cache is None) | {name: getattr(config, name) for name in names}
    del depended_on["episodes"]  # a row is one episode: with more of them, those that are there stay as they are
    claim(config.out, {**depended_on, "cache_digest": Cache.open(cache).digest})
    table = ResultsTable(config.out, DelayRow, KEY)
    num_workers = settings.num_workers or len(os.sched_getaffinity(0))
    with WorkerPool(make_benchmark, num_workers=num_workers) as pool:
        for seed in config.seeds:
            trained = config.run_of(seed)
            if not trained.is_trained:
                train(trained)
            for way, delay in config.arms():
                policy = load(
                    Checkpoint(path=trained.judged, step=step_of(trained.judged)), config.sampling(way, delay)
                )
                server = PolicyServer(policy, 1 if str(policy.device) == "cpu" else num_workers)
                specs = _specs(config, way, delay, policy, make_benchmark())
                for row in _missing_rows(table, (way, delay, seed), specs, pool, server):
                    table.add(row)
    write_report(config.out, table.records())
    return config.out


def _specs(
    config: DelayConfig, way: Way, delay: int, policy: PolicyUnderTest, benchmark: Benchmark
) -> list[EpisodeSpec]:
    sampling = config.sampling(way, delay)
    wanted = Wanted(
        suites=(SUITE,),
        selection_episodes=1,  # its half is left alone, as in the other studies
        report_episodes=config.settings.episodes,
        temporal_ensemble=sampling.temporal_ensemble,
        delay=sampling.delay,
    )
    return make_plan(benchmark, wanted).specs(
        "report",
        "policy",
        policy=policy,
        checkpoint=None,
        num_executed_steps=config.num_executed_steps,
        videos=config.out,
    )


def _missing_rows(
    table: ResultsTable[DelayRow],
    arm: tuple[Way, int, int],
    specs: Sequence[EpisodeSpec],
    pool: WorkerPool,
    server: PolicyServer,
) -> Iterator[DelayRow]:
    """`arm` is way, delay and training seed; crashed episodes are missing, too."""
    missing = []
    for spec in specs:
        row = table.rows.get((*arm, spec.key.task_id, spec.key.init_state))
        if row is None or row.outcome == "error":
            missing.append(spec)
    with tqdm(total=len(specs), initial=len(specs) - len(missing), unit="episode", dynamic_ncols=True) as bar:
        bar.set_description("{}, delay {}, seed {}".format(*arm))
        for result in pool.run(missing, server):
            yield _row_of(arm, result)
            bar.update()


def _row_of(arm: tuple[Way, int, int], result: EpisodeResult) -> DelayRow:
    way, delay, seed = arm
    key, outcome = result.spec.key, result.outcome
    return DelayRow(
        way=way,
        inference_delay=delay,
        seed=seed,
        task_id=key.task_id,
        init_state=key.init_state,
        outcome="error" if outcome is None else "success" if outcome.success else "failure",
        num_steps=outcome.num_steps if outcome else None,
        num_decisions=len(outcome.decision_ms) if outcome else None,
        smoothness=outcome.smoothness if outcome else None,
        seam_jump=outcome.seam_jump if outcome else None,
        action_saturation=outcome.saturation if outcome else None,
        policy_ms=statistics.mean(result.policy_ms) if result.policy_ms else None,
    )
