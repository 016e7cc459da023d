"""``vlatune merge``: the rows of a sweep's shards, joined; what contradicts itself is refused."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import tyro

from ..data.episodes import DataError
from .episode_log import hold, read_rows, write_rows
from .results import CLOCK, FILE_NAME, EpisodeKey, EpisodeRow, locate
from .run_folder import find_run
from .shards import shard_folders

_MAY_DIFFER = {*CLOCK, "video", "error", "device"}


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Join the rows of shards (of `vlatune sweep --shard`), or of CSVs that were made with the same weights on several machines.

    An episode that several have is kept once; where they contradict each other, nothing is written."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """A run (its shards are joined), or CSV files and folders with an episodes.csv."""
    out: Path | None = None
    """Folder for the joined episodes.csv; a run's shards go to its evaluation folder. Rows that are there already stay."""


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(MergeConfig, args=argv, prog="vlatune merge")
    print(merge(config))


def merge(config: MergeConfig) -> str:
    """Write the joined `episodes.csv` and return what was done, in a sentence. Raises `DataError` for contradictions, files that are
    not there, and a sweep that is writing."""
    sources, out = _sources(config)
    out.mkdir(parents=True, exist_ok=True)
    with hold(out):
        target = out / FILE_NAME
        known: dict[EpisodeKey, tuple[EpisodeRow, Path]] = {}
        for source in ([target] if target.exists() else []) + sources:
            for row in read_rows(source):
                moved = replace(row, video=_moved(row.video, source.parent, out))
                known[row.key] = _agreed(known.get(row.key), moved, source)
        rows = [row for row, _ in known.values()]
        write_rows(target, rows)
    errors = sum(row.outcome == "error" for row in rows)
    remark = f", {errors} of them errors, which the next sweep runs again" if errors else ""
    return f"{len(rows)} episodes of {len(sources)} files{remark}: {target}"


def _sources(config: MergeConfig) -> tuple[list[Path], Path]:
    """The CSVs, and the folder that they are joined in."""
    if not config.paths:
        raise DataError("nothing to join was given; type for instance: vlatune merge runs/pocket")
    if len(config.paths) == 1 and config.paths[0].is_dir():
        (path,) = config.paths
        for evaluation in (path, find_run(path).evaluation):
            if shards := shard_folders(evaluation):
                return [locate(shard) for shard in shards], config.out or evaluation
        raise DataError(
            f"{path} has no shards (shard-0-of-2/ …); `vlatune sweep RUN --shard 0/2` writes them, and CSVs are joined with --out"
        )
    if config.out is None:
        raise DataError("several files are joined into a folder of their own; add --out FOLDER")
    return [locate(path) for path in config.paths], config.out


def _agreed(there: tuple[EpisodeRow, Path] | None, row: EpisodeRow, source: Path) -> tuple[EpisodeRow, Path]:
    """The row to keep of two for the same episode: an ending counts more than an error, else the first."""
    if there is None or there[0].outcome == "error":
        return row, source
    first, its_source = there
    if row.outcome != "error":
        columns = [f.name for f in fields(EpisodeRow) if f.name not in _MAY_DIFFER]
        different = {name: (getattr(first, name), getattr(row, name)) for name in columns}
        different = {name: pair for name, pair in different.items() if pair[0] != pair[1]}
        if different:
            raise DataError(_contradiction(first, its_source, source, different))
        if row.video and not first.video:  # recorded since the last merge
            return replace(first, video=row.video), its_source
    return there


def _contradiction(row: EpisodeRow, first: Path, second: Path, different: Mapping[str, tuple[object, object]]) -> str:
    what = ", ".join(f"{name} {a!r} and {b!r}" for name, (a, b) in different.items())
    episode = f"{row.suite} task {row.task_id} init state {row.init_state} of {row.checkpoint or row.actor}"
    if "run" in different:
        return f"{first} and {second} are of different runs ({what}); compare them with vlatune report {first} {second}"
    return f"{first} and {second} contradict each other on {episode}: {what}; find out which machine differs, and leave its file out"


def _moved(video: str, source: Path, out: Path) -> str:
    """The path as seen from `out`; the file stays where it is."""
    return Path(os.path.relpath(source / video, out)).as_posix() if video else ""


if __name__ == "__main__":
    main()
