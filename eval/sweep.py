"""``vlatune sweep RUN…``: every candidate × task × init state → episodes.csv; the best, and its controls, on fresh states."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from ..policy.execution import Precision
from .benchmarks import load_benchmark
from .delay import InferenceDelay
from .episode_log import EpisodeLog
from .policy_server import PolicyUnderTest
from .run_folder import Checkpoint, RunFolder, check_average, find_runs
from .run_sweep import LoadPolicy, RunSweep, Sweeping
from .shards import Shard
from .simulator_process import MakeBenchmark
from .sweep_plan import Wanted, make_plan
from .video import remove_unfinished
from .workers import WorkerPool

CONTROLS = ("untrained", "blind", "wrong_instruction")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Evaluate checkpoints of training runs: compare all candidates (checkpoints, raw or averaged weights, sampling settings) on one half
    of the init states, choose the best and judge it on the other. Stopped at any moment, the same command continues."""

    runs: tuple[Path, ...]
    """Run folders, as `vlatune train` writes them, or single checkpoints (RUN/checkpoints/step_000400, or one from `vlatune convert`)."""
    benchmark: str = "pocket"
    """`pocket` or `libero`."""
    suites: tuple[str, ...] = ()
    """Suites of the benchmark; its first one if none is named."""
    tasks: tuple[int, ...] = ()
    """Task ids; all of each suite if none is named."""
    steps: tuple[int | str, ...] = ()
    """Steps of the checkpoints to compare: numbers, `last`, or quoted patterns such as '*000'; all complete ones if none is named."""
    weights: tuple[Literal["raw", "ema"], ...] = ("raw",)
    """Of each checkpoint: the weights as trained (adapters included), their average over training (`ema`), or both."""
    num_sampling_steps: tuple[int, ...] = ()
    """Integration (or denoising) steps per chunk; several are compared as a grid with the next. As trained if not given."""
    num_executed_steps: tuple[int, ...] = ()
    """Actions executed of each chunk, several as a grid; 8, or the whole chunk where it is shorter, if not given."""
    temporal_ensemble: float | None = None
    """Execute the mean of what all chunks planned for a step, weighted exp(-m i) from the oldest on; this is m (ACT: 0.01, with
    --num-executed-steps 1)."""
    num_candidates: int = 1
    """Chunks drawn for every decision from one encoded observation; the one that best goes on with what the last chunk still had
    planned is executed, all through an episode. Stands in each row's `sampling`."""
    inference_delay: int = 0
    """Control steps by which every decision comes late, as a slow policy's would on a robot."""
    while_waiting: Literal["hold", "previous"] = "hold"
    """What the robot does meanwhile: stand still, or go on with the chunk before (which needs as many steps of it left)."""
    real_time_chunking: Literal["off", "exponential", "linear", "ones", "zeros"] = "off"
    """Hold every chunk, while it is sampled, to what the last one has planned beyond the executed steps: fully for the steps of the
    delay, then less and less as named (exponential: the paper's; zeros: not at all). Flow policies; arXiv 2506.07339."""
    max_guidance: float = 5.0
    """With --real-time-chunking: the most that the correction weighs; at most the number of sampling steps."""
    protocol: str = ""
    """Episode protocol by name (libero: openvla, libero, lerobot); the suite's default if empty. The next three override it."""
    max_steps: int | None = None
    """Control steps after which an episode has failed."""
    num_settle_steps: int | None = None
    """Still actions before the first decision."""
    image_px: int | None = None
    """Side of the rendered pictures."""
    selection_episodes: int = 10
    """Init states per task, from the first half, on which every candidate is compared. 0: there is one candidate, and nothing to choose."""
    report_episodes: int | None = None
    """Init states per task, from the second half, on which the chosen candidate (and each control) is judged; 25 if not given. Without a
    selection they are taken from all, and if not given, as many as published results have under the protocol (openvla: 50)."""
    race: bool = False
    """Drop candidates that can no longer be the best after each round over the tasks, instead of running all to the end."""
    race_error: float = 0.05
    """With --race: the probability with which the best candidate is dropped, at most."""
    controls: bool = False
    """Also judge the untrained policy (step 0), and the chosen one blind and with another task's instruction."""
    baselines: tuple[Literal["scripted", "zero", "random"], ...] = ()
    """Actors without a policy to judge beside it: `scripted` (an expert that knows true poses), `zero` (no motion), `random` (any)."""
    seed: int = 0
    """Seeds every reset; part of each episode's key."""
    videos: int = 1
    """Episodes recorded per task, candidate and actor in each half, and as many failures per task on the report half. Recording renders
    every step, which is slow."""
    watch: bool = False
    """Evaluate checkpoints as training writes them, and choose once it has written the last."""
    shard: str = ""
    """`i/n`: run the i-th of n parts of the episodes (from 0; in a SLURM array $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT) into
    shard-i-of-n/. `vlatune merge RUN` joins the parts; the same commands once more then judge the chosen one."""
    num_workers: int | None = None
    """Simulator processes; one per CPU core if not given."""
    batch_size: int | None = None
    """Observations per forward, always; 1 on a CPU and one per worker (at most 32) on an accelerator if not given."""
    device: str = "auto"
    """Where policies run: `auto`, `cpu`, `cuda`, `cuda:1`, …"""
    compile: Literal["off", "on"] = "off"
    """Act through compiled programs. Actions differ in their last digits, and from there episodes can; stands in each row's `sampling`."""
    precision: Precision = "float32"
    """Of backbone and expert. bfloat16 stands in each row's `sampling`."""
    timeout_s: float = 300.0
    """A simulator silent for so long has hung: it is replaced and its episode run once more."""
    out: Path | None = None
    """Folder for episodes.csv, videos/ and chosen.json instead of RUN/evaluation (OUT/<run> with several runs)."""

    @property
    def delay(self) -> InferenceDelay:
        """Of a policy's decisions."""
        return InferenceDelay(num_steps=self.inference_delay, while_waiting=self.while_waiting)

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
        print(f"rows: {folder / 'episodes.csv'}   next: vlatune {'merge' if config.shard else 'report'} {folder}")


