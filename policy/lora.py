"""LoRA through PEFT: which projections of which model a scope names, adapters in PEFT's own format, and merging them.

A scope is a regular expression over the module names of one backbone or expert. Projections that nobody reads (the last
prefix layer's queries, output and feed-forward, frozen towers) are never adapted. Hu et al. 2021."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import peft
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from ..data.episodes import DataError
from .policy import Policy

Scope = Literal["none", "attention", "attention+mlp", "cross_attn", "adaptor_only", "all"]

_DECODER_ATTENTION = r"layers\.\d+\.self_attn\.[qkvo]_proj"
_DECODER_MLP = r"layers\.\d+\.mlp\.(gate|up|down)_proj"
_VISION_ATTENTION = r"vision_tower\.encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj"
_VISION = rf"{_VISION_ATTENTION}|vision_tower\.encoder\.layers\.\d+\.mlp\.fc[12]"
_DIT_ATTENTION = r"blocks\.\d+\.(attn\.(qkv|proj)|cross_attn\.(q|kv|proj))"
_DIT_MLP = r"blocks\.\d+\.ffn\.fc[12]"
_DIT_ADAPTORS = r"(lang|img|state)_adaptor\.\d+"

SCOPES: Mapping[str, Mapping[str, str]] = {
    "paligemma": {
        "attention": rf"language_model\.{_DECODER_ATTENTION}",
        "attention+mlp": rf"language_model\.({_DECODER_ATTENTION}|{_DECODER_MLP})",
        "adaptor_only": r"multi_modal_projector|language_projector|state_proj",
        "all": rf"language_model\.({_DECODER_ATTENTION}|{_DECODER_MLP})|{_VISION}"
        r"|multi_modal_projector|language_projector|state_proj",
    },
    "smolvlm": {
        "attention": rf"language_model\.{_DECODER_ATTENTION}",
        "attention+mlp": rf"language_model\.({_DECODER_ATTENTION}|{_DECODER_MLP})",
        "adaptor_only": r"connector|state_proj",
        "all": rf"language_model\.({_DECODER_ATTENTION}|{_DECODER_MLP})|{_VISION}|connector|state_proj",
    },
    "siglip_t5": {"attention": _VISION_ATTENTION, "all": _VISION},
    "clip": {},
    "gemma": {
        "attention": _DECODER_ATTENTION,
        "attention+mlp": f"{_DECODER_ATTENTION}|{_DECODER_MLP}",
        "adaptor_only": r"(action|state)_(in_|out_)?proj|(action_)?time_mlp_(in|out)",
        "all": rf"{_DECODER_ATTENTION}|{_DECODER_MLP}|(action|state)_(in_|out_)?proj|(action_)?time_mlp_(in|out)"
        r"|(layers\.\d+\.\w+|norm)\.dense",
    },
    "smolvla": {
        "attention": _DECODER_ATTENTION,
        "attention+mlp": f"{_DECODER_ATTENTION}|{_DECODER_MLP}",
        "adaptor_only": r"action_(in|out)_proj|action_time_mlp_(in|out)",
        "all": rf"{_DECODER_ATTENTION}|{_DECODER_MLP}|action_(in|out)_proj|action_time_mlp_(in|out)",
    },
    "dit": {
        "attention": _DIT_ATTENTION,
        "attention+mlp": f"{_DIT_ATTENTION}|{_DIT_MLP}",
        "cross_attn": r"blocks\.\d+\.cross_attn\.(q|kv|proj)",
        "adaptor_only": _DIT_ADAPTORS,
        "all": rf"{_DIT_ATTENTION}|{_DIT_MLP}|{_DIT_ADAPTORS}|(t|freq)_embedder\.mlp\.\d+|final_layer\.ffn_final\.fc[12]",
    },
    "unet": {"all": r".+"},
    "mlp": {"all": r".+"},
}
"""type of backbone or expert -> scope -> the whole names of its modules."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on backbone, expert or both."""

    backbone: Scope = "attention"
    """Projections of the backbone."""
    expert: Scope = "attention"
    """Projections of the expert."""
    rank: int = 16
    """Of the update."""
    alpha: int | None = None
    """The update is scaled by alpha / rank; None: twice the rank."""
    dropout: float = 0.05
    """On an adapter's input, in training."""


