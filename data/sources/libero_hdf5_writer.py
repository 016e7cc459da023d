"""Demonstrations in LIBERO's HDF5 format, one task a file, never half-written.

    data                          attrs: env_name, problem_info, macros_image_convention, bddl_file_name,
                                         bddl_file_content, env_args, num_demos, total; ours: observation_timing, ...
    data/demo_<k>                 attrs: num_samples, model_file, init_state
    data/demo_<k>/actions         (T, 7) float64      states (T, D) float64      robot_states (T, 9) float64
                  rewards, dones  (T,) uint8, the last is 1
                  obs/...         gripper_states, joint_states, ee_states, ee_pos, ee_ori, agentview_rgb, eye_in_hand_rgb

LIBERO's own files hold observations taken *after* the action of their row; ours hold those the action was chosen on, and
say so: `observation_timing = "before_action"`.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

OBSERVATION_TIMING = "before_action"


@dataclass(frozen=True, kw_only=True)
class Demo:
    """One successful episode of T control steps; row t is what was true and seen just before action t."""

    actions: np.ndarray
    """(T, 7): what the actor meant to do, in [-1, 1]."""
    executed_actions: np.ndarray | None
    """(T, 7): what was done, where noise was added to it; None where it is the same."""
    states: np.ndarray
    """(T, D) simulator states; column 0 is the time."""
    gripper_states: np.ndarray
    """(T, 2)"""
    joint_states: np.ndarray
    """(T, 7)"""
    ee_pos: np.ndarray
    """(T, 3)"""
    ee_quat: np.ndarray
    """(T, 4) xyzw"""
    ee_ori: np.ndarray
    """(T, 3) axis-angle"""
    images: Mapping[str, np.ndarray]
    """camera -> (T, rows, columns, 3) uint8, rows as OpenGL has them (upside-down)."""
    model_file: str
    """The model's XML."""
    init_state_index: int


def write_demo(data: h5py.Group, name: str, demo: Demo) -> None:
    """Add `demo` to the `data` group under `name`."""
    num_steps = len(demo.actions)
    group = data.create_group(name)
    group.attrs["num_samples"] = num_steps
    group.attrs["model_file"] = demo.model_file
    group.attrs["init_state"] = demo.states[0].astype(np.float64)
    group.attrs["init_state_index"] = demo.init_state_index
    last = np.zeros(num_steps, np.uint8)
    last[-1] = 1
    arrays = {
        "actions": demo.actions,
        "states": demo.states,
        "robot_states": np.concatenate([demo.gripper_states, demo.ee_pos, demo.ee_quat], axis=1),
        "obs/gripper_states": demo.gripper_states,
        "obs/joint_states": demo.joint_states,
        "obs/ee_states": np.concatenate([demo.ee_pos, demo.ee_ori], axis=1),
        "obs/ee_pos": demo.ee_pos,
        "obs/ee_ori": demo.ee_ori,
    }
    if demo.executed_actions is not None:
        arrays["executed_actions"] = demo.executed_actions
    for path, array in arrays.items():
        group.create_dataset(path, data=np.asarray(array, np.float64))
    group.create_dataset("rewards", data=last)
    group.create_dataset("dones", data=last)
    for camera, frames in demo.images.items():
        chunk = (min(16, num_steps), *frames.shape[1:])
        group.create_dataset(f"obs/{camera}_rgb", data=frames, chunks=chunk, compression="gzip", compression_opts=1)


def merge_demos(target: Path, parts: Sequence[Path], attributes: Mapping[str, Any]) -> None:
    """One file of all `parts` (each with one demo, whatever its name), in their order, under LIBERO's names. Attributes
    of `data` are the first part's and those given; what is not a string or a number is stored as JSON."""
    with replacing(target) as temporary, h5py.File(temporary, "w") as file:
        data = file.create_group("data")
        total = 0
        for k, part in enumerate(parts):
            with h5py.File(part, "r") as source:
                (name,) = source["data"]
                source.copy(source["data"][name], data, name=f"demo_{k}")
                total += int(source["data"][name].attrs["num_samples"])
                if k == 0:
                    for key, value in source["data"].attrs.items():
                        data.attrs[key] = value
        for key, value in attributes.items():
            data.attrs[key] = value if isinstance(value, str | int | float) else json.dumps(value)
        data.attrs["observation_timing"] = OBSERVATION_TIMING
        data.attrs["num_demos"] = len(parts)
        data.attrs["total"] = total


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, moved onto it if and only if the block ends well."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