def sweep(
    config: SweepConfig, *, make_benchmark: MakeBenchmark | None = None, load_policy: LoadPolicy | None = None
) -> list[Path]:
    """Run the sweep and return each run's evaluation folder. Raises `DataError`, `ValueError` or `SimulatorError` where it
    cannot; all that can be checked is checked before the first episode. `make_benchmark` and `load_policy` replace the
    registry and the checkpoint reader."""
    if not config.runs:
        raise ValueError("no run folder was given; type for instance: vlatune sweep runs/pocket")
    _check_settings(config)
    shard = Shard.parse(config.shard) if config.shard else None
    make_benchmark = make_benchmark or partial(load_benchmark, config.benchmark)
    plan = make_plan(
        make_benchmark(),
        Wanted(
            suites=config.suites,
            tasks=config.tasks,
            protocol=config.protocol,
            max_steps=config.max_steps,
            num_settle_steps=config.num_settle_steps,
            image_px=config.image_px,
            selection_episodes=config.selection_episodes,
            report_episodes=config.report_episodes,
            seed=config.seed,
            num_videos=config.videos,
            temporal_ensemble=config.temporal_ensemble,
            delay=config.delay,
            actors=config.actors,
        ),
    )
    runs = find_runs(config.runs)
    for run in runs:
        _check_run(config, run)
        namesakes = [other.path for other in runs if other.name == run.name]
        if config.out is not None and len(namesakes) > 1:
            raise ValueError(
                f"--out {config.out}: {' and '.join(map(str, namesakes))} would both write {config.out / run.name}; sweep them one by one, or "
                "leave --out out"
            )
    folders = []
    num_workers = config.num_workers or len(os.sched_getaffinity(0))
    with WorkerPool(make_benchmark, num_workers=num_workers, timeout_s=config.timeout_s) as pool:
        for run in runs:
            folder = run.evaluation
            if config.out is not None:
                folder = config.out / run.name if len(runs) > 1 else config.out
            own = shard.folder(folder) if shard else folder
            with EpisodeLog(own) as log:
                remove_unfinished(own / "videos")
                RunSweep(
                    Sweeping(
                        config=config,
                        plan=plan,
                        shard=shard,
                        pool=pool,
                        num_workers=num_workers,
                        load_policy=load_policy or load_for_sweep,
                    ),
                    run,
                    folder,
                    log,
                ).run()
            folders.append(folder)
    return folders


