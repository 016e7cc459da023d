"""Appending to `episodes.csv` so that a kill at any moment loses no finished row and leaves none half-written."""

import csv
import fcntl
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Self

from ..data.episodes import DataError
from ..data.files import full_disk_said, write_whole
from .results import FILE_NAME, EpisodeKey, EpisodeRow, check_columns, header


class EpisodeLog:
    """The `episodes.csv` of one folder, held by one process.

    On opening, a last line torn by a kill is cut off and rows of outcome `error` are taken out, so that those episodes are
    run again. Each `append` is one write, flushed to the disk."""

    def __init__(self, folder: Path) -> None:
        """Opens or creates it. Raises `DataError` if another process holds it or if its rows are not this version's."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE_NAME
        self._lock = hold(folder)
        for leftover in folder.glob(f"{FILE_NAME}.tmp*"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        rows = read_rows(self.path) if self.path.exists() else []
        kept = [row for row in rows if row.outcome != "error"]
        self.rows: dict[EpisodeKey, EpisodeRow] = {row.key: row for row in kept}
        write_rows(self.path, self.rows.values())
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def append(self, row: EpisodeRow) -> None:
        """Raises `DataError` if the row does not fit on the disk; what was there stays whole."""
        if row.key in self.rows:
            raise ValueError(f"{self.path} already has the row of {row.key}")
        line = row.to_line().encode()
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError("the disk is full")
            os.fsync(self._file)
        except OSError as problem:
            os.ftruncate(self._file, size)
            raise DataError(
                f"could not write to {self.path}: {problem}; its {len(self.rows)} rows are kept"
            ) from problem
        self.rows[row.key] = row

    def add_videos(self, videos: Mapping[EpisodeKey, str]) -> None:
        """The paths of episodes that were recorded after their rows had been written."""
        os.close(self._file)
        try:
            self.rows |= {key: replace(self.rows[key], video=video) for key, video in videos.items()}
            write_rows(self.path, self.rows.values())
        finally:
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def close(self) -> None:
        os.close(self._file)
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hold(folder: Path) -> IO[str]:
    """The right to write the folder's `episodes.csv`, until the returned file is closed. Raises `DataError` if another process has it."""
    lock = (folder / ".episodes.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise DataError(
            f"another sweep is writing {folder / FILE_NAME}; wait for it, or give this one another --out"
        ) from None
    return lock


def write_rows(path: Path, rows: Iterable[EpisodeRow]) -> None:
    """All of the file, or nothing: raises `DataError` where the disk is full."""
    with full_disk_said(path):
        write_whole(path, "".join((header(), *(row.to_line() for row in rows))).encode())


def read_rows(path: Path) -> list[EpisodeRow]:
    """All whole rows; a last line that a kill has torn is left out. Raises `DataError` for other columns and damaged lines."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1].decode()
    if not whole:
        return []
    lines = list(csv.reader(whole.splitlines()))
    check_columns(lines[0], path)
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        try:
            rows.append(EpisodeRow.from_cells(cells))
        except (ValueError, KeyError) as problem:
            raise DataError(
                f"line {number} of {path} is damaged ({problem}); delete that line and start again"
            ) from None
    return rows
