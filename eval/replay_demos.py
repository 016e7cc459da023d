"""Recorded demonstrations as a replay needs them: simulator states, executed actions, and what the file says was seen."""

import io
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..data.episodes import DataError
from ..data.sources.libero_hdf5 import CAMERA_KEYS, LiberoHdf5Source
from .benchmarks import BENCHMARKS, load_benchmark
from .benchmarks.benchmark import FixturePose, Task
from .replay_checks import LAYOUTS, SIZES


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One demonstration of T rows. In row t lie the simulator's state before action t, the action, and an observation: the one
    before that action too, or the one after it."""

    where: str
    """For messages: `demo_0 of <file>`."""
    states_TD: np.ndarray
    """float64, flattened: time, positions, velocities."""
    actions_TA: np.ndarray
    """float64: what was done, noise included."""
    executed: str
    """The dataset they come from: `executed_actions` where there is one, else `actions`."""
    observed_before: bool
    """Whether the file says that row t was observed before action t."""
    stored: Mapping[str, np.ndarray]
    """Dataset -> (T, n) float64, for those of `LAYOUTS` that are there."""
    picture_px: int
    """Side of the pictures."""
    init_state_index: int | None
    """Index of the init state, where the file names it."""
    model_xml: str
    """The recorded model; empty where the file has none."""


def read_recording(source: LiberoHdf5Source, key: str) -> Recording:
    """Raises `DataError`, in one sentence, where something is missing or damaged, or is of another length than the actions."""
    episode = source.read(key)  # refuses what is damaged; leaves out a row where it was observed after the action
    path, demo = demo_path(source, key)
    where = f"{demo} of {path}"
    with _whole(where), h5py.File(path, "r") as file:
        group = file[f"data/{demo}"]
        executed = "executed_actions" if "executed_actions" in group else "actions"
        stored = {name: np.asarray(group[name], np.float64) for name in LAYOUTS if name in group}
        if "states" not in group:
            raise DataError(f"{where} has no `states`, from which a replay starts; collect it again, or leave it out")
        states_TD = np.asarray(group["states"], np.float64)
        actions_TA = np.asarray(group[executed], np.float64)
        size = group[f"obs/{CAMERA_KEYS['agentview']}"].shape[1:3]
        index, model_xml = group.attrs.get("init_state_index"), _text(group.attrs.get("model_file", ""))
    if size[0] != size[1]:
        raise DataError(f"{where} has pictures of {size[0]} x {size[1]}; the benchmarks render squares")
    for name, rows in {"states": states_TD, executed: actions_TA, **stored}.items():
        if rows.ndim != 2 or len(rows) != len(states_TD) or not np.isfinite(rows).all():
            raise DataError(
                f"{where} has `{name}` of shape {rows.shape}, or with NaN in it, beside {len(states_TD)} states; "
                "collect it again, or delete that group"
            )
    for name, blocks in LAYOUTS.items():
        numbers = sum(SIZES[block] for block in blocks)
        if name in stored and stored[name].shape[1] != numbers:
            raise DataError(f"{where} has `{name}` of shape {stored[name].shape}; LIBERO's has {numbers} columns")
    return Recording(
        where=where,
        states_TD=states_TD,
        actions_TA=actions_TA,
        executed=executed,
        observed_before=len(episode.actions_NA) == len(states_TD),
        stored=stored,
        picture_px=int(size[0]),
        init_state_index=None if index is None else int(index),
        model_xml=model_xml,
    )


def read_pictures(source: LiberoHdf5Source, key: str, rows_P: np.ndarray) -> dict[str, np.ndarray]:
    """camera -> (P, rows, columns, 3) uint8 of the given rows, which ascend, as they are stored."""
    path, demo = demo_path(source, key)
    with _whole(f"{demo} of {path}"), h5py.File(path, "r") as file:
        return {camera: file[f"data/{demo}/obs/{part}"][rows_P] for camera, part in CAMERA_KEYS.items()}


@contextmanager
def _whole(where: str) -> Iterator[None]:
    """Around reading: a damaged file becomes one sentence, a `DataError`."""
    try:
        yield
    except (OSError, KeyError) as error:
        raise DataError(f"{where} is damaged ({error}); copy it again, or leave it out") from error


def demo_path(source: LiberoHdf5Source, key: str) -> tuple[Path, str]:
    """The file of a source's key, and the demonstration's name in it."""
    file_name, _, demo = key.rpartition("/")
    return (source.path if source.path.is_file() else source.path / file_name), demo


def task_of(path: Path, benchmark: str | None) -> Task:
    """The task that a file's demonstrations solve: by the BDDL file that it names, else by its own name.

    Raises `DataError` where no benchmark (or not the one that is given) has such a task."""
    with h5py.File(path, "r") as file:
        bddl = Path(_text(file["data"].attrs.get("bddl_file_name", "")))
    name = bddl.stem or path.stem.removesuffix("_demo")
    benchmarks = [benchmark] if benchmark else list(BENCHMARKS)
    for known in benchmarks:
        for tasks in load_benchmark(known).suites().values():
            for task in tasks:
                if task.name == name:
                    return task
    raise DataError(
        f"{path} has demonstrations of a task {name!r}, and {' and '.join(benchmarks)} have none of that name; name the file "
        "after its task, <task>_demo.hdf5, or leave it out"
    )


def fixture_poses(model_xml: str) -> dict[str, FixturePose]:
    """Body -> where a recorded model has it in its parent: position in metres, quaternion w, x, y, z. Empty without a model."""
    poses: dict[str, FixturePose] = {}
    if model_xml:
        for _, element in ET.iterparse(io.BytesIO(model_xml.encode())):
            if element.tag == "body":
                poses[element.get("name", "")] = (
                    _numbers(element.get("pos", "0 0 0")),
                    _numbers(element.get("quat", "1 0 0 0")),
                )
    return poses


def _numbers(text: str) -> np.ndarray:
    return np.array(text.split(), np.float64)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
