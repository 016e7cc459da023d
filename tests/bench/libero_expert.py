"""How often LIBERO's scripted expert succeeds: tasks x init states, within the step limits of the protocol `openvla`.

    nice python tests/bench/libero_expert.py --suite libero_spatial [--tasks 0 4] [--first 0 --number 50] [--workers 2]

Needs LIBERO's assets (VLATUNE_LIBERO_ASSETS). Nothing is rendered but a tiny picture at each reset. Init states from 1000 on
are those that `vlatune collect` starts from.
"""

import contextlib
import multiprocessing
import statistics
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import tyro

from vlatune.eval.benchmarks import load_benchmark
from vlatune.eval.benchmarks.benchmark import NoExpert, Task


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to count."""

    suite: str = "libero_spatial"
    """libero_spatial, libero_object or libero_goal."""
    tasks: tuple[int, ...] = ()
    """Numbers of the suite's tasks; none means all that the expert knows."""
    first: int = 0
    """The first init state."""
    number: int = 50
    """How many init states."""
    workers: int = 1
    """Simulator processes; each takes whole tasks."""


@dataclass(frozen=True)
class Episode:
    init_state: int
    success: bool
    num_steps: int
    failure_mode: str


def run_task(task: Task, init_states: range) -> list[Episode]:
    benchmark = load_benchmark("libero")
    protocol = replace(benchmark.protocols(task.suite)["openvla"], image_px=16)
    environment, expert = benchmark.make_environment(task, protocol), benchmark.make_expert(task)
    episodes = []
    for init_state in init_states:
        observation = environment.reset(init_state, seed=init_state)
        expert.reset(init_state)
        steps = 0
        while steps < protocol.max_steps and not observation.success:
            observation = environment.step(np.clip(expert.act(observation), -1.0, 1.0), render=False)
            steps += 1
        episodes.append(Episode(init_state, observation.success, steps, environment.failure_mode()))
    environment.close()
    return episodes


def line(task: Task, episodes: list[Episode]) -> str:
    """A row of a Markdown table."""
    steps = [episode.num_steps for episode in episodes if episode.success]
    failed = Counter(episode.failure_mode for episode in episodes if not episode.success)
    which = [str(episode.init_state) for episode in episodes if not episode.success]
    cells = [
        f"{task.task_id} {task.name}",
        f"{len(steps)}/{len(episodes)}",
        f"{statistics.median(steps):.0f} ({min(steps)}-{max(steps)})" if steps else "",
        ", ".join(f"{count} {mode}" for mode, count in failed.items()) + (f": {' '.join(which)}" if which else ""),
    ]
    return "| " + " | ".join(cells) + " |"


def main(options: Options) -> None:
    benchmark = load_benchmark("libero")
    tasks = []
    for task in benchmark.suites()[options.suite]:
        if options.tasks and task.task_id not in options.tasks:
            continue
        try:
            benchmark.make_expert(task)
        except NoExpert as error:
            print(error)
        else:
            tasks.append(task)
    init_states = range(options.first, options.first + options.number)
    start, successes = time.perf_counter(), 0
    print("| task | success | steps: median (range) | failures: init states |\n|---|---|---|---|", flush=True)
    with contextlib.ExitStack() as stack:
        run = map
        if options.workers > 1:  # one alone needs no process of its own, which would outlive a parent that is killed
            spawn = multiprocessing.get_context("spawn")
            run = stack.enter_context(ProcessPoolExecutor(options.workers, mp_context=spawn)).map
        for task, episodes in zip(tasks, run(run_task, tasks, [init_states] * len(tasks)), strict=True):
            successes += sum(episode.success for episode in episodes)
            print(line(task, episodes), flush=True)
    minutes = (time.perf_counter() - start) / 60
    print(f"\n{options.suite}: {successes} of {len(tasks) * len(init_states)} in {minutes:.1f} minutes")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
