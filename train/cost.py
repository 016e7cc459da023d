"""What a training step costs, known before a GPU is rented: floating-point operations and parameters.

All is counted by running the real policy, forward and backward, on torch's meta device, where tensors have a shape and no content: a full
π0.5 takes seconds and next to no memory. Nothing is measured, so all of it is an estimate of what a GPU will do."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import peft
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig

from ..data.batch import Batch, Observation, Prompts
from ..data.images import ImageRule
from ..data.normalise import FieldStatistics, Statistics
from ..data.robots import LIBERO_PANDA, robot_named
from ..data.sentencepiece_tokenizer import MAX_TRAINED_VOCABULARY
from ..policy.backbones.clip import ClipConfig
from ..policy.backbones.paligemma import PaliGemmaConfig
from ..policy.backbones.smolvlm import SmolVLMConfig
from ..policy.config import Embodiment, PolicyConfig
from ..policy.lora import adapter_of
from ..policy.objectives.draws import DrawKeys
from ..policy.policy import Policy

PEAK_FLOPS: Mapping[str, float] = {
    "A10": 125e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A100": 312e12,
    "RTX A6000": 154.8e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "B200": 2250e12,
}
"""Operations a second of dense matrix products in bfloat16 with float32 sums, from NVIDIA's data sheet of each product (which print
twice as much where they count sparse matrices). Without a suffix: the SXM module."""

OTHER_CHIPS = {"MIG", "LAPTOP", "D"}
"""Words in a device's name that say that it is a part, or another version, of the chip before."""

T5_XXL_WIDTH = 4096
"""Features of a token of T5-XXL, whose texts RDT-1B reads (google/t5-v1_1-xxl)."""

PARTS = ("vision", "language model", "expert", "other")


def peak_flops(device_name: str) -> float | None:
    """Of the device that torch, or a person, calls so: `NVIDIA H100 80GB HBM3`, `a100`. None: unknown."""
    words = set(re.split(r"[\s-]+", device_name.upper()))
    fitting = [name for name in PEAK_FLOPS if set(name.upper().split()) <= words]
    return None if not fitting or words & OTHER_CHIPS else PEAK_FLOPS[max(fitting, key=len)]


