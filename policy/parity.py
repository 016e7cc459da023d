"""`vlatune parity DIR`: a public checkpoint against outputs that were recorded with its reference implementation.

DIR holds the checkpoint as a user has it, and `io.safetensors`: recorded inputs (normalised), the recorded draws, and what the
reference made of them. The checkpoint is loaded as for training or acting; no statistics are needed. Printed is, for each
recorded output, max|ours - theirs| / max|theirs|."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor

from ..data.batch import Observation, Prompts
from ..data.episodes import DataError
from ..data.normalise import FieldStatistics, Statistics
from .checkpoints import renaming
from .checkpoints.public import PublicCheckpoint, PublicOptions, build_policy, embodiment_of_public, read_public
from .checkpoints.weight_files import load_strict, read_weights
from .experts.dit import DiTExpert, DiTExpertConfig
from .experts.expert import BoundExpert
from .experts.pooling import PoolingConfig
from .experts.unet import BoundUNetExpert, UNetExpert, UNetExpertConfig
from .objectives.diffusion import Diffusion
from .objectives.flow import Flow
from .objectives.objective import Draw
from .policy import Policy
from .prefix import Prefix, PrefixShape


@dataclass(frozen=True, kw_only=True)
class ParityConfig:
    """Compare a checkpoint with recorded outputs."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder with the checkpoint and io.safetensors."""
    tolerance: float = 1e-4
    """Largest relative difference that passes; bfloat16 needs about 3e-2."""
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations."""


def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 1 if an output differs by more than the tolerance."""
    config = tyro.cli(ParityConfig, prog="vlatune parity", args=argv)
    differences = compare(config.checkpoint, device=config.device, dtype=getattr(torch, config.dtype))
    width = max(map(len, differences))
    for name, difference in differences.items():
        verdict = "ok" if difference <= config.tolerance else f"more than {config.tolerance:g}"
        print(f"{name:{width}}  {difference:.2e}  {verdict}")
    if max(differences.values()) > config.tolerance:
        raise SystemExit(1)


