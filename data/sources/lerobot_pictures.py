"""The pictures of one episode and one camera of a LeRobot dataset, block by block: from an mp4, or from a parquet column.

Both can be iterated over again and again; files are open only meanwhile. A block is (n, rows, columns, 3) uint8, n up to
`BLOCK_FRAMES`.
"""

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..episodes import DataError
from .lerobot_metadata import first_line

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer

BLOCK_FRAMES = 32
TOLERANCE_FRAMES = 0.25
"""How far from the time that is asked for a frame may be: sums of rounded durations drift by a fraction of a frame, and a wrong
frame is one away."""
STEPS_BACK_S = (0.0, 1.0, 8.0, 64.0)
"""How much earlier to look for a keyframe when a seek went behind the picture that is wanted."""

NUM_THREADS = min(8, len(os.sched_getaffinity(0)))
"""That decode PNG; PIL lets go of the interpreter meanwhile."""


@dataclass(frozen=True, kw_only=True)
class VideoPictures:
    """Frames of an mp4, found by their time."""

    path: Path
    times_s: np.ndarray
    """(N,) float64, within the file, rising."""
    fps: float
    size: tuple[int, int]
    """Rows and columns that the dataset says its pictures have."""
    where: str
    """Episode and camera, for messages."""

    def __iter__(self) -> Iterator[np.ndarray]:
        pictures = self._pictures()
        while block := list(islice(pictures, BLOCK_FRAMES)):
            yield np.stack(block)

    def _pictures(self) -> Iterator[np.ndarray]:
        import av
        from av.video.reformatter import VideoReformatter

        to_rgb = VideoReformatter()  # one for all: it keeps its tables
        tolerance_s = TOLERANCE_FRAMES / self.fps
        try:
            with av.open(str(self.path)) as container:
                stream = self._checked_stream(container)
                frames = self._sound(_frames_from_keyframe(container, stream, float(self.times_s[0]) + tolerance_s))
                for time_s in self.times_s:
                    frame = next((it for it in frames if _time_s(it) >= time_s - tolerance_s), None)
                    if frame is None or _time_s(frame) > time_s + tolerance_s:
                        raise DataError(
                            f"{self.where}: {self.path} has no picture at {time_s:.3f} s"
                            + (" or later" if frame is None else f"; the next one is at {_time_s(frame):.3f} s")
                            + ": it is cut short or belongs to other data; get it again"
                        )
                    _check_size(self.where, (frame.height, frame.width), self.size)
                    yield to_rgb.reformat(frame, format="rgb24").to_ndarray()
        except (av.FFmpegError, OSError) as error:
            raise DataError(
                f"{self.where}: {self.path} cannot be decoded ({first_line(error)}); download or copy it again"
            ) from error

    def _checked_stream(self, container: "InputContainer") -> "VideoStream":
        stream = next(iter(container.streams.video), None)
        if stream is None or stream.codec_context is None:
            raise DataError(
                f"{self.where}: {self.path} has no video that can be decoded: it is damaged (download or copy it again) or in a codec that "
                "this machine's PyAV lacks (re-encode it as h264 or AV1)"
            )
        if stream.average_rate and abs(float(stream.average_rate) / self.fps - 1) > 0.1:
            raise DataError(
                f"{self.where}: {self.path} has {float(stream.average_rate):g} frames a second and meta/info.json says {self.fps:g}; they "
                "do not belong together: get the dataset again"
            )
        stream.thread_type = "AUTO"
        return stream

    def _sound(self, frames: Iterator["VideoFrame"]) -> Iterator["VideoFrame"]:
        """Decoders invent what is damaged, and say so; frames before the first that is wanted count, since it is built on them."""
        for frame in frames:
            if frame.is_corrupt:
                raise DataError(
                    f"{self.where}: {self.path} is damaged at {_time_s(frame):.3f} s; download or copy it again"
                )
            yield frame