@dataclass(frozen=True, kw_only=True)
class PartSize:
    """How many parameters a part of a policy has."""

    total: int
    trained: int
    adapters: int
    """Of those trained, the ones that LoRA added."""


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Floating-point operations per sample; a multiplication and an addition are two."""

    forward: float
    total: float
    """Forward and backward."""


def meta_policy(config: PolicyConfig, *, vocab_size: int | None = None) -> Policy:
    """As a LIBERO cache with two cameras would make it, nothing frozen yet. `vocab_size`: a compact tokenizer's; None: the public one's."""
    layout, backbone = config.state_layout, config.backbone
    robot = robot_named(layout.robots[0]) if layout is not None and layout.robots else LIBERO_PANDA
    if vocab_size is not None and isinstance(backbone, PaliGemmaConfig | SmolVLMConfig):
        config = replace(config, backbone=replace(backbone, vocab_size=None))
    tokenizer_size = CLIPTextConfig().vocab_size if isinstance(backbone, ClipConfig) else MAX_TRAINED_VOCABULARY
    embodiment = Embodiment(
        robot=robot.name,
        state_dim=len(robot.state_names),
        action_dim=len(robot.action_names),
        control_hz=robot.control_hz,
        gripper_action=robot.gripper_action,
        cameras=robot.cameras,
        image_rule=ImageRule(size_px=backbone.image_px),
        vocab_size=vocab_size or tokenizer_size,
        encoder_width=T5_XXL_WIDTH if backbone.reads_embeddings else None,
    )
    statistics = Statistics(state=_any_statistics(embodiment.state_dim), actions=_any_statistics(embodiment.action_dim))
    with torch.device("meta"):
        return Policy(config, embodiment, statistics)


def _any_statistics(size: int) -> FieldStatistics:
    low, high = (-1.0,) * size, (1.0,) * size
    return FieldStatistics(mean=(0.0,) * size, std=high, min=low, max=high, q01=low, q99=high, count=0)


def meta_batch(policy: Policy, batch_size: int, prompt_tokens: int, *, vision_features: bool = False) -> Batch:
    """Every camera seen in every sample, in pictures or in `vision_features` that stand in for them."""
    config, embodiment = policy.config, policy.embodiment
    offsets, px = len(config.observation_offsets), config.backbone.image_px
    with torch.device("meta"):
        ids_BL = torch.zeros(batch_size, prompt_tokens, dtype=torch.int64)
        embedding_BLE = None
        if config.backbone.reads_embeddings:
            embedding_BLE = torch.zeros(batch_size, prompt_tokens, embodiment.encoder_width or T5_XXL_WIDTH)
        seen_BT = torch.ones(batch_size, offsets, dtype=torch.bool)
        images: dict[str, Tensor] = {}
        features: dict[str, Tensor] | None = None
        pictures = torch.zeros(batch_size, offsets, px, px, 3, dtype=torch.uint8)
        if vision_features:
            with torch.no_grad():
                features_MND = policy.backbone.picture_features(pictures.flatten(0, 1))
            features = dict.fromkeys(embodiment.cameras, features_MND.unflatten(0, (batch_size, offsets)))
        else:
            images = dict.fromkeys(embodiment.cameras, pictures)
        return Batch(
            observation=Observation(
                images=images,
                image_mask=dict.fromkeys(embodiment.cameras, seen_BT),
                state_BTS=torch.zeros(batch_size, offsets, embodiment.state_dim),
                prompts=Prompts(
                    ids_BL=ids_BL, mask_BL=torch.ones_like(ids_BL, dtype=torch.bool), embedding_BLE=embedding_BLE
                ),
                features=features,
            ),
            actions_BHA=torch.zeros(batch_size, *policy.action_shape),
            valid_BH=torch.ones(batch_size, config.horizon, dtype=torch.bool),
            sample_index_B=torch.zeros(batch_size, dtype=torch.int64),
        )


def flops_per_sample(policy: Policy, batch: Batch) -> float:
    """Model operations of one forward and backward pass over `batch`, by its number of samples: with `peak_flops` and the samples a second
    they give model FLOP utilisation. What activation checkpointing computes again is not counted; RS-IMLE's search is.

    `policy` is as it is trained, frozen and adapted, under whatever engine; neither it nor any random state is touched."""
    with torch.device("meta"):
        copy = Policy(policy.config, policy.embodiment, policy.statistics)
        settings = adapter_of(policy)
        if settings is not None:
            peft.inject_adapter_in_model(settings, copy)
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    for name, parameter in copy.named_parameters():
        parameter.requires_grad_(name in trained)
    return step_flops(copy, batch.to("meta")).total


def step_flops(policy: Policy, batch: Batch) -> StepFlops:
    """Of a policy and a batch on the meta device."""
    num_samples = len(batch.valid_BH)
    with FlopCounterMode(display=False) as counter:
        loss = training_loss(policy, batch)
        forward = counter.get_total_flops()
        loss.backward()
    return StepFlops(forward=forward / num_samples, total=counter.get_total_flops() / num_samples)


def training_loss(policy: Policy, batch: Batch) -> Tensor:
    """A scalar, for a policy and a batch on the meta device."""
    # Noise is drawn for samples by their number, which a tensor without content cannot give.
    keys = DrawKeys(seed=0, step=0, sample_index_B=torch.arange(len(batch.valid_BH)))
    loss = policy(batch, keys)
    total: Tensor = (loss.entries_BHA * loss.weight_BHA).sum()
    return total


def part_of(parameter_name: str) -> str:
    """One of PARTS."""
    if parameter_name.startswith("expert."):
        return "expert"
    if parameter_name.startswith("backbone.vision_tower."):
        return "vision"
    return (
        "language model" if parameter_name.startswith(("backbone.language_model.", "backbone.text_tower.")) else "other"
    )


def part_sizes(policy: Policy) -> dict[str, PartSize]:
    """Every part's, and that of the policy, `together`."""
    rows = [(part_of(name), name, parameter) for name, parameter in policy.named_parameters()]

    def size(parts: Sequence[str]) -> PartSize:
        of_parts = [(name, parameter) for part, name, parameter in rows if part in parts]
        return PartSize(
            total=sum(parameter.numel() for _, parameter in of_parts),
            trained=sum(parameter.numel() for _, parameter in of_parts if parameter.requires_grad),
            adapters=sum(parameter.numel() for name, parameter in of_parts if ".lora_" in name),
        )

    return {**{part: size([part]) for part in PARTS}, "together": size(PARTS)}
