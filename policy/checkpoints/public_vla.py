"""π0, π0.5 and SmolVLA, read from LeRobot's checkpoints and from openpi's converted ones.

Sizes come from config.json, from a sizes.json beside it (models of other than the published sizes), and from the weights'
own shapes."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...data.episodes import DataError
from ...data.images import ImageRule
from ...data.normalise import NormaliserMode
from ...data.vector_layout import VectorLayout
from ..backbones.paligemma import PaliGemmaConfig
from ..backbones.siglip import SiglipConfig
from ..backbones.smolvlm import SmolVLMConfig
from ..config import PolicyConfig
from ..experts.gemma import GemmaExpertConfig
from ..experts.smolvla import SmolVLAExpertConfig
from ..layers.decoder import GEMMA_2B, GEMMA_300M, DecoderConfig
from ..objectives.flow import Flow
from . import renaming
from .lerobot_processors import read_normalisation
from .openpi_norm_stats import find_norm_stats, read_norm_stats
from .public_checkpoint import (
    PALIGEMMA_TOKENIZER,
    PublicCheckpoint,
    PublicOptions,
    depth_of,
    given_statistics,
    siglip_sizes,
    under_our_names,
)
from .weight_files import read_weights

VARIANTS = {
    "gemma_2b": GEMMA_2B,
    "gemma_300m": GEMMA_300M,
    "dummy": DecoderConfig(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),
}
"""openpi's names of sizes."""


def read_lerobot(folder: Path, config: Mapping[str, Any], options: PublicOptions) -> PublicCheckpoint:
    if config.get("use_relative_actions"):
        raise DataError(
            f"{folder} was trained on actions relative to the state (use_relative_actions), which vlatune does not do"
        )
    weights = _without_prefix(read_weights(folder))
    read = _smolvla_policy if config["type"] == "smolvla" else _pi_policy
    policy, ours = read(folder, config, weights)
    normalisation: dict[str, Any] = {}
    statistics, why_not = None, ""
    tokenizer = _policy_tokenizer(config)
    try:
        found = read_normalisation(folder, config, weights, statistics=given_statistics(options))
    except DataError as error:
        why_not = str(error)
    else:
        statistics = found.statistics
        tokenizer = found.tokenizer_name or tokenizer
        normalisation = {
            "state_normalisation": found.state_mode,
            "action_normalisation": found.action_mode,
            "near_constant": found.near_constant,
        }
    cameras = [name for name, feature in config.get("input_features", {}).items() if feature["type"] == "VISUAL"]
    smolvla = config["type"] == "smolvla"
    return PublicCheckpoint(
        source=folder,
        config=replace(policy, **normalisation),
        weights=ours,
        cameras=tuple(cameras),
        state_dim=_feature_width(config, "input_features", "observation.state"),
        action_dim=_feature_width(config, "output_features", "action"),
        image_rule=ImageRule(
            orientation=options.orientation,
            size_px=policy.backbone.image_px,
            padding="left_top" if smolvla else "centre",
            resize="torch_bilinear",
        ),
        statistics=statistics,
        why_no_statistics=why_not,
        tokenizer=tokenizer,
        vocab_size=ours["backbone.language_model.embed_tokens.weight"].shape[0],
    )


