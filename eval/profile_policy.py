"""``vlatune profile CHECKPOINT``: where a step's time goes, and how long decisions take under each sampling setting.

Latency is measured on decisions of one policy and nothing beside it, with the device idle before and after each; a sweep's columns tell
what batched episodes waited instead."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..data.files import write_whole
from ..policy.execution import Compile, Precision
from .benchmarks import load_benchmark
from .benchmarks.benchmark import Benchmark, EpisodeProtocol, Task
from .latency import Latency, clock_of, measure
from .profile_rows import FILE_NAME, ProfileRow, policy_columns, row_of
from .profile_simulator import SimulatorCost, episode_seconds, in_simulator, without_simulator
from .profile_tables import episode_table, latency_table, remarks
from .run_folder import checkpoint_at, find_run
from .simulator_process import MakeBenchmark
from .sweep_plan import Wanted, executed_steps, make_plan
from .sweep_rows import installed_versions
from .text_tables import csv_of

if TYPE_CHECKING:
    from ..policy.acting import ActingPolicy

FIGURE_NAME = "profile.png"


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Say where the time of a policy's decisions goes, under each sampling setting, and where that of an episode."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run (its last checkpoint is taken), or a checkpoint's folder."""
    weights: Literal["raw", "ema"] = "raw"
    """The weights as trained, or their average over training."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Observations per decision. An episode is estimated for 1."""
    num_sampling_steps: tuple[int, ...] = ()
    """Integration (or denoising) steps per chunk: one or several. As trained if not given."""
    num_executed_steps: tuple[int, ...] = ()
    """Actions executed of each chunk: one or several. 8, or the whole chunk where it is shorter, if not given."""
    repeats: int = 50
    """Decisions that are timed for each setting; as many are taken apart."""
    warm_up: int = 5
    """Decisions before those, for each setting, that do not count."""
    simulator: bool = True
    """Measure the benchmark's simulator, too, and act on what it shows. Without it pictures are noise."""
    benchmark: str = "pocket"
    """`pocket` or `libero`."""
    suite: str = ""
    """Of the benchmark; its first one if not given."""
    task: int | None = None
    """Task id; the suite's first one if not given."""
    protocol: str = ""
    """Episode protocol by name; the suite's default if empty."""
    image_px: int | None = None
    """Side of the cameras' pictures; the protocol's, or 256 without a simulator, if not given."""
    simulator_steps: int = 60
    """Control steps whose cost is measured."""
    episode_steps: int = 150
    """Control steps of the episode that is estimated."""
    device: str = "auto"
    """Where the policy runs: `auto`, `cpu`, `cuda`, `cuda:1`, …"""
    compile: Compile = "off"
    """Act through compiled programs: `on`, or `auto`, which does so on a GPU and says why where it cannot. On a GPU a whole decision is
    one CUDA graph; those taken apart launch its programs one by one."""
    precision: Precision = "float32"
    """Of backbone and expert."""
    threads: int | None = None
    """torch's on the processor; as torch chooses if not given. A sweep takes 1 where the policy runs on the CPU."""
    out: Path | None = None
    """Folder for profile.csv and profile.png instead of RUN/profile; what lies there is replaced."""

    def __post_init__(self) -> None:
        least = {"repeats": 1, "warm_up": 0, "simulator_steps": 2, "episode_steps": 1, "threads": 1, "image_px": 1}
        for name, lowest in least.items():
            number = getattr(self, name)
            if number is not None and number < lowest:
                raise ValueError(f"--{_dashed(name)} is {number}; at least {lowest} is needed")
        for name in ("batch_sizes", "num_sampling_steps", "num_executed_steps"):
            numbers = getattr(self, name)
            if min(numbers, default=1) < 1 or len(set(numbers)) < len(numbers):
                raise ValueError(
                    f"--{_dashed(name)} {' '.join(map(str, numbers))}: give different numbers of 1 or more"
                )
        if not self.batch_sizes:
            raise ValueError("--batch-sizes names nothing; give 1, for instance")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a profile found."""

    folder: Path
    rows: tuple[ProfileRow, ...]
    text: str
    """The tables, for a terminal."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; raises what `profile` raises."""
    found = profile(tyro.cli(ProfileConfig, args=None if argv is None else list(argv), prog="vlatune profile"))
    print(f"\n{found.text}\n\n{found.folder / FILE_NAME} and {found.folder / FIGURE_NAME}")


