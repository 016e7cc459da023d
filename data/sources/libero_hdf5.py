"""Demonstrations in LIBERO's HDF5 format: one file a task, one group `data/demo_<i>` a demonstration.

**Which observation goes with which action.** LIBERO's own `create_dataset.py` stores, in row j, the observation that followed
action j. A policy is asked for action j+1 when it has seen that observation, so here row j's observation is paired with action
j+1; the first action, whose observation was never stored, and the last observation, which no action followed, are dropped. Files
that recorded each observation before its action (ours; OpenVLA's regenerated ones) are read as they are. Ours say so in
the attribute `observation_timing` of `data`; LIBERO's are known by their attribute `problem_info`; of others the user says.

**Which instruction.** The benchmark gives policies `task.language`, which comes from the file's name; the
`language_instruction` inside the file differs from it for most tasks and is not read. Our own files carry `task_language`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import h5py
import numpy as np

from ..episodes import DataError, Episode
from ..files import quick_digest
from ..robots.card import RobotCard
from ..robots.libero_panda import LIBERO_PANDA
from ..robots.state import assemble_state, check_parts

ObservationTiming = Literal["auto", "before_action", "after_action"]

CAMERA_KEYS = {"agentview": "agentview_rgb", "eye_in_hand": "eye_in_hand_rgb"}
STATE_KEYS = {
    "eef_position": ("ee_pos", 3),
    "eef_axis_angle": ("ee_ori", 3),
    "gripper_joints": ("gripper_states", 2),
    "joint_positions": ("joint_states", 7),
}
"""Part of a robot's state -> (its key in the file, numbers)."""
BLOCK_FRAMES = 64
"""Pictures read at once: as many as a chunk of the file and the prepared ones need, whatever the episode's length."""


class LiberoHdf5Source:
    """The demonstrations of one `*.hdf5` file, or of every one under a folder.

    Images stay in the file's orientation (upside-down: OpenGL's rows). Raises `DataError` at once when there is no HDF5
    file under `path` or one cannot be opened."""

    def __init__(
        self, path: Path | str, *, robot: RobotCard = LIBERO_PANDA, observation_timing: ObservationTiming = "auto"
    ) -> None:
        check_parts(robot, STATE_KEYS)
        self.robot = robot
        self.path = Path(path)
        self.observation_timing = observation_timing
        if self.path.is_file():
            self._root, files = self.path.parent, [self.path]
        else:
            self._root, files = self.path, _visible(self.path)
        if not files:
            missing = "" if self.path.exists() else " (there is no such file or folder)"
            raise DataError(
                f"there is no HDF5 file under {self.path}{missing}; give a *.hdf5 file or a folder with some, "
                "e.g. one that `vlatune collect` wrote"
            )
        self._files = {file.relative_to(self._root).as_posix(): file for file in files}
        self._sizes: dict[str, dict[str, tuple[int, ...]]] = {}
        self._keys = tuple(f"{name}/{demo}" for name in self._files for demo in self._demos(name))
        if not self._keys:
            raise DataError(
                f"no demonstration is in {self.path}: `data/demo_0` and so on are missing; collect some first"
            )

    def keys(self) -> Sequence[str]:
        """`<file>/<demo>`, files by name, demos by number."""
        return self._keys

    def fingerprint(self) -> Mapping[str, str]:
        """File (relative) -> `<size>:<digest>`."""
        return {name: quick_digest(file) for name, file in self._files.items()}

    def read(self, key: str) -> Episode:
        """One demonstration; `DataError` if a part is missing, empty, of another shape, or not finite."""
        file_name, _, demo = key.rpartition("/")
        if key not in self._keys:
            raise DataError(f"there is no demonstration {key!r} in {self.path}")
        where = f"{demo} of {self._files[file_name]}"
        with _open(self._files[file_name]) as file:
            try:
                group, attributes = file[f"data/{demo}"], file["data"].attrs
                actions_NA = _numbers(group, "actions", len(self.robot.action_names), where)
                state_parts = {
                    part: _numbers(group, f"obs/{key}", size, where)
                    for part, (key, size) in STATE_KEYS.items()
                    if key in group.get("obs", ()) or part in self.robot.state_parts
                }
                images = {camera: _Pictures.of(file, demo, part, where) for camera, part in CAMERA_KEYS.items()}
                observed_before = self._observed_before_action(attributes, where)
                task = Path(file_name).stem.removesuffix("_demo")
                instruction = _text(attributes["task_language"]) if "task_language" in attributes else language_of(task)
            except OSError as error:
                raise _unreadable(where, error) from error
        self._check_one_size(file_name, images, where)
        lengths = {name: len(part) for name, part in ({"actions": actions_NA} | state_parts | images).items()}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise DataError(f"{where} has parts of differing length ({said}); record it again or delete that group")
        state_NS = assemble_state(self.robot, state_parts)
        if not observed_before:
            actions_NA, state_NS = actions_NA[1:], state_NS[:-1]
            images = {camera: pictures.without_last() for camera, pictures in images.items()}
        if len(actions_NA) == 0:
            raise DataError(f"{where} is empty: no action with an observation before it; delete that group")
        return Episode(
            key=key,
            suite=suite_of(self._files[file_name]),
            task=task,
            instruction=instruction,
            images=images,
            state_NS=state_NS,
            actions_NA=actions_NA,
        )

    def _check_one_size(self, file_name: str, images: Mapping[str, "_Pictures"], where: str) -> None:
        """Against the file's first demonstration that was read."""
        sizes = self._sizes.setdefault(file_name, {camera: pictures.size for camera, pictures in images.items()})
        for camera, pictures in images.items():
            if pictures.size != sizes[camera]:
                raise DataError(
                    f"{where} has pictures of {pictures.size} of camera {camera}, other demonstrations of that file have "
                    f"{sizes[camera]}; one file must have one size: record it again or delete that group"
                )

    def _demos(self, name: str) -> list[str]:
        """The file's `demo_<i>`, by number: `demo_2` before `demo_10`."""
        with _open(self._files[name]) as file:
            if "data" not in file:
                raise DataError(f"{self._files[name]} has no group `data`: it is not in LIBERO's format")
            return sorted((demo for demo in file["data"] if re.fullmatch(r"demo_\d+", demo)), key=lambda d: int(d[5:]))

    def _observed_before_action(self, attributes: Mapping[str, object], where: str) -> bool:
        timing: str = self.observation_timing
        if timing == "auto":
            if "observation_timing" in attributes:
                timing = _text(attributes["observation_timing"])
            elif "problem_info" in attributes:
                timing = "after_action"
            else:
                raise DataError(
                    f"{where} does not say whether its observations were recorded before or after their actions; add "
                    "--observation-timing before_action (OpenVLA's regenerated files) or after_action (LIBERO's own)"
                )
        if timing not in ("before_action", "after_action"):
            raise DataError(f"{where} has observation_timing {timing!r}; it can be before_action or after_action")
        return timing == "before_action"


