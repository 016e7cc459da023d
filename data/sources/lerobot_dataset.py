"""LeRobot datasets (codebase versions v2.0, v2.1, v3.0), from a folder or by their name on the Hugging Face hub.

Row t of an episode is the observation at t and the action that was then taken, so rows are read as they are. Columns other than
the chosen cameras, the state and the action are ignored, depth cameras too. `fps` is not held against the robot card:
published LIBERO data say 10 though the robot is controlled at 20 Hz.

**Which way up.** A dataset does not say how its pictures were turned. LIBERO's published ones (lerobot/libero,
HuggingFaceVLA/libero, physical-intelligence/libero, IPEC-COMMUNITY's) hold the simulator's pictures turned by 180 degrees, as
OpenVLA's RLDS files do from which they were made. Open them with `stored_orientation="rot180"`: the pictures are turned back, so
that an episode has what the camera gives, as from an HDF5 file. Prepared with `--orientation rot180` the cache then holds the dataset's
pictures, and evaluation turns the simulator's in the same way; `--orientation raw` would leave the simulator's upside-down.

**Which gripper.** Conversions by any4lerobot have 1 = open and 0 = closed where LIBERO has -1 = open and 1 = closed. A policy
that is trained on them never opens LIBERO's hand, so an episode with such actions is refused.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..episodes import DataError, Episode
from ..files import quick_digest
from ..images import Orientation
from ..robots.card import RobotCard
from .lerobot_hub import check_files, local_folder
from .lerobot_metadata import DatasetInfo, EpisodeRecord, first_line, read_episodes, read_info, read_tasks
from .lerobot_pictures import TOLERANCE_FRAMES, StoredPictures, VideoPictures
from .lerobot_vectors import VectorColumns

PUBLISHED_KEYS = {
    "agentview": ("observation.images.image", "image"),
    "eye_in_hand": ("observation.images.image2", "observation.images.wrist_image", "wrist_image"),
}
"""LIBERO's cameras in the datasets of LeRobot and HuggingFaceVLA (image, image2), of any4lerobot (image, wrist_image) and of openpi."""


