"""LeRobot's layout, written: weights, config and processor files of a policy that was trained here.

Read back by `public.py`, and by LeRobot itself. Sizes other than the published ones go into a sizes.json beside them, which
only vlatune reads: LeRobot builds the published ones."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...data.episodes import DataError
from ..backbones.paligemma import PaliGemmaConfig
from ..backbones.siglip import SiglipConfig
from ..backbones.smolvlm import SmolVLMConfig
from ..experts.gemma import GemmaExpertConfig
from ..experts.smolvla import SmolVLAExpertConfig
from ..layers.decoder import GEMMA_2B, GEMMA_300M, DecoderConfig
from ..objectives import ObjectiveConfig
from ..objectives.flow import Flow
from ..policy import Policy
from . import renaming
from .lerobot_processors import normalization_mapping, write_processors

SMOLVLM_NAME = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"


def write_lerobot(folder: Path, policy: Policy, *, tokenizer: str | None) -> None:
    """Into an existing folder. Raises DataError, naming what LeRobot lacks, if the policy is none of its models."""
    kind = lerobot_kind(policy)
    if tokenizer is None:
        raise DataError(
            "LeRobot loads a tokenizer by its name, and this policy's was trained on its own instructions; prepare with --tokenizer NAME"
        )
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in policy.state_dict().items()}
    table = renaming.SMOLVLA if kind == "smolvla" else renaming.PI
    renamed = table.theirs(weights) | _vocabulary_heads(kind, weights)
    save_file({f"model.{name}": tensor for name, tensor in renamed.items()}, folder / "model.safetensors")
    config = _config(kind, policy)
    (folder / "config.json").write_text(json.dumps(config, indent=4) + "\n")
    sizes = _smolvla_sizes(policy) if kind == "smolvla" else _pi_sizes(policy)
    if sizes is not None:
        (folder / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n")
    write_processors(
        folder,
        kind=kind,
        statistics=policy.statistics,
        state_mode=policy.config.state_normalisation,
        action_mode=policy.config.action_normalisation,
        config=config,
        tokenizer_name=tokenizer,
        max_length=config["tokenizer_max_length"],
        near_constant=policy.config.near_constant,
    )


def lerobot_kind(policy: Policy) -> str:
    """`pi0`, `pi05` or `smolvla`. Raises DataError if the policy is none of them."""
    config = policy.config
    backbone, expert = config.backbone, config.expert
    problem = ""
    match backbone, expert:
        case PaliGemmaConfig(), GemmaExpertConfig():
            pi05 = expert.noise_level == "adaptive_norm"
            kind = "pi05" if pi05 else "pi0"
            if (backbone.vision.stem, backbone.language, backbone.state) != ("patch", "tokens", "none"):
                problem = "its backbone has a convolutional stem, cached text or a state token"
            elif backbone.camera_embedding:
                problem = "its backbone has camera embeddings"
            elif (expert.state == "token") == pi05:
                problem = "its expert mixes π0's and π0.5's parts"
        case SmolVLMConfig(), SmolVLAExpertConfig():
            kind = "smolvla"
        case _:
            problem = f"it is a {expert.type} expert on a {backbone.type} backbone"
    prompt = "pi05" if not problem and kind == "pi05" else "newline"
    if not problem and config.prompt != prompt:
        problem = f"its prompt is {config.prompt!r} where LeRobot's {kind} has {prompt!r}"
    if not problem:
        problem = _sampling_problem(config.objective)
    layouts = [layout for layout in (config.state_layout, config.action_layout) if layout is not None]
    if not problem and any(layout.slots is not None for layout in layouts):
        problem = "its vectors have slots of their own"
    if problem:
        raise DataError(f"LeRobot has no such policy: {problem}; it has pi0, pi05 and smolvla with flow matching")
    return kind


def _sampling_problem(objective: ObjectiveConfig) -> str:
    if not isinstance(objective, Flow):
        return f"its objective is {objective.type}"
    if objective.prediction != "velocity":
        return "its expert predicts actions, LeRobot's velocities"
    return "" if objective.solver == "euler" else f"it is sampled with {objective.solver}, LeRobot's with Euler's steps"


def _vocabulary_heads(kind: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What LeRobot's strict loading asks for and nothing reads: the tied head, and an empty one for the expert."""
    table = weights["backbone.language_model.embed_tokens.weight"]
    if kind == "smolvla":
        return {"vlm_with_expert.vlm.lm_head.weight": table.clone()}
    width = weights["expert.action_in_proj.weight"].shape[0]
    return {
        "paligemma_with_expert.paligemma.lm_head.weight": table.clone(),
        "paligemma_with_expert.gemma_expert.lm_head.weight": torch.zeros(table.shape[0], width, dtype=table.dtype),
    }


