"""Pictures from a simulator's process to the policy's through memory that both see.

Through a pipe a decision's two 256-pixel pictures take four times as much of the one process that serves all simulators
(tests/bench/picture_transport.py). The memory has no name: nothing is left behind, however the processes end."""

import mmap
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import IO

import numpy as np


@dataclass(frozen=True, kw_only=True)
class NewMemory:
    """Announces a memory of so many bytes; its handle follows at once."""

    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Places:
    """camera -> (offset, shape) of uint8 pictures in the memory announced last."""

    pictures: Mapping[str, tuple[int, tuple[int, ...]]]


class PictureWriter:
    """The simulator's side. What it wrote holds until it writes again."""

    def __init__(self, connection: Connection, reader_pid: int) -> None:
        self._connection = connection
        self._reader_pid = reader_pid
        self._memory = np.empty(0, np.uint8)

    def write(self, images: Mapping[str, np.ndarray]) -> Places:
        """Announces a new memory first, where the pictures need a larger one."""
        num_bytes = sum(image.nbytes for image in images.values())
        if num_bytes > len(self._memory):
            self._make_memory(num_bytes)
        places, offset = {}, 0
        for camera, image in images.items():
            self._memory[offset : offset + image.nbytes].reshape(image.shape)[:] = image
            places[camera] = (offset, image.shape)
            offset += image.nbytes
        return Places(pictures=places)

    def _make_memory(self, num_bytes: int) -> None:
        with _anonymous_file() as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # full memory is an error here, not a crash at a write
            self._memory = np.frombuffer(mmap.mmap(file.fileno(), num_bytes), np.uint8)
            self._connection.send(NewMemory(num_bytes=num_bytes))
            send_handle(self._connection, file.fileno(), self._reader_pid)


class PictureReader:
    """The policy's side."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def receive(self, announced: NewMemory, connection: Connection) -> None:
        handle = recv_handle(connection)
        try:
            self._memory = np.frombuffer(mmap.mmap(handle, announced.num_bytes, access=mmap.ACCESS_READ), np.uint8)
        finally:
            os.close(handle)

    def read(self, places: Places) -> dict[str, np.ndarray]:
        """camera -> picture, without a copy: it changes once the simulator goes on."""
        return {
            camera: self._memory[offset : offset + int(np.prod(shape))].reshape(shape)
            for camera, (offset, shape) in places.pictures.items()
        }


def _anonymous_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("vlatune-pictures"), "w+b")
    return tempfile.TemporaryFile()