class LeRobotDatasetSource:
    """The demonstrations of one LeRobot dataset."""

    def __init__(
        self,
        path: Path | str,
        *,
        robot: RobotCard,
        cameras: Mapping[str, str] | None = None,
        stored_orientation: Orientation = "raw",
    ) -> None:
        """`path` is a folder or a name on the hub (downloaded, or what is in the hub's local cache). `cameras` maps the robot's
        cameras to the dataset's keys; those it leaves out are found by their published names. `stored_orientation` is how
        the dataset's pictures were turned after the camera gave them (see the file's docstring).

        Raises `DataError` at once when the dataset is not whole, of an unknown version, or does not fit the robot."""
        self.robot = robot
        self.path = str(path)
        self._stored_orientation = stored_orientation
        self._info = read_info(local_folder(self.path, ["meta/*"]))
        self._camera_keys = _camera_keys(self._info, robot, cameras or {})
        self._vectors = VectorColumns.of(self._info, robot)
        local_folder(self.path, ["meta/*", "data/*", *(f"videos/*{key}/*" for key in self._camera_keys.values())])
        video_keys = [key for key in self._camera_keys.values() if self._info.pictures[key].stored_as == "video"]
        self._tasks = read_tasks(self._info)
        self._task_names = task_names(self._tasks.values())
        self._episodes = {episode.key: episode for episode in read_episodes(self._info, video_keys)}
        check_files(self.path, self._info.folder, self._files())
        self._last_rows: tuple[str, Any] = ("", None)

    def keys(self) -> Sequence[str]:
        """`episode_<index>`, by index."""
        return tuple(self._episodes)

    def fingerprint(self) -> Mapping[str, str]:
        """A digest of each file of `meta/` but the statistics; of each folder of data and videos one of its files' names and sizes."""
        folder = self._info.folder
        digests = {file.relative_to(folder).as_posix(): quick_digest(file) for file in self._info.files()}
        listings: dict[str, list[str]] = {}
        for file in map(Path, sorted(self._files())):
            listings.setdefault(f"{file.parent.as_posix()}/", []).append(
                f"{file.name} {(folder / file).stat().st_size}"
            )
        for parent, listing in listings.items():
            digests[parent] = f"{len(listing)} files:{hashlib.sha256(repr(listing).encode()).hexdigest()}"
        return digests

    def read(self, key: str) -> Episode:
        """One demonstration; `DataError` if a part is missing, of another shape, or not finite. Its task is what its frames
        say, and they must agree; what else `meta/` lists for the episode is not read."""
        if key not in self._episodes:
            raise DataError(f"there is no {key!r} in {self.path}")
        record = self._episodes[key]
        where = f"{key} of {self.path}"
        rows, first_row = self._rows(record, where)
        if record.num_frames == 0:
            raise DataError(f"{where} is empty; remove it, e.g. with `lerobot-edit-dataset`")
        self._check_frames(rows, record, where)
        text = self._task_text(rows, where)
        return Episode(
            key=key,
            task=self._task_names[text],
            instruction=text,
            images={
                camera: self._pictures(record, self._camera_keys[camera], rows, first_row, where)
                for camera in self.robot.cameras
            },
            state_NS=self._vectors.state_of(rows, where),
            actions_NA=self._vectors.actions_of(rows, where),
        )

    def _files(self) -> list[str]:
        """The parquet files and the chosen cameras' videos, relative, each once."""
        episodes = self._episodes.values()
        videos = (span.file for episode in episodes for span in episode.videos.values())
        return list(dict.fromkeys([*(episode.data_file for episode in episodes), *videos]))

    def _rows(self, record: EpisodeRecord, where: str) -> tuple[Any, int]:
        """The episode's rows without pictures (a pyarrow table), and the row of its file at which they begin."""
        if self._last_rows[0] != record.data_file:  # v3: the next episode is mostly in the same file
            self._last_rows = (record.data_file, self._read_rows(self._info.folder / record.data_file, where))
        table = self._last_rows[1]
        found = np.flatnonzero(table["episode_index"].to_numpy() == record.index)
        if len(found) != record.num_frames or (len(found) and found[-1] - found[0] + 1 != len(found)):
            raise DataError(
                f"{where} has {len(found)} rows in {record.data_file} and should have {record.num_frames}, one after the other: the "
                "recording or the conversion was cut short; get the dataset again"
            )
        first_row = int(found[0]) if len(found) else 0
        return table.slice(first_row, len(found)), first_row

    def _read_rows(self, file: Path, where: str) -> Any:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        columns = ["episode_index", "frame_index", "timestamp", "task_index", *self._vectors.names]
        try:
            with ParquetFile(file) as parquet:
                there = parquet.schema_arrow.names
                missing = [column for column in columns if column not in there]
                if missing:
                    raise DataError(
                        f"{where}: {file} has no column `{missing[0]}`; it has {', '.join(there)}: get the dataset again"
                    )
                return parquet.read(columns=columns)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{where}: {file} cannot be read ({first_line(error)}); download or copy it again"
            ) from error

    def _check_frames(self, rows: Any, record: EpisodeRecord, where: str) -> None:
        """Frames 0, 1, 2, ... at the dataset's rate, and inside the part of the video that is theirs."""
        frames_N = np.arange(record.num_frames)
        if not np.array_equal(rows["frame_index"].to_numpy(), frames_N):
            raise DataError(f"{where} has frames missing or out of order (`frame_index`); get the dataset again")
        times_N = rows["timestamp"].to_numpy().astype(np.float64)
        off_N = np.abs(times_N * self._info.fps - frames_N)
        if not (off_N <= TOLERANCE_FRAMES).all():
            n = int((~(off_N <= TOLERANCE_FRAMES)).argmax())
            raise DataError(
                f"{where} has frame {n} at {times_N[n]:g} s, which at the {self._info.fps:g} frames a second of meta/info.json is another "
                "frame's time; correct `fps` there, or record the dataset again"
            )
        for key, span in record.videos.items():
            if span.from_s + times_N[-1] + TOLERANCE_FRAMES / self._info.fps > span.to_s:
                raise DataError(
                    f"{where} lasts until {span.from_s + times_N[-1]:.3f} s of {span.file}, but its part of that file ends at "
                    f"{span.to_s:.3f} s ({key}); get the dataset again"
                )

    def _task_text(self, rows: Any, where: str) -> str:
        indices = sorted(set(rows["task_index"].to_pylist()))
        if len(indices) > 1:
            raise DataError(
                f"{where} has frames of {len(indices)} tasks (task_index {', '.join(map(str, indices))}); an episode must have one: split it"
            )
        text = self._tasks.get(indices[0], "")
        if not text.strip():
            raise DataError(f"{where} has task_index {indices[0]}, for which meta/tasks has no text; write one there")
        return text

    def _pictures(self, record: EpisodeRecord, key: str, rows: Any, first_row: int, where: str) -> Iterable[np.ndarray]:
        feature, folder = self._info.pictures[key], self._info.folder
        pictures: Iterable[np.ndarray]
        if feature.stored_as == "video":
            span = record.videos[key]
            pictures = VideoPictures(
                path=folder / span.file,
                times_s=span.from_s + rows["timestamp"].to_numpy().astype(np.float64),
                fps=self._info.fps,
                size=feature.size,
                where=f"{where}, {key}",
            )
        else:
            pictures = StoredPictures(
                path=folder / record.data_file,
                column=key,
                first_row=first_row,
                num_frames=record.num_frames,
                size=feature.size,
                where=f"{where}, {key}",
            )
        return pictures if self._stored_orientation == "raw" else _TurnedBack(pictures, self._stored_orientation)


