"""Rows of a file on disk, gathered in any order: at the speed of memory where the system has cached it, else of the disk.

Shape letters: N rows of the file, K wanted rows.
"""

import os
import resource
from pathlib import Path

import numpy as np


class RowFile:
    """Equal rows in one file, seen through a memory map of it."""

    def __init__(self, path: Path, rows: np.ndarray) -> None:
        """`rows` is the whole file, mapped; its first axis is N."""
        self._path, self._rows = path, rows.reshape(len(rows), -1)
        self.is_cold = True
        """Whether something was read from disk of late."""
        self._blocks_read = 0

    def announce(self, index_K: np.ndarray) -> None:
        """Have the disk read these rows, all at once and without waiting; a memory map alone asks for one after the other."""
        size = self._rows.strides[0]
        with self._path.open("rb") as file:
            for index in index_K.tolist():
                os.posix_fadvise(file.fileno(), index * size, size, os.POSIX_FADV_WILLNEED)

    def take(self, index_K: np.ndarray, out: np.ndarray) -> None:
        """Write the rows into `out`, which is contiguous and has their dtype and size. Errors of the disk end the process (SIGBUS), as
        with every memory map."""
        # "clip" writes straight into `out`, where "raise" goes through a copy.
        np.take(self._rows, index_K, axis=0, out=out.reshape(len(index_K), -1), mode="clip")
        before, self._blocks_read = self._blocks_read, _blocks_read()
        self.is_cold = self._blocks_read != before


def _blocks_read() -> int:
    """By this thread, from disk, since it began."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