def _check_settings(config: SweepConfig) -> None:
    """Raises `ValueError` for settings that no sweep can have."""
    if config.num_candidates < 1:
        raise ValueError(f"--num-candidates {config.num_candidates}: a decision needs at least 1")
    for name in ("num_workers", "batch_size", "timeout_s", "seed", "videos"):
        number, least = getattr(config, name), 0 if name in ("seed", "videos") else 1
        if number is not None and number < least:
            raise ValueError(f"--{name.replace('_', '-')} {number:g}: at least {least} is needed")
    if not 0 < config.race_error < 1:
        raise ValueError(f"--race-error {config.race_error:g}: it lies between 0 and 1, for instance 0.05")
    if not config.weights:
        raise ValueError("--weights names nothing; give raw, ema, or both")
    if config.temporal_ensemble is not None and config.temporal_ensemble < 0:
        raise ValueError(
            f"--temporal-ensemble {config.temporal_ensemble:g}: the coefficient is 0 or more; ACT's is 0.01"
        )
    if config.inference_delay < 0:
        raise ValueError(f"--inference-delay {config.inference_delay}: a delay is 0 control steps or more")
    if config.real_time_chunking != "off":
        others = {
            "--num-candidates": config.num_candidates > 1,
            "--temporal-ensemble": config.temporal_ensemble is not None,
        }
        for option in (option for option, is_given in others.items() if is_given):
            raise ValueError(
                f"--real-time-chunking {config.real_time_chunking}: it holds chunks together in its own way, and so does {option}; leave one "
                "of them out"
            )
    for name, steps in (("sampling", config.num_sampling_steps), ("executed", config.num_executed_steps)):
        if min(steps, default=1) < 1 or len(set(steps)) < len(steps):
            raise ValueError(f"--num-{name}-steps {' '.join(map(str, steps))}: give different numbers of 1 or more")
    if config.race and (config.shard or config.watch or config.selection_episodes == 0):
        other = "--shard" if config.shard else "--watch" if config.watch else "--selection-episodes 0"
        raise ValueError(
            f"--race compares all candidates round by round, which {other} does not allow; leave one of them out"
        )
    if config.watch and config.selection_episodes == 0:
        raise ValueError("--watch compares checkpoints as they come; give --selection-episodes 1 or more")


def _check_run(config: SweepConfig, run: RunFolder) -> None:
    """Raises `DataError` for what the run's folder lacks."""
    if config.watch:
        run.awaited_step()
    else:
        for checkpoint in run.checkpoints(config.steps):
            check_average(replace(checkpoint, averaged="ema" in config.weights))
    if config.controls:
        run.untrained()


def load_for_sweep(checkpoint: Checkpoint, config: SweepConfig) -> PolicyUnderTest:
    """The checkpoint's policy, sampling as the settings say."""
    import torch

    from ..policy.acting import load_policy
    from ..policy.objectives.real_time import RealTimeChunking

    policy: PolicyUnderTest = load_policy(
        checkpoint.path,
        device=config.device,
        num_candidates=config.num_candidates,
        averaged=checkpoint.averaged,
        real_time_chunking=RealTimeChunking.asked_for(config.real_time_chunking, config.max_guidance),
        compile=config.compile,
        precision=config.precision,
    )
    if str(policy.device) == "cpu":
        torch.set_num_threads(1)  # the simulators are the load, one a core; more threads only contend with them
    return policy


if __name__ == "__main__":
    main()
