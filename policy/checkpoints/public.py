"""Public checkpoints: which one a folder holds, and the policy that it makes.

LeRobot's π0, π0.5 and SmolVLA, openpi's converted ones (public_vla.py) and RDT-1B (public_rdt.py), told by config.json and by
the names of the weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights

from ...data.episodes import DataError
from ..config import Embodiment
from ..policy import Policy
from .plain_models import local_folder, read_plain
from .public_checkpoint import PublicCheckpoint, PublicOptions
from .public_rdt import read_rdt
from .public_vla import read_lerobot, read_openpi
from .weight_files import load_strict

__all__ = ["PublicCheckpoint", "PublicOptions", "build_policy", "embodiment_of_public", "is_public", "read_public"]


def is_public(folder: Path) -> bool:
    """Whether `folder` looks like one of the checkpoints that `read_public` reads (ours have a format version)."""
    if not folder.exists():
        raise DataError(f"there is nothing at {folder}; give a checkpoint's folder")
    file = folder / "config.json"
    return not file.is_file() or "format_version" not in json.loads(file.read_text())


def read_public(folder: Path, options: PublicOptions | None = None) -> PublicCheckpoint:
    """Raises DataError if it is none of the known checkpoints, or lacks or adds weights."""
    options = options or PublicOptions()
    config = _config(folder)
    kind = config.get("type")
    if kind in ("pi0", "pi05", "smolvla"):
        checkpoint = read_lerobot(folder, config, options)
    elif "action_horizon" in config and "paligemma_variant" in config:
        checkpoint = read_openpi(folder, config, options)
    elif "img_token_dim" in config or not config:
        checkpoint = read_rdt(folder, config, options)
    else:
        raise DataError(
            f"{folder}/config.json is not of a policy that vlatune reads (its type is {kind!r}); there are pi0, pi05 and smolvla in "
            "LeRobot's layout, openpi's converted PyTorch checkpoints, and RDT"
        )
    return replace(
        checkpoint,
        config=replace(checkpoint.config, prompt=options.prompt or checkpoint.config.prompt),
        tokenizer=options.tokenizer or checkpoint.tokenizer,
        image_rule=replace(checkpoint.image_rule, orientation=options.orientation),
        cameras=_renamed_cameras(checkpoint.cameras, options.cameras, folder),
    )


def embodiment_of_public(checkpoint: PublicCheckpoint, options: PublicOptions) -> Embodiment:
    """Raises DataError where neither the checkpoint nor the options tell statistics or cameras."""
    if checkpoint.statistics is None:
        raise DataError(checkpoint.why_no_statistics)
    if not checkpoint.cameras:
        raise DataError(
            f"{checkpoint.source} does not name its cameras; name the robot's with --cameras, in the order of training"
        )
    return Embodiment(
        robot=options.robot,
        state_dim=checkpoint.state_dim or checkpoint.statistics.state.num_dims,
        action_dim=checkpoint.action_dim or checkpoint.statistics.actions.num_dims,
        control_hz=options.control_hz,
        gripper_action=None,
        cameras=checkpoint.cameras,
        image_rule=checkpoint.image_rule,
        vocab_size=checkpoint.vocab_size,
        encoder_width=checkpoint.encoder_width,
    )


def build_policy(checkpoint: PublicCheckpoint, embodiment: Embodiment) -> Policy:
    """The policy with the checkpoint's weights, in float32 on the CPU.

    Raises DataError naming the first weight that is missing, not known or of another shape."""
    if checkpoint.statistics is None:
        raise DataError(checkpoint.why_no_statistics)
    weights = dict(checkpoint.weights)
    if checkpoint.vision is not None:
        weights |= read_plain(local_folder(checkpoint.vision))
    # Parameters are not drawn first: at full size that takes minutes.
    with init_empty_weights(include_buffers=False):
        policy = Policy(checkpoint.config, embodiment, checkpoint.statistics)
    load_strict(policy, {name: tensor.float() for name, tensor in weights.items()}, checkpoint.source)
    return policy.eval()


def _config(folder: Path) -> dict[str, Any]:
    """Its config.json, or that of the run above a DeepSpeed checkpoint; empty where there is none."""
    training_state = folder.is_file() or any(folder.rglob("mp_rank_00_model_states.pt"))
    for place in (folder, *list(folder.parents)[:2]) if training_state else (folder,):
        if (place / "config.json").is_file():
            config: dict[str, Any] = json.loads((place / "config.json").read_text())
            return config
    return {}


def _renamed_cameras(theirs: tuple[str, ...], robots: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    if theirs and len(robots) > len(theirs):
        raise DataError(f"{folder} has {len(theirs)} cameras ({', '.join(theirs)}), and {len(robots)} names were given")
    return robots or theirs
