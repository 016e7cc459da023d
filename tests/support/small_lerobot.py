"""LeRobot datasets in both published layouts, written with plain pyarrow and PyAV; and what tests do to them.

As LeRobot does it: in v3.0 each episode's video is encoded by itself, and a file is several of them put together without encoding
again; the times in `meta/episodes` are the sums of their durations.
"""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlatune.data.robots.libero_panda import LIBERO_PANDA
from vlatune.data.sources.lerobot_dataset import LeRobotDatasetSource

FRONT, WRIST = "observation.images.image", "observation.images.image2"
LOSSLESS = "libx264rgb"
"""h264 of the colours themselves; with `qp` 0, what comes out is what went in."""
LOSSLESS_OPTIONS = {"qp": "0", "g": "8", "bf": "2"}


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One episode of N frames."""

    instruction: str
    state_NS: np.ndarray
    actions_NA: np.ndarray
    pictures: dict[str, np.ndarray]
    """Camera key -> (N, rows, columns, 3) uint8."""


def recordings(
    lengths: Sequence[int] = (7, 5, 9),
    *,
    keys: Sequence[str] = (FRONT, WRIST),
    instructions: Sequence[str] = ("pick up the red cube", "pick up the blue cube"),
    size: tuple[int, int] = (16, 24),
    seed: int = 0,
) -> list[Recording]:
    """Random ones; every pixel's red is the episode's number and its green the frame's. The gripper opens, then closes."""
    random = np.random.default_rng(seed)
    found = []
    for i, length in enumerate(lengths):
        actions = random.uniform(-1, 1, (length, 7)).astype(np.float32)
        actions[:, 6] = np.where(np.arange(length) < length // 2, -1, 1)
        pictures = {key: random.integers(0, 256, (length, *size, 3), dtype=np.uint8) for key in keys}
        for pictures_NHWC in pictures.values():
            pictures_NHWC[..., 0], pictures_NHWC[..., 1] = i, np.arange(length)[:, None, None]
        found.append(
            Recording(
                instruction=instructions[i % len(instructions)],
                state_NS=random.normal(size=(length, 8)).astype(np.float32),
                actions_NA=actions,
                pictures=pictures,
            )
        )
    return found


def write_lerobot(
    folder: Path,
    episodes: Sequence[Recording],
    *,
    version: str = "v3.0",
    stored_as: str = "video",
    fps: int = 20,
    episodes_per_file: int = 2,
    state: str = "observation.state",
    action: str = "action",
    codec: str = LOSSLESS,
    options: dict[str, str] | None = None,
    pix_fmt: str = "rgb24",
) -> Path:
    """`episodes_per_file` is of v3.0; v2.x has one."""
    v3 = version.startswith("v3")
    texts = list(dict.fromkeys(episode.instruction for episode in episodes))
    keys = list(episodes[0].pictures) if episodes else []
    size = episodes[0].pictures[keys[0]].shape[1:] if keys else ()
    encoding = {"codec": codec, "options": LOSSLESS_OPTIONS if options is None else options, "pix_fmt": pix_fmt}
    tables, rows = [], []
    for index, episode in enumerate(episodes):
        tables.append(_table(index, episode, texts.index(episode.instruction), fps, state, action, stored_as, not v3))
        rows.append({"episode_index": index, "tasks": [episode.instruction], "length": len(episode.actions_NA)})
    if v3:
        for first in range(0, len(episodes), episodes_per_file):
            group, file = range(first, min(first + episodes_per_file, len(episodes))), first // episodes_per_file
            _write_table(
                folder / f"data/chunk-000/file-{file:03d}.parquet", pa.concat_tables([tables[i] for i in group])
            )
            for i in group:
                rows[i] |= {"data/chunk_index": 0, "data/file_index": file}
            for key in keys if stored_as == "video" else ():
                path = folder / f"videos/{key}/chunk-000/file-{file:03d}.mp4"
                spans = write_joined_videos(path, [episodes[i].pictures[key] for i in group], fps=fps, **encoding)
                for i, (from_s, to_s) in zip(group, spans, strict=True):
                    rows[i] |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": file}
                    rows[i] |= {f"videos/{key}/from_timestamp": from_s, f"videos/{key}/to_timestamp": to_s}
        (folder / "meta").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"task_index": range(len(texts)), "task": texts}), folder / "meta/tasks.parquet")
        if rows:
            _write_table(folder / "meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(rows))
    else:
        for index, episode in enumerate(episodes):
            _write_table(folder / f"data/chunk-000/episode_{index:06d}.parquet", tables[index])
            for key in keys if stored_as == "video" else ():
                path = folder / f"videos/chunk-000/{key}/episode_{index:06d}.mp4"
                write_video(path, episode.pictures[key], fps=fps, **encoding)
        _write_lines(folder / "meta/tasks.jsonl", [{"task_index": i, "task": text} for i, text in enumerate(texts)])
        _write_lines(folder / "meta/episodes.jsonl", rows)
    features = {
        state: {"dtype": "float32", "shape": [episodes[0].state_NS.shape[1] if episodes else 8]},
        action: {"dtype": "float32", "shape": [episodes[0].actions_NA.shape[1] if episodes else 7]},
        **{key: {"dtype": stored_as, "shape": list(size), "names": ["height", "width", "channel"]} for key in keys},
        "timestamp": {"dtype": "float32", "shape": [1]},
        **{name: {"dtype": "int64", "shape": [1]} for name in ("frame_index", "episode_index", "index", "task_index")},
    }
    info = {
        "codebase_version": version,
        "fps": fps,
        "total_episodes": len(episodes),
        "total_frames": sum(row["length"] for row in rows),
        "total_tasks": len(texts),
        "chunks_size": 1000,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        if v3
        else "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": None
        if stored_as == "image"
        else "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        if v3
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    (folder / "meta/info.json").write_text(json.dumps(info))
    return folder


def write_video(
    path: Path, pictures_NHWC: np.ndarray, *, fps: int, codec: str, options: dict[str, str], pix_fmt: str
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, fps, options=options)
        stream.height, stream.width = pictures_NHWC.shape[1:3]
        stream.pix_fmt = pix_fmt
        for picture_HWC in pictures_NHWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")))
        container.mux(stream.encode())


def write_joined_videos(
    path: Path, episodes: Sequence[np.ndarray], *, fps: int, **encoding: object
) -> list[tuple[float, float]]:
    """One file of each episode's encoded frames; returns from when to when each one is, in seconds."""
    parts = [path.with_name(f"part{i}.mp4") for i in range(len(episodes))]
    spans, end_s = [], 0.0
    for part, pictures in zip(parts, episodes, strict=True):
        write_video(part, pictures, fps=fps, **encoding)
        with av.open(str(part)) as container:
            stream = container.streams.video[0]
            duration_s = float(stream.duration * stream.time_base)
        spans.append((end_s, end_s + duration_s))
        end_s += duration_s
    list_file = path.with_suffix(".ffconcat")
    list_file.write_text("ffconcat version 1.0\n" + "".join(f"file '{part.resolve()}'\n" for part in parts))
    with av.open(str(list_file), format="concat", options={"safe": "0"}) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
        stream.time_base = source.streams.video[0].time_base
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    for file in (*parts, list_file):
        file.unlink()
    return spans


def _table(
    index: int,
    episode: Recording,
    task_index: int,
    fps: int,
    state: str,
    action: str,
    stored_as: str,
    fixed_size_lists: bool,
) -> pa.Table:
    length = len(episode.actions_NA)
    columns: dict[str, pa.Array] = {}
    for name, values in ((state, episode.state_NS), (action, episode.actions_NA)):
        kind = pa.list_(pa.float32(), values.shape[1]) if fixed_size_lists else pa.list_(pa.float32())
        columns[name] = pa.array(values.tolist(), kind)
    if stored_as == "image":
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        for key, pictures in episode.pictures.items():
            stored = [{"bytes": png(picture), "path": f"frame-{n:06d}.png"} for n, picture in enumerate(pictures)]
            columns[key] = pa.array(stored, kind)
    columns["timestamp"] = pa.array(np.arange(length, dtype=np.float32) / np.float32(fps))
    columns["frame_index"] = pa.array(np.arange(length))
    columns["episode_index"] = pa.array(np.full(length, index))
    columns["task_index"] = pa.array(np.full(length, task_index))
    return pa.table(columns)


def png(picture_HWC: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture_HWC).save(file, "PNG")
    return file.getvalue()


def _write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def _write_lines(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def open_dataset(folder: Path | str, **options: object) -> LeRobotDatasetSource:
    return LeRobotDatasetSource(folder, **{"robot": LIBERO_PANDA, **options})


def whole(blocks: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(blocks))


def read_pictures(folder: Path, key: str = "episode_000000", camera: str = "agentview") -> np.ndarray:
    return whole(open_dataset(folder).read(key).images[camera])


def change_info(folder: Path, **changes: object) -> None:
    file = folder / "meta/info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_column(file: Path, column: str, values: pa.Array | None) -> None:
    """Replace a column, or drop it."""
    table = pq.read_table(file)
    place = table.column_names.index(column)
    pq.write_table(table.remove_column(place) if values is None else table.set_column(place, column, values), file)


def bars(length: int, episode: int) -> np.ndarray:
    """(N, 64, 64, 3): brightness that survives lossy compression. Left: the frame's number modulo 16; right: the episode."""
    pictures = np.empty((length, 64, 64, 3), np.uint8)
    pictures[:, :, :32] = (16 + 15 * (np.arange(length) % 16))[:, None, None, None]
    pictures[:, :, 32:] = 16 + 15 * episode
    return pictures


def numbers_in(pictures: np.ndarray) -> tuple[list[int], list[int]]:
    left, right = (pictures[:, 8:-8, part].mean(axis=(1, 2, 3)) for part in (slice(8, 24), slice(40, 56)))
    return [list(np.round((side - 16) / 15).astype(int)) for side in (left, right)]