def adapter_targets(policy: Policy, config: LoraConfig) -> list[str]:
    """Full module names. Raises ValueError for a scope that the model does not have, or that finds nothing."""
    dead = {id(p) for part in (policy.backbone, policy.expert) for p in part.unread_parameters()}
    targets = []
    for part, kind, scope in (
        ("backbone", policy.config.backbone.type, config.backbone),
        ("expert", policy.config.expert.type, config.expert),
    ):
        if scope == "none":
            continue
        if scope not in SCOPES[kind]:
            there = ", ".join(("none", *SCOPES[kind]))
            raise ValueError(f"lora.{part} is {scope!r}, and a {kind} has {there}")
        found = [
            f"{part}.{name}"
            for name, module in getattr(policy, part).named_modules()
            if isinstance(module, nn.Linear | nn.Conv1d)
            and re.fullmatch(SCOPES[kind][scope], name)
            and id(module.weight) not in dead
        ]
        if not found:
            raise ValueError(
                f"lora.{part} is {scope!r}, and nothing of this {kind} is in it; choose another scope or none"
            )
        targets += found
    if not targets:
        raise ValueError("lora.backbone and lora.expert are both 'none': there is nothing to adapt")
    return targets


def add_adapters(policy: Policy, config: LoraConfig) -> None:
    """Put adapters into `policy`, in place; everything else is frozen. They change nothing until they are trained."""
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or 2 * config.rank,
        lora_dropout=config.dropout,
        target_modules=adapter_targets(policy, config),
        bias="none",
    )
    peft.inject_adapter_in_model(settings, policy)
    policy.train(policy.training)  # PEFT's new modules start in training mode, dropout and all


def adapter_of(policy: Policy) -> peft.LoraConfig | None:
    """The settings of the adapters in `policy`; None if it has none."""
    settings = getattr(policy, "peft_config", {}).get("default")
    assert settings is None or isinstance(settings, peft.LoraConfig)
    return settings


def plain_weights(policy: Policy, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a policy with adapters: the adapted weights under their plain names, without the adapters."""
    if adapter_of(policy) is None:
        return dict(weights)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in weights.items() if ".lora_" not in name}


def merged_weights(policy: Policy, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As `plain_weights`, with the adapters' updates added."""
    merged = plain_weights(policy, weights)
    for name, module in policy.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            weight = merged[f"{name}.weight"]
            delta = module.get_delta_weight("default").detach()
            merged[f"{name}.weight"] = (weight.float() + delta.float().to(weight.device)).to(weight.dtype)
    return merged


def save_adapter(policy: Policy, weights: Mapping[str, Tensor], folder: Path) -> None:
    """In PEFT's own format: `PeftModel.from_pretrained` loads it onto a policy of the same plain weights."""
    settings = adapter_of(policy)
    if settings is None:
        raise ValueError("this policy has no adapters")
    folder.mkdir(parents=True, exist_ok=True)
    settings.save_pretrained(str(folder))
    adapters = get_peft_model_state_dict(policy, state_dict=dict(weights))
    named = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in adapters.items()}
    save_file(named, folder / "adapter_model.safetensors")


def merge_adapter(policy: Policy, folder: Path) -> Policy:
    """`policy` with the adapter in `folder` added to its weights; in place. Raises DataError if it does not fit."""
    if not (folder / "adapter_config.json").is_file():
        raise DataError(f"there is no adapter_config.json in {folder}; give a folder that PEFT wrote")
    try:
        adapted = peft.PeftModel.from_pretrained(policy, str(folder))
    except (ValueError, RuntimeError) as error:
        raise DataError(f"the adapter in {folder} does not fit these weights: {str(error).splitlines()[0]}") from error
    merged: Policy = adapted.merge_and_unload()
    return merged