def profile(config: ProfileConfig, *, make_benchmark: MakeBenchmark | None = None) -> Profile:
    """Measure, and write `profile.csv` and `profile.png`. Raises `DataError` where there is no such checkpoint, `ValueError` for
    settings that the policy or the benchmark does not know, and `RendererError` or `AssetsError` where the simulator cannot run; all of
    it before anything is timed. `make_benchmark` replaces the registry."""
    import torch
    from tqdm import tqdm

    from ..policy.acting import load_policy

    load_average = os.getloadavg()[0]
    run = find_run(config.checkpoint)
    checkpoint = checkpoint_at(config.checkpoint, run, averaged=config.weights == "ema")
    benchmark = (make_benchmark or partial(load_benchmark, config.benchmark))() if config.simulator else None
    task_and_protocol = None if benchmark is None else _task(config, benchmark)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    policy = load_policy(
        checkpoint.path,
        device=config.device,
        averaged=checkpoint.averaged,
        compile=config.compile,
        precision=config.precision,
    )
    clock = clock_of(policy.device)
    settings = [policy.with_sampling_steps(n) for n in config.num_sampling_steps or (policy.num_sampling_steps,)]
    executed = [executed_steps(policy, n) for n in config.num_executed_steps or (None,)]
    num_decisions = len(settings) * len(config.batch_sizes) * (config.warm_up + 2 * config.repeats)
    total = num_decisions + (config.simulator_steps if config.simulator else 0)
    with tqdm(total=total, desc="simulator", smoothing=0.05, dynamic_ncols=True, file=sys.stdout) as bar:
        if benchmark is not None and task_and_protocol is not None:
            around = in_simulator(
                policy,
                benchmark,
                *task_and_protocol,
                num_steps=config.simulator_steps,
                num_executed_steps=executed[0],
                on_step=bar.update,
            )
        else:
            around = without_simulator(
                policy,
                state_dim=policy.policy.embodiment.state_dim,
                image_px=config.image_px,
                texts=policy.language.known_texts,
            )
        latencies = []
        for size in sorted(config.batch_sizes):
            for setting in settings:
                bar.set_description(f"batch {size}, sampling steps {setting.num_sampling_steps}")
                latencies.append(
                    measure(
                        setting,
                        around.batch(size),
                        clock=clock,
                        repeats=config.repeats,
                        warm_up=config.warm_up,
                        on_decision=bar.update,
                    )
                )
    same = {
        "run": run.name,
        "checkpoint": checkpoint.name,
        "step": checkpoint.step,
        "repeats": config.repeats,
        "load_average": round(load_average, 2),
        **policy_columns(policy),
        **around.columns,
        **installed_versions(),
    }
    return _written(config, config.out or run.path / "profile", settings, latencies, executed, around.simulator, same)


def _task(config: ProfileConfig, benchmark: Benchmark) -> tuple[Task, EpisodeProtocol]:
    """Raises `ValueError` naming what is not there and what is."""
    wanted = Wanted(
        suites=(config.suite,) if config.suite else (),
        tasks=() if config.task is None else (config.task,),
        protocol=config.protocol,
        image_px=config.image_px,
        selection_episodes=0,
        report_episodes=1,
    )
    return make_plan(benchmark, wanted).tasks[0]


def _written(
    config: ProfileConfig,
    folder: Path,
    settings: "Sequence[ActingPolicy]",
    latencies: Sequence[Latency],
    executed: Sequence[int],
    simulator: SimulatorCost | None,
    same: Mapping[str, Any],
) -> Profile:
    """`settings` once for each batch size make `latencies`, in this order."""
    from .profile_figure import counted, figure_of

    rows: list[ProfileRow] = []
    episodes: list[tuple[ProfileRow, dict[str, float]]] = []
    for latency, policy in zip(latencies, cycle(settings), strict=False):
        for num_executed in executed:
            seconds = None
            if simulator is not None and latency.batch_size == 1:
                seconds = episode_seconds(
                    latency.undisturbed_parts_ms,
                    simulator,
                    num_steps=config.episode_steps,
                    num_executed_steps=num_executed,
                    observation_offsets=policy.observation_offsets,
                )
            row = row_of(latency, num_executed, policy.sampling, config.episode_steps, seconds, same)
            rows.append(row)
            if seconds is not None:
                episodes.append((row, seconds))
    texts = [latency_table(rows)]
    if episodes:
        texts.append(episode_table(*zip(*episodes, strict=True)))
    texts.append(remarks(rows[0]))
    figure = figure_of(
        latencies,
        {
            f"{counted(row.num_sampling_steps, 'sampling step')}, {row.num_executed_steps} executed": seconds
            for row, seconds in episodes
        },
        title=f"{rows[0].run}, {rows[0].checkpoint}, on {rows[0].device_name}",
        episode_title=f"an episode of {config.episode_steps} control steps, estimated: {rows[0].suite}, one process",
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE_NAME, csv_of(rows, ProfileRow))
    write_whole(folder / FIGURE_NAME, figure)
    return Profile(folder=folder, rows=tuple(rows), text="\n\n".join(texts))


def _dashed(name: str) -> str:
    return name.replace("_", "-")


if __name__ == "__main__":
    main()
