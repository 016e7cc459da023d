"""What a LeRobot dataset says of itself: its `meta/` folder, in codebase versions v2.0, v2.1 and v3.0.

    v2.0, v2.1                                      v3.0: many episodes a file
    meta/info.json                                  meta/info.json
    meta/tasks.jsonl                                meta/tasks.parquet
    meta/episodes.jsonl                             meta/episodes/chunk-000/file-000.parquet
    data/chunk-000/episode_000012.parquet           data/chunk-000/file-000.parquet
    videos/chunk-000/<key>/episode_000012.mp4       videos/<key>/chunk-000/file-000.mp4

v2.0 differs from v2.1 in its statistics only, which are not read. Read from the format's own writer, huggingface/lerobot.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..episodes import DataError

Storage = Literal["video", "image"]
V3 = "v3.0"
VERSIONS = ("v2.0", "v2.1", V3)


@dataclass(frozen=True, kw_only=True)
class PictureFeature:
    """A camera of the dataset."""

    stored_as: Storage
    """`video`: mp4 files; `image`: PNG or JPEG bytes in the parquet files."""
    size: tuple[int, int]
    """Rows and columns."""


@dataclass(frozen=True, kw_only=True)
class VideoSpan:
    """Where an episode is in a video file: from `from_s` until before `to_s`, in seconds."""

    file: str
    from_s: float
    to_s: float


@dataclass(frozen=True, kw_only=True)
class EpisodeRecord:
    """Where an episode is. Files are relative to the dataset's folder."""

    index: int
    num_frames: int
    data_file: str
    videos: Mapping[str, VideoSpan]
    """Camera key -> its video; of the keys that were asked for."""

    @property
    def key(self) -> str:
        return f"episode_{self.index:06d}"


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """`meta/info.json`."""

    folder: Path
    version: str
    fps: float
    num_episodes: int
    episodes_per_chunk: int
    """v2 only."""
    data_path: str
    """Template of the parquet files' paths."""
    video_path: str | None
    vectors: Mapping[str, int]
    """Name of each column that holds one list of numbers a frame -> how many."""
    pictures: Mapping[str, PictureFeature]
    """Every colour camera by its key; depth cameras are left out."""

    def files(self) -> list[Path]:
        """What describes the dataset; statistics are not among them."""
        meta = self.folder / "meta"
        if self.version == V3:
            return [meta / "info.json", meta / "tasks.parquet", *sorted((meta / "episodes").glob("*/*.parquet"))]
        return [meta / name for name in ("info.json", "tasks.jsonl", "episodes.jsonl")]


def read_info(folder: Path) -> DatasetInfo:
    """Raises `DataError` where `meta/info.json` is missing, damaged, or of another version."""
    file = folder / "meta" / "info.json"
    if not file.is_file():
        raise DataError(f"{folder} has no meta/info.json: it is no LeRobot dataset, or its download never got that far")
    with _understood(file):
        value = json.loads(file.read_bytes())
        version = value["codebase_version"]
        if version not in VERSIONS:
            raise DataError(
                f"{folder} has codebase version {version}; this vlatune reads {', '.join(VERSIONS)}: convert it with LeRobot's own "
                "scripts (`convert_dataset_v...`), or take another revision of it from the hub"
            )
        features = value["features"]
        return DatasetInfo(
            folder=folder,
            version=version,
            fps=float(value["fps"]),
            num_episodes=int(value["total_episodes"]),
            episodes_per_chunk=int(value.get("chunks_size", 1000)),
            data_path=value["data_path"],
            video_path=value.get("video_path"),
            vectors={key: int(f["shape"][0]) for key, f in features.items() if len(f["shape"]) == 1},
            pictures={
                key: PictureFeature(stored_as=feature["dtype"], size=size)
                for key, feature in features.items()
                if feature["dtype"] in get_args(Storage) and (size := _rows_and_columns(feature)) is not None
            },
        )


def read_tasks(info: DatasetInfo) -> dict[int, str]:
    """Task index -> its text."""
    if info.version != V3:
        file = info.folder / "meta" / "tasks.jsonl"
        with _understood(file):
            return {int(row["task_index"]): str(row["task"]) for row in _json_lines(file)}
    file = info.folder / "meta" / "tasks.parquet"
    with _understood(file):
        table = _table(file)
        # A pandas table whose index holds the texts; an index without a name has this one in the file.
        texts = table["task" if "task" in table.column_names else "__index_level_0__"]
        return {int(i): str(text) for i, text in zip(table["task_index"].to_pylist(), texts.to_pylist(), strict=True)}