def _config(kind: str, policy: Policy) -> dict[str, Any]:
    config, embodiment = policy.config, policy.embodiment
    px = config.backbone.image_px
    images = {
        f"observation.images.{camera.removeprefix('observation.images.')}": {"type": "VISUAL", "shape": [3, px, px]}
        for camera in embodiment.cameras
    }
    assert isinstance(config.objective, Flow)
    shared = {
        "type": kind,
        "n_obs_steps": 1,
        "input_features": {**images, "observation.state": {"type": "STATE", "shape": [embodiment.state_dim]}},
        "output_features": {"action": {"type": "ACTION", "shape": [embodiment.action_dim]}},
        "chunk_size": config.horizon,
        "n_action_steps": config.horizon,
        "max_state_dim": policy.state_layout.width,
        "max_action_dim": policy.action_layout.width,
        "normalization_mapping": normalization_mapping(config.state_normalisation, config.action_normalisation),
        "tokenizer_max_length": 200 if kind == "pi05" else 48,
    }
    if kind == "smolvla":
        assert isinstance(config.backbone, SmolVLMConfig)
        assert isinstance(config.expert, SmolVLAExpertConfig)
        return {
            **shared,
            "resize_imgs_with_padding": [px, px],
            "num_steps": config.objective.num_sampling_steps,
            "vlm_model_name": SMOLVLM_NAME,
            "load_vlm_weights": False,
            "num_vlm_layers": config.backbone.text.depth,
            "self_attn_every_n_layers": config.expert.self_attn_every,
            "expert_width_multiplier": config.expert.decoder.width / config.backbone.text.width,
        }
    return {
        **shared,
        "image_resolution": [px, px],
        "num_inference_steps": config.objective.num_sampling_steps,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
    }


def _pi_sizes(policy: Policy) -> dict[str, Any] | None:
    """None where they are the published ones."""
    backbone, expert = policy.config.backbone, policy.config.expert
    assert isinstance(backbone, PaliGemmaConfig)
    assert isinstance(expert, GemmaExpertConfig)
    if (backbone.vision, backbone.text, expert.gemma) == (SiglipConfig(), GEMMA_2B, GEMMA_300M):
        return None
    return {
        "vlm": _gemma_sizes(backbone.text),
        "expert": _gemma_sizes(expert.gemma),
        "vision": _vision_sizes(backbone.vision),
    }


def _smolvla_sizes(policy: Policy) -> dict[str, Any] | None:
    backbone = policy.config.backbone
    assert isinstance(backbone, SmolVLMConfig)
    published = SmolVLMConfig()
    if (backbone.vision, backbone.text) == (published.vision, published.text):
        return None
    text = backbone.text
    return {
        "text": {
            "hidden_size": text.width,
            "num_hidden_layers": text.depth,
            "intermediate_size": text.mlp_dim,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "rms_norm_eps": text.norm_eps,
        },
        "vision": _vision_sizes(backbone.vision),
        "scale_factor": backbone.scale_factor,
    }


def _gemma_sizes(config: DecoderConfig) -> dict[str, int]:
    names = ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
    return {name: getattr(config, name) for name in names}


def _vision_sizes(config: SiglipConfig) -> dict[str, int]:
    return {
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "patch_size": config.patch_px,
        "image_size": config.image_px,
    }