def read_openpi(folder: Path, config: Mapping[str, Any], options: PublicOptions) -> PublicCheckpoint:
    weights = _without_prefix(read_weights(folder))
    pi05 = any(name.startswith("time_mlp_in.") for name in weights)
    as_lerobot = {
        "type": "pi05" if pi05 else "pi0",
        "chunk_size": config["action_horizon"],
        "max_action_dim": config["action_dim"],
        "max_state_dim": config["action_dim"],
        "paligemma_variant": config["paligemma_variant"],
        "action_expert_variant": config["action_expert_variant"],
    }
    policy, ours = _pi_policy(folder, as_lerobot, weights)
    mode: NormaliserMode = "quantile" if pi05 else "mean_std"
    policy = replace(policy, state_normalisation=mode, action_normalisation=mode)
    statistics, why_not = given_statistics(options), ""
    if statistics is None:
        policy = replace(policy, near_constant=1e-6)
        try:
            statistics = read_norm_stats(find_norm_stats(folder, options.asset_id))
        except DataError as error:
            why_not = str(error)
    if pi05 and options.prompt is None and statistics is not None:
        statistics = None
        why_not = (
            f"{folder} is an openpi π0.5 checkpoint, which does not say whether the state stands in the prompt; "
            "add --prompt pi05 (it does), or --prompt newline (it does not: pi05_libero)"
        )
    return PublicCheckpoint(
        source=folder,
        config=policy,
        weights=ours,
        # openpi's names; its LIBERO policies leave the right wrist out.
        cameras=("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
        state_dim=None,
        action_dim=None,
        image_rule=ImageRule(orientation=options.orientation, size_px=policy.backbone.image_px, resize="pil_bilinear"),
        statistics=statistics,
        why_no_statistics=why_not,
        vocab_size=ours["backbone.language_model.embed_tokens.weight"].shape[0],
    )


def _pi_policy(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[PolicyConfig, dict[str, Tensor]]:
    """π0 or π0.5, told from the weights."""
    pi05 = "time_mlp_in.weight" in weights
    if pi05 != (config["type"] == "pi05"):
        raise DataError(
            f"{folder}/config.json says {config['type']}, its weights are {'π0.5' if pi05 else 'π0'}'s; correct the file's type"
        )
    sizes = _sizes(folder)
    px = config.get("image_resolution", (224, 224))[0]
    vision, text, expert = SiglipConfig(image_px=px), None, None
    if sizes:
        vision, text, expert = (
            siglip_sizes(sizes["vision"]),
            DecoderConfig(**sizes["vlm"]),
            DecoderConfig(**sizes["expert"]),
        )
    else:
        text, expert = _variant(config["paligemma_variant"], folder), _variant(config["action_expert_variant"], folder)
    weights = _with_token_table(weights, "paligemma_with_expert.paligemma.")
    ours = under_our_names(renaming.PI, weights, folder)
    state_width = weights["state_proj.weight"].shape[1] if not pi05 else config["max_state_dim"]
    policy = PolicyConfig(
        backbone=PaliGemmaConfig(
            vision=vision, text=text, vocab_size=ours["backbone.language_model.embed_tokens.weight"].shape[0]
        ),
        expert=GemmaExpertConfig(
            gemma=expert,
            noise_level="adaptive_norm" if pi05 else "action_token",
            state="none" if pi05 else "token",
        ),
        objective=Flow(num_sampling_steps=config.get("num_inference_steps", 10)),
        horizon=config["chunk_size"],
        prompt="pi05" if pi05 else "newline",
        state_layout=VectorLayout(name="padded", width=state_width),
        action_layout=VectorLayout(name="padded", width=weights["action_in_proj.weight"].shape[1]),
    )
    return policy, ours


def _smolvla_policy(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[PolicyConfig, dict[str, Tensor]]:
    if config.get("add_image_special_tokens") or config.get("adapt_to_pi_aloha"):
        raise DataError(f"{folder} uses add_image_special_tokens or adapt_to_pi_aloha, which vlatune does not have")
    if config.get("attention_mode", "cross_attn") != "cross_attn":
        raise DataError(f"{folder} has attention_mode {config['attention_mode']!r}; vlatune reads cross_attn")
    weights = _with_token_table(weights, "vlm_with_expert.vlm.", "text_model.")
    ours = under_our_names(renaming.SMOLVLA, weights, folder)
    backbone, expert = SmolVLMConfig(), SmolVLAExpertConfig()
    sizes = _sizes(folder)
    depth = depth_of(ours, "backbone.language_model.layers.")
    expert_depth = depth_of(ours, "expert.layers.")
    expert_mlp, expert_width = ours["expert.layers.0.mlp.gate_proj.weight"].shape
    text = backbone.text
    vision = replace(backbone.vision, image_px=config["resize_imgs_with_padding"][0])
    scale_factor = backbone.scale_factor
    if sizes:
        text = _llama({**_vlm_text_config(folder), **sizes["text"]})
        vision = siglip_sizes(sizes["vision"])
        scale_factor = sizes["scale_factor"]
    text = replace(text, depth=depth)
    policy = PolicyConfig(
        backbone=replace(
            backbone,
            vision=vision,
            scale_factor=scale_factor,
            text=text,
            vocab_size=ours["backbone.language_model.embed_tokens.weight"].shape[0],
        ),
        expert=replace(
            expert,
            decoder=replace(text, width=expert_width, mlp_dim=expert_mlp, depth=expert_depth),
            self_attn_every=config["self_attn_every_n_layers"],
        ),
        objective=Flow(num_sampling_steps=config.get("num_steps", 10)),
        horizon=config["chunk_size"],
        prompt="newline",
        state_layout=VectorLayout(name="padded", width=weights["state_proj.weight"].shape[1]),
        action_layout=VectorLayout(name="padded", width=weights["action_in_proj.weight"].shape[1]),
    )
    return policy, ours


def _without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LeRobot's files name everything `model.…`; conversions from openpi do not; compiled models add `_orig_mod.`."""
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}
    if not any(name.startswith("model.") for name in plain):
        return plain
    return {name.removeprefix("model."): tensor for name, tensor in plain.items()}


def _policy_tokenizer(config: Mapping[str, Any]) -> str:
    """What LeRobot's processors load for this policy."""
    return str(config.get("vlm_model_name", PALIGEMMA_TOKENIZER))


def _with_token_table(weights: Mapping[str, Tensor], vlm: str, text: str = "language_model.") -> dict[str, Tensor]:
    """A tied file holds the token table under one of two names."""
    table, head = f"{vlm}model.{text}embed_tokens.weight", f"{vlm}lm_head.weight"
    added = {table: weights[head]} if table not in weights and head in weights else {}
    return {**weights, **added}


def _sizes(folder: Path) -> dict[str, Any] | None:
    file = folder / "sizes.json"
    if not file.is_file():
        return None
    sizes: dict[str, Any] = json.loads(file.read_text())
    return sizes


def _llama(sizes: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(
        width=sizes["hidden_size"],
        depth=sizes["num_hidden_layers"],
        mlp_dim=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        family="llama",
        norm_eps=sizes["rms_norm_eps"],
    )


def _vlm_text_config(folder: Path) -> dict[str, Any]:
    file = folder / "vlm" / "config.json"
    if not file.is_file():
        return {}
    config: dict[str, Any] = json.loads(file.read_text())["text_config"]
    return config


def _variant(name: str, folder: Path) -> DecoderConfig:
    name = name.removesuffix("_lora")
    if name not in VARIANTS:
        raise DataError(
            f"{folder}/config.json names the size {name!r}; there are {', '.join(VARIANTS)}, others need a sizes.json"
        )
    return VARIANTS[name]


def _feature_width(config: Mapping[str, Any], group: str, name: str) -> int | None:
    feature = config.get(group, {}).get(name)
    return None if feature is None else int(feature["shape"][0])
