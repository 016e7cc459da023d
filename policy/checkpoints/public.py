"""Public checkpoints, read: LeRobot's π0, π0.5 and SmolVLA, openpi's converted ones, RDT-1B, diffusion_policy's U-Net.

Which model it is comes from its config.json and from the names of its weights; sizes come from config.json, from a
sizes.json beside it (models of other than the published sizes), and from the weights' own shapes."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor

from ...data.episodes import DataError
from ...data.images import ImageRule, Orientation
from ...data.normalise import NormaliserMode, Statistics
from ...data.prompt import PromptStyle
from ...data.vector_layout import VectorLayout
from ..backbones.paligemma import PaliGemmaConfig
from ..backbones.siglip import SiglipConfig
from ..backbones.siglip_t5 import SiglipT5Config
from ..backbones.smolvlm import SmolVLMConfig
from ..config import Embodiment, PolicyConfig
from ..experts.dit import DiTExpertConfig
from ..experts.gemma import GemmaExpertConfig
from ..experts.smolvla import SmolVLAExpertConfig
from ..layers.decoder import GEMMA_2B, GEMMA_300M, DecoderConfig
from ..objectives.diffusion import Diffusion
from ..objectives.flow import Flow
from ..policy import Policy
from . import renaming
from .lerobot_processors import read_normalisation
from .openpi_norm_stats import find_norm_stats, read_norm_stats
from .plain_models import local_folder, read_plain
from .weight_files import load_strict, read_weights

VARIANTS = {
    "gemma_2b": GEMMA_2B,
    "gemma_300m": GEMMA_300M,
    "dummy": DecoderConfig(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),
}
"""openpi's names of sizes."""
PALIGEMMA_TOKENIZER = "google/paligemma-3b-pt-224"
"""Gated: accept its licence on the hub, or give a local folder."""
RDT_WIDTH = 128
"""Of its unified state and action vector."""


@dataclass(frozen=True, kw_only=True)
class PublicOptions:
    """What a public checkpoint does not say about itself, or calls by other names."""

    cameras: tuple[str, ...] = ()
    """The robot's names for the checkpoint's cameras, in the checkpoint's order; fewer leave the last ones out. Empty: the
    checkpoint's own names."""
    orientation: Orientation = "raw"
    """How the robot's pictures are turned upright; LIBERO's need rot180."""
    tokenizer: str | None = None
    """Name or folder; None: the one that the checkpoint was trained with, from the hub."""
    statistics: Path | None = None
    """A normalisation.json or a cache's statistics.json, in place of the checkpoint's own."""
    asset_id: str | None = None
    """Which of several norm_stats.json of an openpi checkpoint."""
    prompt: PromptStyle | None = None
    """What is tokenised; openpi's π0.5 does not say (pi05, or newline for its LIBERO checkpoint)."""
    robot: str = "libero_panda"
    """The robot card's name."""
    control_hz: float = 20.0
    """Actions a second; RDT reads it."""

    vision: str = "google/siglip-so400m-patch14-384"
    """RDT's vision tower, which its checkpoint does not hold: a folder or the hub's name."""
    state_slots: tuple[int, ...] = ()
    """RDT: the places of the robot's state in the unified vector of 128."""
    action_slots: tuple[int, ...] = ()
    """The same for its actions."""


@dataclass(frozen=True, kw_only=True)
class PublicCheckpoint:
    """A public checkpoint under our names. What only acting needs may be missing: `policy` says so."""

    source: Path
    config: PolicyConfig
    weights: Mapping[str, Tensor]
    cameras: tuple[str, ...]
    """The checkpoint's own names; empty where it has none."""
    state_dim: int | None
    """The robot's; None where only statistics would tell."""
    action_dim: int | None
    image_rule: ImageRule
    statistics: Statistics | None
    why_no_statistics: str = ""
    """What acting would have to tell the user."""
    tokenizer: str = PALIGEMMA_TOKENIZER
    vocab_size: int = 0
    """Rows of the token table; 0 for a text encoder's tokens."""
    encoder_width: int | None = None
    vision: str | None = None
    """Where its vision tower is, if not among the weights."""


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
        checkpoint = _read_lerobot(folder, config, options)
    elif "action_horizon" in config and "paligemma_variant" in config:
        checkpoint = _read_openpi(folder, config, options)
    elif "img_token_dim" in config or not config:
        checkpoint = _read_rdt(folder, config, options)
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


def _read_lerobot(folder: Path, config: Mapping[str, Any], options: PublicOptions) -> PublicCheckpoint:
    if config.get("use_relative_actions"):
        raise DataError(
            f"{folder} was trained on actions relative to the state (use_relative_actions), which vlatune does not do"
        )
    weights = without_prefix(read_weights(folder))
    read = _smolvla_policy if config["type"] == "smolvla" else _pi_policy
    policy, ours = read(folder, config, weights)
    normalisation: dict[str, Any] = {}
    statistics, why_not = None, ""
    tokenizer = policy_tokenizer(config)
    try:
        found = read_normalisation(folder, config, weights, statistics=_given_statistics(options))
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