def compare(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Output's name -> relative difference. Raises DataError if there is no recording, or no output in it."""
    file = folder / "io.safetensors"
    if not file.is_file():
        raise DataError(
            f"there is no io.safetensors in {folder}: recorded inputs and outputs stand beside the checkpoint"
        )
    io = {name: tensor.to(device) for name, tensor in load_file(file).items()}
    with torch.no_grad():
        outputs = _unet_outputs(folder, io, dtype) if "global_cond" in io else _policy_outputs(folder, io, dtype)
    if not outputs:
        raise DataError(f"{file} holds none of the outputs loss, sampleN and output; it has {', '.join(sorted(io))}")
    return {name: relative_difference(ours, io[name]) for name, ours in outputs.items()}


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """max|ours - theirs| / max|theirs|."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


def _policy_outputs(folder: Path, io: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    checkpoint = read_public(folder)
    device = io["actions"].device
    bound: BoundExpert
    if "img_tokens" in io:
        expert = expert_for_recording(checkpoint, io).to(device, dtype)
        bound = expert.bind(recorded_features(io, dtype))
    else:
        bound = policy_for_recording(checkpoint, io).to(device, dtype).bind(recorded_observation(io))
    objective = checkpoint.config.objective
    assert isinstance(objective, Flow | Diffusion)  # what public checkpoints were trained with
    return recorded_outputs(objective, bound, io)


def policy_for_recording(checkpoint: PublicCheckpoint, io: Mapping[str, Tensor]) -> Policy:
    """The policy without a robot: recorded numbers are normalised, and as wide as the model's vectors."""
    nothing = FieldStatistics(count=0)
    checkpoint = replace(
        checkpoint,
        statistics=Statistics(state=nothing, actions=nothing),
        state_dim=io["state"].shape[-1],
        action_dim=io["actions"].shape[-1],
        cameras=_recorded_cameras(io),
        config=replace(checkpoint.config, state_normalisation="identity", action_normalisation="identity"),
    )
    return build_policy(checkpoint, embodiment_of_public(checkpoint, PublicOptions()))


def recorded_observation(io: Mapping[str, Tensor]) -> Observation:
    cameras = _recorded_cameras(io)
    return Observation(
        images={camera: io[camera].permute(0, 2, 3, 1)[:, None] for camera in cameras},
        image_mask={camera: io[camera.replace("image", "image_mask")][:, None] for camera in cameras},
        state_BTS=io["state"][:, None],
        prompts=Prompts(ids_BL=io["tokens"], mask_BL=io["token_mask"]),
    )


def _recorded_cameras(io: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(sorted(name for name in io if re.fullmatch(r"image\d+", name)))


def expert_for_recording(checkpoint: PublicCheckpoint, io: Mapping[str, Tensor]) -> DiTExpert:
    """RDT's encoders are not in its checkpoints: what is compared begins at their recorded features."""
    assert isinstance(checkpoint.config.expert, DiTExpertConfig)
    with init_empty_weights(include_buffers=False):
        expert = DiTExpert(
            checkpoint.config.expert,
            prefix=PrefixShape(
                kv=None,
                tokens={"image": io["img_tokens"].shape[-1], "language": io["lang_tokens"].shape[-1]},
                state_dim=io["state"].shape[-1],
            ),
            horizon=checkpoint.config.horizon,
            action_dim=io["actions"].shape[-1],
        )
    weights = {name.removeprefix("expert."): tensor.float() for name, tensor in checkpoint.weights.items()}
    load_strict(expert, weights, checkpoint.source)
    return expert.eval()


def recorded_features(io: Mapping[str, Tensor], dtype: torch.dtype) -> Prefix:
    images, language = io["img_tokens"].to(dtype), io["lang_tokens"].to(dtype)
    return Prefix(
        tokens={
            "image": (images, images.new_ones(images.shape[:2], dtype=torch.bool)),
            "language": (language, io["lang_mask"]),
        },
        state_BTS=io["state"],
        action_mask_BA=io["action_mask"][:, 0] > 0,
        control_hz_B=io["ctrl_freq"].float(),
    )


def recorded_outputs(objective: Flow | Diffusion, bound: BoundExpert, io: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours of every output that is recorded."""
    outputs = {}
    if "loss" in io:
        levels = io["timesteps"] / objective.num_train_steps if isinstance(objective, Diffusion) else io["time"]
        draw = Draw(noise_BHA=io["noise"], noise_level_B=levels)
        valid = torch.ones_like(io["actions"], dtype=torch.bool)
        entries = objective.loss(bound, io["actions"], valid, draw).entries_BHA
        outputs["loss"] = entries.mean() if io["loss"].ndim == 0 else entries
    used = io.get("action_mask", 1)  # RDT clears the slots that the robot lacks
    for name in sorted(io):
        if match := re.fullmatch(r"sample(\d+)", name):
            sampler = replace(objective, num_sampling_steps=int(match[1]))
            outputs[name] = sampler.sample(bound, io.get("sample_noise", io["noise"])) * used
    return outputs


def _unet_outputs(folder: Path, io: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """diffusion_policy's U-Net alone, its condition recorded."""
    expert = unet_for_recording(folder, io).to(io["sample"].device, dtype)
    bound = BoundUNetExpert(expert, io["global_cond"].to(dtype))
    return {"output": bound(io["sample"], io["timesteps"] / expert.config.time_scale)}


def unet_for_recording(folder: Path, io: Mapping[str, Tensor]) -> UNetExpert:
    sizes = json.loads((folder / "config.json").read_text())
    expert = UNetExpert(
        UNetExpertConfig(
            pooling=PoolingConfig(width=sizes["global_cond_dim"], num_heads=1),
            down_dims=tuple(sizes["down_dims"]),
            kernel_size=sizes["kernel_size"],
            num_groups=sizes["n_groups"],
            step_embed_dim=sizes["diffusion_step_embed_dim"],
            film_scale=sizes["cond_predict_scale"],
        ),
        prefix=PrefixShape(kv=None, tokens={}, state_dim=1),
        horizon=io["sample"].shape[1],
        action_dim=sizes["input_dim"],
    )
    ours, _ = renaming.UNET.ours(read_weights(folder))
    load_strict(expert.unet, {name.removeprefix("expert.unet."): tensor for name, tensor in ours.items()}, folder)
    return expert.eval()
