"""RDT-1B, read from its authors' checkpoints. Every size of it is in the weights' shapes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...data.images import ImageRule
from ...data.unified_vector import codec_named
from ...data.vector_layout import VectorLayout
from ..backbones.siglip import SiglipConfig
from ..backbones.siglip_t5 import SiglipT5Config
from ..config import PolicyConfig
from ..experts.dit import DiTExpertConfig
from ..objectives.diffusion import Diffusion
from . import renaming
from .public_checkpoint import (
    PublicCheckpoint,
    PublicOptions,
    depth_of,
    given_statistics,
    siglip_sizes,
    under_our_names,
)
from .weight_files import read_weights

RDT_WIDTH = 128
"""Of its unified state and action vector."""


def read_rdt(folder: Path, config: Mapping[str, Any], options: PublicOptions) -> PublicCheckpoint:
    weights = read_weights(folder)
    ours = under_our_names(renaming.RDT, weights, folder)
    width = ours["expert.x_pos_embed"].shape[2]
    head_dim = ours["expert.blocks.0.attn.q_norm.weight"].shape[0]
    image_tokens = ours["expert.img_cond_pos_embed"].shape[1]
    backbone = SiglipT5Config(vision=_siglip(options.vision))
    if options.codec is not None:
        codec = codec_named(options.codec)
        state_layout, action_layout = codec.state, codec.actions
    else:
        state_layout, action_layout = (
            VectorLayout(name="rdt", width=RDT_WIDTH, slots=slots or None)
            for slots in (options.state_slots, options.action_slots)
        )
    scheduler = config.get("config", config).get("noise_scheduler", {})
    policy = PolicyConfig(
        backbone=backbone,
        expert=DiTExpertConfig(
            width=width,
            depth=depth_of(ours, "expert.blocks."),
            num_heads=width // head_dim,
            num_image_tokens=image_tokens,
            num_language_tokens=ours["expert.lang_cond_pos_embed"].shape[1],
            norm_kind=config.get("norm_kind", "timm103"),
        ),
        objective=Diffusion(
            prediction=_prediction(scheduler.get("prediction_type", "sample")),
            clip=1.0 if scheduler.get("prediction_type") == "epsilon" else None,
            num_train_steps=scheduler.get("num_train_timesteps", 1000),
            num_sampling_steps=scheduler.get("num_inference_timesteps", 5),
        ),
        horizon=ours["expert.x_pos_embed"].shape[1] - 3,
        state_normalisation="identity",
        action_normalisation="identity",
        state_layout=state_layout,
        action_layout=action_layout,
        observation_offsets=(-1, 0),
    )
    return PublicCheckpoint(
        source=folder,
        config=policy,
        weights=ours,
        cameras=(),
        state_dim=None,
        action_dim=None,
        image_rule=ImageRule(size_px=backbone.image_px, background=(127, 127, 127), resize="pil_bicubic"),
        statistics=given_statistics(options),
        why_no_statistics=f"{folder} holds RDT's weights and no robot; add --statistics, and --codec or --state-slots and --action-slots",
        tokenizer="google/t5-v1_1-xxl",
        encoder_width=ours["expert.lang_adaptor.0.weight"].shape[1],
        vision=options.vision,
    )


def _prediction(diffusers_name: str) -> Any:
    return {"v_prediction": "v"}.get(diffusers_name, diffusers_name)


def _siglip(source: str) -> SiglipConfig:
    """The sizes of a plain SigLIP in a local folder; of anything else the published so400m's at 384 pixels."""
    file = Path(source) / "config.json"
    if not file.is_file():
        return SiglipT5Config().vision
    sizes = json.loads(file.read_text())
    return siglip_sizes(sizes.get("vision_config", sizes))