def _read_openpi(folder: Path, config: Mapping[str, Any], options: PublicOptions) -> PublicCheckpoint:
    weights = without_prefix(read_weights(folder))
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
    statistics, why_not = _given_statistics(options), ""
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
        vision, text, expert = _vision(sizes["vision"]), DecoderConfig(**sizes["vlm"]), DecoderConfig(**sizes["expert"])
    else:
        text, expert = _variant(config["paligemma_variant"], folder), _variant(config["action_expert_variant"], folder)
    weights = _with_token_table(weights, "paligemma_with_expert.paligemma.")
    ours = _ours(renaming.PI, weights, folder)
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
    ours = _ours(renaming.SMOLVLA, weights, folder)
    backbone, expert = SmolVLMConfig(), SmolVLAExpertConfig()
    sizes = _sizes(folder)
    depth = _depth(ours, "backbone.language_model.layers.")
    expert_depth = _depth(ours, "expert.layers.")
    expert_mlp, expert_width = ours["expert.layers.0.mlp.gate_proj.weight"].shape
    text = backbone.text
    vision = replace(backbone.vision, image_px=config["resize_imgs_with_padding"][0])
    scale_factor = backbone.scale_factor
    if sizes:
        text = _llama({**_vlm_text_config(folder), **sizes["text"]})
        vision = _vision(sizes["vision"])
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


def _read_rdt(folder: Path, config: Mapping[str, Any], options: PublicOptions) -> PublicCheckpoint:
    weights = read_weights(folder)
    ours = _ours(renaming.RDT, weights, folder)
    width = ours["expert.x_pos_embed"].shape[2]
    head_dim = ours["expert.blocks.0.attn.q_norm.weight"].shape[0]
    image_tokens = ours["expert.img_cond_pos_embed"].shape[1]
    backbone = SiglipT5Config(vision=_siglip(options.vision))
    scheduler = config.get("config", config).get("noise_scheduler", {})
    policy = PolicyConfig(
        backbone=backbone,
        expert=DiTExpertConfig(
            width=width,
            depth=_depth(ours, "expert.blocks."),
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
        state_layout=VectorLayout(name="rdt", width=RDT_WIDTH, slots=options.state_slots or None),
        action_layout=VectorLayout(name="rdt", width=RDT_WIDTH, slots=options.action_slots or None),
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
        statistics=_given_statistics(options),
        why_no_statistics=f"{folder} holds RDT's weights and no robot; add --statistics, --state-slots and --action-slots",
        tokenizer="google/t5-v1_1-xxl",
        encoder_width=ours["expert.lang_adaptor.0.weight"].shape[1],
        vision=options.vision,
    )


def _prediction(diffusers_name: str) -> Any:
    return {"v_prediction": "v"}.get(diffusers_name, diffusers_name)


def _given_statistics(options: PublicOptions) -> Statistics | None:
    return None if options.statistics is None else Statistics.load(options.statistics)


def without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LeRobot's files name everything `model.…`; conversions from openpi do not; compiled models add `_orig_mod.`."""
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}
    if not any(name.startswith("model.") for name in plain):
        return plain
    return {name.removeprefix("model."): tensor for name, tensor in plain.items()}


def policy_tokenizer(config: Mapping[str, Any]) -> str:
    """What LeRobot's processors load for this policy."""
    return str(config.get("vlm_model_name", PALIGEMMA_TOKENIZER))


def _with_token_table(weights: Mapping[str, Tensor], vlm: str, text: str = "language_model.") -> dict[str, Tensor]:
    """A tied file holds the token table under one of two names."""
    table, head = f"{vlm}model.{text}embed_tokens.weight", f"{vlm}lm_head.weight"
    added = {table: weights[head]} if table not in weights and head in weights else {}
    return {**weights, **added}


def _ours(table: renaming.Renaming, weights: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    ours, unknown = table.ours(weights)
    if unknown:
        raise DataError(
            f"{folder} has {len(unknown)} weights that its model does not know, the first is {min(unknown)}; it may be of another "
            "version or another model"
        )
    return ours


def _config(folder: Path) -> dict[str, Any]:
    """Its config.json, or that of the run above a DeepSpeed checkpoint; empty where there is none."""
    training_state = folder.is_file() or any(folder.rglob("mp_rank_00_model_states.pt"))
    for place in (folder, *list(folder.parents)[:2]) if training_state else (folder,):
        if (place / "config.json").is_file():
            config: dict[str, Any] = json.loads((place / "config.json").read_text())
            return config
    return {}


def _sizes(folder: Path) -> dict[str, Any] | None:
    file = folder / "sizes.json"
    if not file.is_file():
        return None
    sizes: dict[str, Any] = json.loads(file.read_text())
    return sizes


def _vision(sizes: Mapping[str, int]) -> SiglipConfig:
    return SiglipConfig(
        image_px=sizes["image_size"],
        patch_px=sizes["patch_size"],
        width=sizes["hidden_size"],
        mlp_dim=sizes["intermediate_size"],
        depth=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
    )


def _siglip(source: str) -> SiglipConfig:
    """The sizes of a plain SigLIP in a local folder; of anything else the published so400m's at 384 pixels."""
    file = Path(source) / "config.json"
    if not file.is_file():
        return SiglipT5Config().vision
    sizes = json.loads(file.read_text())
    return _vision(sizes.get("vision_config", sizes))


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


def _depth(weights: Mapping[str, Tensor], layers: str) -> int:
    numbers = (re.match(re.escape(layers) + r"(\d+)\.", name) for name in weights)
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)


def _feature_width(config: Mapping[str, Any], group: str, name: str) -> int | None:
    feature = config.get(group, {}).get(name)
    return None if feature is None else int(feature["shape"][0])


def _renamed_cameras(theirs: tuple[str, ...], robots: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    if theirs and len(robots) > len(theirs):
        raise DataError(f"{folder} has {len(theirs)} cameras ({', '.join(theirs)}), and {len(robots)} names were given")
    return robots or theirs
