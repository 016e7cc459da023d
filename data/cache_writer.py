"""Writing a cache, episode by episode, so that a kill at any moment costs at most the episode at hand.

Work goes on in `<cache>.unfinished/`: `plan.json` says what it is made from, `progress.jsonl` has one line for each episode whose
rows are all in `cache/`, and when the manifest is written `cache/` is renamed to its place. Only then is there a cache.
"""

import fcntl
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import pyarrow
import pyarrow.parquet

from .cache import EPISODE_COLUMNS, FileRecord, Manifest, unfinished_path
from .episodes import DataError, Episode
from .files import file_sha256, json_bytes, write_whole
from .images import ImageRule
from .language import Language
from .normalise import Statistics
from .robots.card import RobotCard

NUM_THREADS = min(8, len(os.sched_getaffinity(0)))
"""That resize pictures; PIL lets go of the interpreter meanwhile."""


@dataclass(frozen=True, kw_only=True)
class WrittenEpisode:
    """A line of `progress.jsonl`."""

    source: str
    suite: str
    task: str
    instruction: str
    length: int


class CacheWriter:
    """One writer of one cache; a context manager that holds the folder's lock."""

    def __init__(
        self,
        path: Path,
        *,
        source: Mapping[str, str],
        settings: Mapping[str, Any],
        robot: RobotCard,
        image_rule: ImageRule,
    ) -> None:
        """Begin, or continue what a killed writer left. Raises `DataError` when another process is at it, or when what
        was left was made from something else."""
        self._path, self._source, self._settings = path, source, settings
        self._robot, self._image_rule = robot, image_rule
        self._work = unfinished_path(path)
        self._cache = self._work / "cache"
        self._cache.mkdir(parents=True, exist_ok=True)
        self._lock = (self._work / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise DataError(f"another process is preparing {path}; wait for it, or give another --out") from None
        self._check_plan()
        px = image_rule.size_px
        self._row_bytes = {f"images_{camera}.u8": px * px * 3 for camera in robot.cameras}
        self._row_bytes |= {"state.f32": 4 * len(robot.state_names), "actions.f32": 4 * len(robot.action_names)}
        self.written = self._continue()
        self._files: dict[str, IO[bytes]] = {name: (self._cache / name).open("ab") for name in self._row_bytes}
        self._progress = (self._work / "progress.jsonl").open("ab")
        self._threads = ThreadPoolExecutor(NUM_THREADS, "prepare")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        for file in (*self._files.values(), self._progress):
            file.close()
        self._lock.close()

    def append(self, episode: Episode) -> None:
        """Prepare the episode's images and add all its rows, then the line that says they are there."""
        missing = [camera for camera in self._robot.cameras if camera not in episode.images]
        if missing:
            raise DataError(f"{episode.key} has no images of {', '.join(missing)}, which robot {self._robot.name} has")
        length = len(episode.actions_NA)
        for name, values in (("state.f32", episode.state_NS), ("actions.f32", episode.actions_NA)):
            rows = np.ascontiguousarray(values.astype("<f4"))
            if rows.nbytes != length * self._row_bytes[name]:
                raise DataError(
                    f"{episode.key} has {rows.shape} for {name}; that is not {length} rows of the robot's size"
                )
            if not np.isfinite(rows).all():
                raise DataError(f"{episode.key} has NaN or infinity in {name}; record it again or leave it out")
            self._files[name].write(rows.data)
        for camera in self._robot.cameras:
            num_pictures = 0
            for block in self._prepared(episode.images[camera]):
                self._files[f"images_{camera}.u8"].write(block.data)
                num_pictures += len(block)
            if num_pictures != length:
                raise DataError(
                    f"{episode.key} has {num_pictures} pictures of {camera} and {length} actions; record it again or leave it out"
                )
        for file in self._files.values():
            _to_disk(file)
        written = WrittenEpisode(
            source=episode.key,
            suite=episode.suite,
            task=episode.task,
            instruction=episode.instruction,
            length=length,
        )
        self._progress.write(json.dumps(asdict(written), ensure_ascii=False).encode() + b"\n")
        _to_disk(self._progress)
        self.written.append(written)

    def _prepared(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The blocks as the cache keeps them, in order: while one is written, the next ones are read and resized."""
        ahead: deque[Future[np.ndarray]] = deque()
        for block in blocks:
            ahead.append(self._threads.submit(self._image_rule.prepare, block))
            if len(ahead) > NUM_THREADS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def finish(self, splits: Sequence[str], language: Language) -> None:
        """Write the rest (`splits`: one of "train", "validation" per episode), then rename. Safe to repeat after a kill."""
        self._remove_all_but_rows()
        lengths = np.array([episode.length for episode in self.written], np.int64)
        num_frames = int(lengths.sum())
        train_N = np.repeat(np.array(splits) == "train", lengths)
        columns = {
            "start": np.cumsum(lengths) - lengths,
            "length": lengths,
            **{name: [getattr(e, name) for e in self.written] for name in ("suite", "task", "instruction", "source")},
            "split": list(splits),
        }
        table = pyarrow.table({name: columns[name] for name in EPISODE_COLUMNS})
        pyarrow.parquet.write_table(table, self._cache / "episodes.parquet")
        language.save(self._cache / "language")
        self._statistics(num_frames, train_N).save(self._cache / "statistics.json")
        files = sorted(file for file in self._cache.rglob("*") if file.is_file())
        manifest = Manifest(
            source=self._source,
            settings=self._settings,
            robot=self._robot,
            image_rule=self._image_rule,
            cameras=self._robot.cameras,
            language=language.identity,
            num_frames=num_frames,
            num_episodes=len(self.written),
            num_validation_episodes=list(splits).count("validation"),
            num_tasks=len({episode.task for episode in self.written}),
            files={
                file.relative_to(self._cache).as_posix(): FileRecord(size=file.stat().st_size, sha256=file_sha256(file))
                for file in files
            },
        )
        write_whole(self._cache / "manifest.json", manifest.to_bytes())
        self._cache.rename(self._path)
        shutil.rmtree(self._work)

    def _remove_all_but_rows(self) -> None:
        """What a writer killed while finishing left: whole files, and temporary ones that nobody came back to rename."""
        for path in self._cache.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in self._row_bytes:
                path.unlink()

    def _statistics(self, num_frames: int, train_N: np.ndarray) -> Statistics:
        state_NS, actions_NA = (
            np.memmap(self._cache / name, np.float32, "r", shape=(num_frames, self._row_bytes[name] // 4))
            for name in ("state.f32", "actions.f32")
        )
        return Statistics.compute(state_NS, actions_NA, train_N)

    def _check_plan(self) -> None:
        """Write the plan, or compare it with the one that a killed writer left."""
        plan = {"source": dict(self._source), "settings": dict(self._settings)}
        file = self._work / "plan.json"
        if not file.exists():
            write_whole(file, json_bytes(plan))
            return
        begun = json.loads(file.read_bytes())
        changes = differences(begun["source"], begun["settings"], self._source, self._settings)
        if changes:
            self._lock.close()
            raise DataError(
                f"{self._work} was begun from something else ({changes}); delete it (rm -r {self._work}) or give another --out"
            )

    def _continue(self) -> list[WrittenEpisode]:
        """The episodes that are whole on disk; everything behind them is cut off."""
        file = self._work / "progress.jsonl"
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []  # a line without its end is not whole
        on_disk = {name: _size(self._cache / name) // row for name, row in self._row_bytes.items()}
        episodes: list[WrittenEpisode] = []
        num_frames = 0
        for line in lines:
            episode = WrittenEpisode(**json.loads(line))
            if num_frames + episode.length > min(on_disk.values()):
                break
            num_frames += episode.length
            episodes.append(episode)
        for name, row in self._row_bytes.items():
            with (self._cache / name).open("ab") as data:
                data.truncate(num_frames * row)
        whole = b"".join(line + b"\n" for line in lines[: len(episodes)])
        write_whole(file, whole)
        return episodes


def differences(
    old_source: Mapping[str, str],
    old_settings: Mapping[str, Any],
    source: Mapping[str, str],
    settings: Mapping[str, Any],
) -> str:
    """What differs between two plans, for a person; empty if nothing does."""
    said = [
        f"{name} was {old_settings.get(name)!r} and is now {settings.get(name)!r}"
        for name in sorted({*old_settings, *settings})
        if old_settings.get(name) != settings.get(name)
    ]
    for what, names in (
        ("gone", [name for name in old_source if name not in source]),
        ("new", [name for name in source if name not in old_source]),
        ("changed", [name for name in source if old_source.get(name, source[name]) != source[name]]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            said.append(f"{what}: {', '.join(names[:3])}{more}")
    return "; ".join(said)


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