@dataclass(frozen=True)
class _TurnedBack:
    """Both ways of turning undo themselves."""

    blocks: Iterable[np.ndarray]
    orientation: Orientation

    def __iter__(self) -> Iterator[np.ndarray]:
        columns = slice(None, None, -1 if self.orientation == "rot180" else 1)
        for block in self.blocks:
            yield block[:, ::-1, columns]


def task_names(texts: Iterable[str]) -> dict[str, str]:
    """Text -> the task's name: lower case, words joined by underscores. Texts that would share one get a digest each."""
    plain = {text: re.sub(r"\W+", "_", text.lower()).strip("_") for text in texts}
    shared = {name for name in plain.values() if sum(other == name for other in plain.values()) > 1}
    return {
        text: f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:8]}" if name in shared or not name else name
        for text, name in plain.items()
    }


def _camera_keys(info: DatasetInfo, robot: RobotCard, chosen: Mapping[str, str]) -> dict[str, str]:
    """The robot's camera -> the dataset's key."""
    there = ", ".join(info.pictures) or "none"
    unknown = [camera for camera in chosen if camera not in robot.cameras]
    if unknown:
        raise DataError(f"robot {robot.name} has no camera {unknown[0]!r}; it has {', '.join(robot.cameras)}")
    keys: dict[str, str] = {}
    for camera in robot.cameras:
        candidates = (*PUBLISHED_KEYS.get(camera, ()), f"observation.images.{camera}", camera)
        found = [key for key in candidates if key in info.pictures]
        if camera in chosen:
            found = [chosen[camera]]
            if chosen[camera] not in info.pictures:
                raise DataError(f"{info.folder} has no camera {chosen[camera]!r}; its cameras: {there}")
        if len(found) != 1:
            raise DataError(
                f"which camera of {info.folder} is the robot's {camera}? Its cameras: {there}; name one, e.g. "
                f"--camera {camera} {next(iter(info.pictures), 'observation.images.front')}"
            )
        keys[camera] = found[0]
    return keys
