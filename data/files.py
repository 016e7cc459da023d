"""Whole files or none, and what is in them: atomic writing and digests."""

import errno
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .episodes import DataError

JsonValue = str | int | float | bool | None | Sequence[Any] | Mapping[str, Any]

WHOLE_DIGEST_BYTES = 64 * 2**20
"""Files up to this size are hashed whole by `quick_digest`; larger ones are sampled."""
SAMPLE_BYTES = 2**16
NUM_SAMPLES = 256


def write_whole(path: Path, content: bytes) -> None:
    """Write `path` so that a reader (or a restart after a kill) sees the old file or the new one, never a part."""
    # The machine, too: containers that share a folder often share their process ids.
    unfinished = path.with_name(f"{path.name}.tmp{os.getpid()}-{platform.node()}")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def full_disk_said(path: Path) -> Iterator[None]:
    """Around writing what can be continued: a full disk becomes one sentence, a `DataError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"the disk of {path} is full; free some space and run the same command again: it continues"
        ) from error


def json_bytes(value: JsonValue) -> bytes:
    """JSON with sorted keys: equal values give equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def file_sha256(path: Path) -> str:
    """Of every byte."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def quick_digest(path: Path) -> str:
    """`<size>:<sha256>`, in a fraction of a second whatever the size.

    Files above `WHOLE_DIGEST_BYTES` are hashed at `NUM_SAMPLES` evenly spaced places (the first and the last bytes
    among them): enough to tell another recording from this one, not to find a flipped bit.
    """
    size = path.stat().st_size
    if size <= WHOLE_DIGEST_BYTES:
        return f"{size}:{file_sha256(path)}"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for k in range(NUM_SAMPLES):
            file.seek((size - SAMPLE_BYTES) * k // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return f"{size}:{digest.hexdigest()}"
