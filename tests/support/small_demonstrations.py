"""Demonstrations in LIBERO's HDF5 layout (robot part and images), written with plain h5py."""

import json
from pathlib import Path

import h5py
import numpy as np


def write_demos(
    path: Path,
    lengths: tuple[int, ...] = (7, 5, 9),
    *,
    image_px: int = 16,
    seed: int = 0,
    attributes: dict[str, str] | None = None,
) -> Path:
    """One task's file. Frame j of demo i has i in every pixel's red and j in its green; its state and action hold j too."""
    random = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "never read this"})
        data.attrs["macros_image_convention"] = "opengl"
        for name, value in ({"observation_timing": "before_action"} if attributes is None else attributes).items():
            data.attrs[name] = value
        for i, length in enumerate(lengths):
            demo = data.create_group(f"demo_{i}")
            demo.attrs["num_samples"] = length
            actions = random.uniform(-1, 1, (length, 7))
            actions[:, 0] = np.arange(length) / 1000
            demo["actions"] = actions
            demo["states"] = random.normal(size=(length, 20))
            demo["robot_states"] = random.normal(size=(length, 9))
            demo["rewards"] = demo["dones"] = np.eye(1, length, length - 1, dtype=np.uint8)[0]
            obs = demo.create_group("obs")
            obs["ee_pos"] = np.stack([np.arange(length) / 1000] * 3, axis=1)
            obs["ee_ori"] = random.normal(size=(length, 3))
            obs["ee_states"] = np.concatenate([obs["ee_pos"], obs["ee_ori"]], axis=1)
            obs["gripper_states"] = random.uniform(0, 0.04, (length, 2))
            obs["joint_states"] = random.normal(size=(length, 7))
            for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                pictures = random.integers(0, 256, (length, image_px, image_px, 3), dtype=np.uint8)
                pictures[..., 0], pictures[..., 1] = i, np.arange(length)[:, None, None]
                obs[camera] = pictures
    return path