def read_episodes(info: DatasetInfo, video_keys: Sequence[str]) -> list[EpisodeRecord]:
    """By index, with the videos of `video_keys`. Raises `DataError` unless they are as many as `info.json` says."""
    read = _episodes_v3 if info.version == V3 else _episodes_v2
    episodes = sorted(read(info, video_keys), key=lambda episode: episode.index)
    if len({episode.index for episode in episodes}) != info.num_episodes or len(episodes) != info.num_episodes:
        raise DataError(
            f"{info.folder / 'meta'} lists {len(episodes)} episodes and its info.json says {info.num_episodes}: the download or the "
            "recording was cut short; download or copy the dataset again"
        )
    return episodes


def _episodes_v2(info: DatasetInfo, video_keys: Sequence[str]) -> Iterator[EpisodeRecord]:
    file = info.folder / "meta" / "episodes.jsonl"
    with _understood(file):
        for row in _json_lines(file):
            names = {
                "episode_index": int(row["episode_index"]),
                "episode_chunk": int(row["episode_index"]) // info.episodes_per_chunk,
            }
            yield EpisodeRecord(
                index=names["episode_index"],
                num_frames=int(row["length"]),
                data_file=info.data_path.format(**names),
                videos={
                    key: VideoSpan(file=_video_path(info, video_key=key, **names), from_s=0.0, to_s=math.inf)
                    for key in video_keys
                },
            )


def _episodes_v3(info: DatasetInfo, video_keys: Sequence[str]) -> Iterator[EpisodeRecord]:
    place = ("chunk_index", "file_index")
    columns = ["episode_index", "length", *(f"data/{name}" for name in place)]
    columns += [f"videos/{key}/{name}" for key in video_keys for name in (*place, "from_timestamp", "to_timestamp")]
    for file in sorted((info.folder / "meta" / "episodes").glob("*/*.parquet")):
        with _understood(file):
            for row in _table(file, columns).to_pylist():
                yield EpisodeRecord(
                    index=int(row["episode_index"]),
                    num_frames=int(row["length"]),
                    data_file=info.data_path.format(**{name: int(row[f"data/{name}"]) for name in place}),
                    videos={
                        key: VideoSpan(
                            file=_video_path(
                                info, video_key=key, **{name: int(row[f"videos/{key}/{name}"]) for name in place}
                            ),
                            from_s=float(row[f"videos/{key}/from_timestamp"]),
                            to_s=float(row[f"videos/{key}/to_timestamp"]),
                        )
                        for key in video_keys
                    },
                )


def _video_path(info: DatasetInfo, **names: str | int) -> str:
    if info.video_path is None:
        raise KeyError("video_path")
    return info.video_path.format(**names)


def _rows_and_columns(feature: Mapping[str, Any]) -> tuple[int, int] | None:
    """Of a colour camera; None for depth and the like. The axes are told by the 3: published datasets name them wrongly."""
    said = [feature.get(place) or {} for place in ("info", "video_info")]
    if any(it.get(name) for it in said for name in ("is_depth_map", "video.is_depth_map")):
        return None
    match tuple(feature["shape"]):
        case (int(rows), int(columns), 3) | (3, int(rows), int(columns)):
            return rows, columns
        case _:
            return None


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _table(file: Path, columns: Sequence[str] | None = None) -> Any:
    """A pyarrow table of some columns; `KeyError` if the file lacks one."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as parquet:
        for column in columns or ():
            if column not in parquet.schema_arrow.names:
                raise KeyError(column)
        return parquet.read(columns=columns)


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


@contextmanager
def _understood(file: Path) -> Iterator[None]:
    """Whatever goes wrong in the block, one sentence about `file`."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing: the download or the copy was cut short; get the dataset again") from error
    except (OSError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        # not JSON, not parquet (pyarrow's errors are ValueErrors), or of another shape
        raise DataError(f"{file} is damaged or not LeRobot's ({first_line(error)}); get the dataset again") from error
