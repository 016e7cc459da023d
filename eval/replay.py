"""``vlatune replay DEMOS…``: is the simulator here the one that the demonstrations were recorded in?

The recorded actions are executed again, from the recorded simulator state and (reported only) from a fresh reset; and what the
files store of pictures, proprioception and gripper is compared with what the simulator shows in the recorded states. What is wrong
is named: pictures turned or exchanged, numbers in another order, a turned gripper sign, observations of another moment.
"""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from ..data.episodes import DataError
from ..data.files import write_whole
from ..data.sources.libero_hdf5 import LiberoHdf5Source, ObservationTiming
from .benchmarks.renderer import choose_renderer
from .collect import start_worker
from .replay_demos import demo_path, task_of
from .replay_episode import Replayed, ReplayJob, replay_demo
from .replay_findings import about_file, drift_note
from .replay_rows import ReplayRow, row_of, table_of
from .replay_sheet import sheet_of
from .text_tables import csv_of

FILE_NAME = "replay.csv"


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Run recorded demonstrations again, and compare what their files say with what the simulator shows. Exit code 0 if all of it
    agrees."""

    demos: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """HDF5 files in LIBERO's format, or folders with some."""
    benchmark: str | None = None
    """`pocket` or `libero`; found by the task that each file names if not given."""
    episodes: int | None = None
    """Demonstrations of each file, its first ones; all if not given."""
    workers: int = 0
    """Simulator processes; 0 means one per CPU core."""
    out: Path | None = None
    """Folder for `replay.csv` and a picture of each file's first demonstration; by default DEMOS.replay, beside the first."""
    pictures: int = 8
    """Rows of each demonstration whose pictures are compared, evenly spread."""
    picture_tolerance: float = 8.0
    """Mean absolute difference in grey levels (of 255) up to which pictures agree."""
    min_success: float = 0.99
    """Share of each file's demonstrations that must succeed again from the recorded state."""
    observation_timing: ObservationTiming = "auto"
    """Whether a row was observed `before_action` or `after_action`, for files that do not say it."""

    def __post_init__(self) -> None:
        for name, value in (("--episodes", self.episodes), ("--pictures", self.pictures)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; at least 1 is needed")
        if not self.demos:
            raise ValueError("no demonstrations are given; name a *.hdf5 file, or a folder with some")
        if not 0 <= self.min_success <= 1:
            raise ValueError(f"--min-success is {self.min_success:g}; it is a share from 0 to 1, 0.99 for 99 %")

    @property
    def folder(self) -> Path:
        first = self.demos[0].resolve()
        return self.out or first.with_name(f"{first.name}.replay")


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """What a replay found."""

    rows: tuple[ReplayRow, ...]
    findings: tuple[str, ...]
    """One sentence for each thing that does not agree, with its file."""
    notes: tuple[str, ...]
    """Worth knowing, and no failure."""
    folder: Path


def replay(config: ReplayConfig) -> ReplayReport:
    """Replay everything, and write `config.folder`.

    Raises `DataError` where there are no demonstrations or none of a known task, `RendererError` before any work, and `AssetsError`
    where a task needs LIBERO's. A damaged demonstration is a finding."""
    jobs = plan(config)
    choose_renderer()
    config.folder.mkdir(parents=True, exist_ok=True)
    rows: dict[ReplayJob, ReplayRow] = {}
    sentences: dict[ReplayJob, list[str]] = {}
    for job, replayed in _replayed(config, jobs):
        if isinstance(replayed, DataError):
            sentences[job] = [f"cannot be replayed: {replayed}"]
        else:
            rows[job] = row_of(replayed)
            sentences[job] = [finding.sentence for finding in replayed.findings]
            _keep_sheet(config, replayed)
    ordered = tuple(rows[job] for job in jobs if job in rows)
    write_whole(config.folder / FILE_NAME, csv_of(ordered, ReplayRow))
    findings: list[str] = []
    notes: list[str] = []
    for path in dict.fromkeys(job.path for job in jobs):
        of_file = [job for job in jobs if job.path == path]
        rows_of_file = [rows[job] for job in of_file if job in rows]
        findings += about_file(path.name, rows_of_file, [sentences[job] for job in of_file], config.min_success)
        notes += drift_note(path.name, rows_of_file)
    return ReplayReport(rows=ordered, findings=tuple(findings), notes=tuple(notes), folder=config.folder)


def _replayed(config: ReplayConfig, jobs: Sequence[ReplayJob]) -> Iterator[tuple[ReplayJob, Replayed | DataError]]:
    """Every job as it ends, with a progress bar."""
    workers = min(config.workers or os.cpu_count() or 1, len(jobs))
    spawn = multiprocessing.get_context("spawn")
    successes = 0
    with (
        tqdm(total=len(jobs), unit="demo", desc="replay") as bar,
        ProcessPoolExecutor(workers, mp_context=spawn, initializer=start_worker) as pool,
    ):
        job_of = {pool.submit(replay_demo, job): job for job in jobs}
        try:
            for done, future in enumerate(as_completed(job_of), start=1):
                job = job_of.pop(future)  # a finished future keeps its result
                try:
                    replayed: Replayed | DataError = future.result()
                except DataError as error:
                    replayed = error
                successes += isinstance(replayed, Replayed) and replayed.from_state.success
                bar.set_postfix_str(f"success {100 * successes / done:.0f} %")
                bar.update()
                yield job, replayed
        except BrokenProcessPool as error:
            from .workers import SimulatorError

            raise SimulatorError(
                f"a simulator process was killed (out of memory? {workers} of them ran); type the same again, with fewer --workers"
            ) from error
        except BaseException:  # Ctrl-C too: drop what has not begun, or leaving the block would wait for it
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def plan(config: ReplayConfig) -> list[ReplayJob]:
    """A job for each demonstration, in the order of files and numbers. Raises `DataError` as `LiberoHdf5Source` and `task_of` do."""
    jobs: list[ReplayJob] = []
    for given in config.demos:
        source = LiberoHdf5Source(given, observation_timing=config.observation_timing)
        of_file: dict[Path, list[str]] = {}
        keys: Sequence[str] = source.keys()
        for key in keys:
            of_file.setdefault(demo_path(source, key)[0], []).append(key)
        for path, its_keys in of_file.items():
            task = task_of(path, config.benchmark)
            jobs += [
                ReplayJob(
                    path=path,
                    key=f"{path.name}/{key.rpartition('/')[2]}",
                    task=task,
                    timing=config.observation_timing,
                    num_pictures=config.pictures,
                    picture_tolerance=config.picture_tolerance,
                    keep_pictures=key == its_keys[0],
                )
                for key in its_keys[: config.episodes]
            ]
    return jobs


def _keep_sheet(config: ReplayConfig, replayed: Replayed) -> None:
    if replayed.pictures:
        job = replayed.job
        name = "__".join(part for part in (job.task.suite, job.path.stem, job.key.rpartition("/")[2]) if part)
        write_whole(config.folder / f"{name}.png", sheet_of(replayed))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Exit code 1 and a last sentence where something does not agree; raises what `replay` raises."""
    report = replay(tyro.cli(ReplayConfig, args=argv, prog="vlatune replay", description=__doc__))
    if report.rows:
        print(table_of(report.rows))
    print(f"\n{report.folder / FILE_NAME}: one row a demonstration; the pictures beside it show what was compared")
    for note in report.notes:
        print(f"note: {note}")
    for sentence in report.findings:
        print(f"does not agree: {sentence}")
    if report.findings:
        more = f" (and {len(report.findings) - 1} more)" if len(report.findings) > 1 else ""
        raise SystemExit(f"vlatune replay: the files and the simulator do not agree: {report.findings[0]}{more}")


if __name__ == "__main__":
    main()