@dataclass(frozen=True, kw_only=True)
class StoredPictures:
    """PNG or JPEG bytes in a column of a parquet file, one row a frame."""

    path: Path
    column: str
    first_row: int
    num_frames: int
    size: tuple[int, int]
    """Rows and columns that the dataset says its pictures have."""
    where: str
    """Episode and camera, for messages."""

    def __iter__(self) -> Iterator[np.ndarray]:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        try:
            # A buffer, or the whole column of a row group (up to all of the file) is in memory at once.
            with (
                ParquetFile(self.path, buffer_size=2**20) as parquet,
                ThreadPoolExecutor(NUM_THREADS, "pictures") as threads,
            ):
                groups, skipped = self._row_groups(parquet.metadata)
                batches = parquet.iter_batches(BLOCK_FRAMES, row_groups=groups, columns=[self.column])
                values = (value for batch in batches for value in batch.column(0))
                episode = islice(values, skipped, skipped + self.num_frames)
                while block := [value.as_py() for value in islice(episode, BLOCK_FRAMES)]:
                    yield np.stack(list(threads.map(self._decoded, block)))
        except (ArrowException, OSError) as error:
            raise DataError(
                f"{self.where}: {self.path} cannot be read ({first_line(error)}); download or copy it again"
            ) from error

    def _row_groups(self, metadata: Any) -> tuple[list[int], int]:
        """Those with rows of the episode, and how many rows of the first one are before it."""
        groups: list[int] = []
        skipped = start = 0
        for group in range(metadata.num_row_groups):
            end = start + metadata.row_group(group).num_rows
            if start < self.first_row + self.num_frames and end > self.first_row:
                skipped = skipped if groups else self.first_row - start
                groups.append(group)
            start = end
        return groups, skipped

    def _decoded(self, stored: Any) -> np.ndarray:
        from PIL import Image

        content = stored.get("bytes") if isinstance(stored, dict) else stored
        if not isinstance(content, bytes):
            raise DataError(
                f"{self.where}: {self.path} holds no pictures in `{self.column}` but {stored!r:.80}; LeRobot puts their bytes there: "
                "save the dataset again with its pictures"
            )
        try:
            picture = Image.open(io.BytesIO(content))
            picture.load()
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises on damaged pictures
            raise DataError(
                f"{self.where}: a picture in {self.path} is damaged ({first_line(error)}); download or copy it again"
            ) from error
        if picture.mode != "RGB":
            raise DataError(
                f"{self.where}: {self.path} holds pictures of mode {picture.mode}; they must be RGB: save them as such, or choose "
                "another camera"
            )
        _check_size(self.where, (picture.height, picture.width), self.size)
        return np.asarray(picture)


def _frames_from_keyframe(container: "InputContainer", stream: "VideoStream", until_s: float) -> Iterator["VideoFrame"]:
    """Frames in the order of their times, from a keyframe at or before `until_s`.

    A seek goes by the time of decoding. It can end at a keyframe that is shown too late: B-frames that are shown before it
    are decoded after it, and need the keyframe before. So what a seek led to is looked at."""
    from av import time_base

    for back_s in STEPS_BACK_S:
        container.seek(max(0, int((until_s - back_s) * time_base)))
        frames = container.decode(stream)
        first = next(frames, None)
        if first is not None and first.key_frame and _time_s(first) <= until_s:
            return chain((first,), frames)
        if back_s >= until_s:
            break
    container.seek(0)
    return container.decode(stream)


def _time_s(frame: "VideoFrame") -> float:
    """NaN, which is no time that is asked for, where the file does not say."""
    return float("nan") if frame.time is None else float(frame.time)


def _check_size(where: str, size: tuple[int, int], said: tuple[int, int]) -> None:
    if size != said:
        raise DataError(
            f"{where} has pictures of {size[0]} x {size[1]} (rows x columns) and meta/info.json says {said[0]} x {said[1]}; they do "
            "not belong together: get the dataset again"
        )