def suite_of(file: Path) -> str:
    """LIBERO keeps a suite in a folder of its name; empty for files that are elsewhere."""
    name = file.absolute().parent.name
    return name if re.fullmatch(r"libero_(spatial|object|goal|10|90|100)|pocket\w*", name) else ""


def language_of(task: str) -> str:
    """LIBERO's `task.language` of a task's name: without `KITCHEN_SCENE4_` and the like, underscores to spaces."""
    return re.sub(r"^[A-Z][A-Z_]*SCENE\d+_", "", task).replace("_", " ")


def _visible(folder: Path) -> list[Path]:
    """HDF5 files under `folder`; not those in hidden folders, where a collection under way keeps its parts."""
    found = (file for suffix in ("*.hdf5", "*.h5") for file in folder.rglob(suffix))
    return sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts))


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(
            f"{path} is not a whole HDF5 file ({_first_line(error)}); copy, download or collect it again"
        ) from error


def _numbers(group: h5py.Group, key: str, size: int, where: str) -> np.ndarray:
    """(N, size) float32; `DataError` if missing, of another shape, or not finite."""
    values = np.asarray(_dataset(group, key, where)[()])
    if values.ndim != 2 or values.shape[1] != size:
        raise DataError(f"{where} has `{key}` of shape {values.shape}; it must be (N, {size})")
    bad_N = ~np.isfinite(values).all(axis=1)
    if bad_N.any():
        raise DataError(
            f"{where} has NaN or infinity in `{key}`, first in row {int(bad_N.argmax())}; record it again or delete that group"
        )
    return values.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class _Pictures:
    """Blocks of one camera's pictures; the file is open while one is read."""

    path: Path
    key: str
    num_frames: int
    size: tuple[int, ...]
    where: str

    @classmethod
    def of(cls, file: h5py.File, demo: str, part: str, where: str) -> "_Pictures":
        """`DataError` if they are missing or something else."""
        dataset = _dataset(file[f"data/{demo}"], f"obs/{part}", where)
        if dataset.dtype != np.uint8 or dataset.ndim != 4 or dataset.shape[-1] != 3:
            raise DataError(
                f"{where} has `obs/{part}` of {dataset.dtype} and shape {dataset.shape}; it must be uint8 of shape "
                "(N, rows, columns, 3)"
            )
        return cls(
            path=Path(file.filename),
            key=f"data/{demo}/obs/{part}",
            num_frames=len(dataset),
            size=dataset.shape[1:3],
            where=where,
        )

    def without_last(self) -> "_Pictures":
        return replace(self, num_frames=self.num_frames - 1)

    def __len__(self) -> int:
        return self.num_frames

    def __iter__(self) -> Iterator[np.ndarray]:
        with _open(self.path) as file:
            for start in range(0, self.num_frames, BLOCK_FRAMES):
                try:
                    yield file[self.key][start : min(start + BLOCK_FRAMES, self.num_frames)]
                except OSError as error:
                    raise _unreadable(self.where, error) from error


def _dataset(group: h5py.Group, key: str, where: str) -> h5py.Dataset:
    if key not in group:
        there = sorted([k for k in group if k != "obs"] + [f"obs/{k}" for k in group.get("obs", ())])
        raise DataError(
            f"{where} has no `{key}`; it has {', '.join(there) or 'nothing'}; record it again or delete that group"
        )
    return group[key]


def _unreadable(where: str, error: OSError) -> DataError:
    return DataError(f"{where} cannot be read ({_first_line(error)}); copy or download the file again")


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _first_line(error: OSError) -> str:
    return str(error).splitlines()[0]
