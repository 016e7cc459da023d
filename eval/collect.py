"""``vlatune collect``: successful episodes of an actor, as demonstrations in LIBERO's HDF5 format.

Each episode depends on (task, init state, settings) alone and is kept in a file of its own until its task is complete.
Killed and started again, only what is missing runs, and the result is the same.
"""

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import tyro
from tqdm import tqdm

from ..data.episodes import DataError
from ..data.files import json_bytes, write_whole
from ..data.sources.libero_hdf5_writer import merge_demos
from .benchmarks import load_benchmark
from .benchmarks.benchmark import Benchmark, Task
from .benchmarks.renderer import choose_renderer
from .record import Job, Recorded, record_episode

FIRST_INIT_STATE = 1_000
"""Demonstrations start from init states that no evaluation uses."""
INIT_STATES_PER_SEED = 1_000_000
MAX_TRIES_PER_DEMO = 4
"""A task that succeeds less often than one time in this many is given up."""
FREE_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Roll an actor out in parallel and keep its successful episodes."""

    out: Path
    """Folder for `<task>_demo.hdf5`, one file a task."""
    benchmark: str = "pocket"
    """Which benchmark; it must have an expert for the tasks."""
    suite: str = "pocket"
    """Which of the benchmark's suites."""
    tasks: tuple[str, ...] = ()
    """Names (or numbers) of the suite's tasks; none means all."""
    episodes: int = 50
    """Successful episodes per task."""
    image_px: int = 128
    """Side of the two cameras' images; LIBERO's own files have 128."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on the executed motion, in action units, so that the expert shows how it
    recovers (DART). What the expert meant is recorded as `actions`, what was done as `executed_actions`."""
    seed: int = 0
    """Another seed starts from other init states and draws other noise."""
    actor: Literal["scripted"] = "scripted"
    """Who acts: the benchmark's scripted expert."""
    workers: int = 0
    """Simulator processes; 0 means one per CPU core."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"--episodes is {self.episodes}; at least 1 is needed")
        if self.image_px < 16:
            raise ValueError(f"--image-px is {self.image_px}; at least 16 is needed")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"--noise is {self.noise}; it is a standard deviation in action units, from 0 to 1")

    def settings(self) -> dict[str, Any]:
        """What an episode depends on; how many there are, where they go and who computes them is left out."""
        return {key: value for key, value in asdict(self).items() if key not in ("out", "tasks", "episodes", "workers")}


@dataclass(kw_only=True)
class Tally:
    """What this run has seen, for the progress bar."""

    bar: tqdm
    tries: int = 0
    successes: int = 0
    steps: list[int] = field(default_factory=list)

    def add(self, recorded: Recorded) -> None:
        self.tries += 1
        self.successes += recorded.success
        self.steps.append(recorded.num_steps)
        self.bar.set_postfix_str(
            f"success {100 * self.successes / self.tries:.0f} %, {sum(self.steps) / self.tries:.0f} steps"
        )
        self.bar.update(int(recorded.success))


def main(argv: Sequence[str] | None = None) -> None:
    collect(tyro.cli(Collect, args=argv, description=__doc__))


def collect(config: Collect) -> None:
    """Run what is missing under `config.out`.

    Raises `DataError` where files of other settings lie there, `NoExpert`, and `RendererError` before any work."""
    benchmark = load_benchmark(config.benchmark)
    tasks = chosen_tasks(benchmark, config)
    for task in tasks:
        benchmark.make_expert(task)
    choose_renderer()
    missing = [task for task in tasks if not _is_complete(config, task)]
    parts = config.out / ".parts"
    parts.mkdir(parents=True, exist_ok=True)
    _claim(parts / "settings.json", config)
    for leftover in config.out.rglob(".*.tmp"):  # of a run that was killed while it wrote
        leftover.unlink()
    with tqdm(total=len(tasks) * config.episodes, unit="episode", desc="collect") as bar:
        bar.update((len(tasks) - len(missing)) * config.episodes)
        if missing:
            workers = min(config.workers or os.cpu_count() or 1, config.episodes)
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, mp_context=spawn, initializer=start_worker) as pool:
                try:
                    tally = Tally(bar=bar)
                    for task in missing:
                        _collect_task(config, task, pool, tally)
                except BrokenProcessPool as error:
                    from .workers import SimulatorError

                    raise SimulatorError(
                        f"a simulator process was killed (out of memory? {workers} of them ran); type the same again, "
                        "with fewer --workers: what is finished is kept"
                    ) from error
                except BaseException:  # Ctrl-C too: drop what has not begun, or leaving the block would wait for it
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    shutil.rmtree(parts)


def chosen_tasks(benchmark: Benchmark, config: Collect) -> list[Task]:
    """Those that `config.tasks` names. Raises `ValueError` naming what there is."""
    suites = benchmark.suites()
    if config.suite not in suites:
        raise ValueError(f"{config.benchmark} has no suite {config.suite!r}; it has {', '.join(suites)}")
    suite = suites[config.suite]
    known = {task.name: task for task in suite} | {str(task.task_id): task for task in suite}
    for name in config.tasks:
        if name not in known:
            raise ValueError(f"{config.suite} has no task {name!r}; it has {', '.join(task.name for task in suite)}")
    return [known[name] for name in config.tasks] or list(suite)


def demo_path(config: Collect, task: Task) -> Path:
    return config.out / f"{task.name}_demo.hdf5"


def _collect_task(config: Collect, task: Task, pool: Executor, tally: Tally) -> None:
    """Init states are taken in order, in rounds of as many as are still wanted, and all of a round are run: which
    demonstrations are kept does not depend on which worker was faster."""
    folder = config.out / ".parts" / task.name
    folder.mkdir(exist_ok=True)
    first = following = FIRST_INIT_STATE + INIT_STATES_PER_SEED * config.seed
    kept: list[Path] = []
    while len(kept) < config.episodes:
        if following - first > MAX_TRIES_PER_DEMO * config.episodes + FREE_TRIES:
            mend = f"give less --noise than {config.noise}" if config.noise else "leave this task out"
            raise DataError(
                f"{task.name}: of {following - first} episodes {len(kept)} succeeded, and --episodes asks for {config.episodes}; {mend}"
            )
        batch = range(following, following + config.episodes - len(kept))
        following = batch.stop
        jobs = [
            Job(
                task=task,
                init_state=k,
                image_px=config.image_px,
                noise=config.noise,
                seed=config.seed,
                part=folder / str(k),
            )
            for k in batch
        ]
        tally.bar.update(sum(job.success_path.exists() for job in jobs))
        for future in as_completed([pool.submit(record_episode, job) for job in jobs if not job.is_done()]):
            tally.add(future.result())
        kept += [job.success_path for job in jobs if job.success_path.exists()]
    merge_demos(demo_path(config, task), kept, {"collect": config.settings()})
    shutil.rmtree(folder)


def _claim(path: Path, config: Collect) -> None:
    """Remember the settings that the parts are made under; refuse parts of others."""
    if path.exists() and json.loads(path.read_text()) != config.settings():
        raise DataError(
            f"{path.parent} has episodes of an unfinished run with other settings ({_line(path.read_text())}); give those, "
            "or delete that folder, or give another --out"
        )
    write_whole(path, json_bytes(config.settings()))


def _is_complete(config: Collect, task: Task) -> bool:
    """Whether its file is there; raises `DataError` if it is another collection's."""
    import h5py

    path = demo_path(config, task)
    if not path.exists():
        return False
    with h5py.File(path, "r") as file:
        settings, episodes = str(file["data"].attrs.get("collect", "{}")), int(file["data"].attrs["num_demos"])
    if json.loads(settings) != config.settings() or episodes != config.episodes:
        raise DataError(
            f"{path} is there already, with {episodes} episodes of other settings or of another number than "
            f"{config.episodes} ({_line(settings)}); delete it or give another --out"
        )
    return True


def _line(text: str) -> str:
    return " ".join(text.split())


def start_worker() -> None:
    """Ctrl-C is the parent's business; and no worker outlives its parent, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


if __name__ == "__main__":
    main()
