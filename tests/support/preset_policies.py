"""A policy of every preset, tiny or full, with batches that it reads."""

import dataclasses

import numpy as np
import torch

from vlatune.data.batch import Batch, Observation, Prompts
from vlatune.data.images import ImageRule
from vlatune.data.normalise import FieldStatistics, Statistics
from vlatune.data.robots import LIBERO_PANDA, robot_named
from vlatune.data.robots.card import RobotCard
from vlatune.policy.backbones.paligemma import PaliGemmaConfig
from vlatune.policy.backbones.siglip import SiglipConfig
from vlatune.policy.backbones.smolvlm import SmolVLMConfig
from vlatune.policy.config import Embodiment, PolicyConfig
from vlatune.policy.experts.gemma import GemmaExpertConfig
from vlatune.policy.experts.smolvla import SmolVLAExpertConfig
from vlatune.policy.layers.decoder import DecoderConfig
from vlatune.policy.policy import Policy
from vlatune.policy.presets import PRESETS

CAMERAS = ("agentview", "eye_in_hand")
ACTION_DIM, VOCABULARY = 7, 50


def statistics(size: int) -> FieldStatistics:
    return FieldStatistics(
        mean=(0.5,) * size,
        std=(1.25,) * size,
        min=(-2.0,) * size,
        max=(3.0,) * size,
        q01=(-2.0,) * size,
        q99=(3.0,) * size,
        count=100,
    )


def robot_for(config: PolicyConfig) -> RobotCard:
    """The card that the config's layout is for, or LIBERO's usual one."""
    layout = config.state_layout
    return robot_named(layout.robots[0]) if layout is not None and layout.robots else LIBERO_PANDA


def embodiment_for(config: PolicyConfig, *, encoder_width: int = 40, vocab_size: int = VOCABULARY) -> Embodiment:
    robot = robot_for(config)
    return Embodiment(
        robot=robot.name,
        state_dim=len(robot.state_names),
        action_dim=ACTION_DIM,
        control_hz=20.0,
        gripper_action=6,
        cameras=CAMERAS,
        image_rule=ImageRule(size_px=config.backbone.image_px),
        vocab_size=vocab_size,
        encoder_width=encoder_width if config.backbone.reads_embeddings else None,
    )


def make_policy(config: PolicyConfig | str, seed: int = 0) -> Policy:
    """A tiny preset by name, or any config. No weight is zero: zeros hide mistakes."""
    if isinstance(config, str):
        config = PRESETS[config](tiny=True)
    torch.manual_seed(seed)
    embodiment = embodiment_for(config)
    policy = Policy(
        config,
        embodiment,
        Statistics(state=statistics(embodiment.state_dim), actions=statistics(ACTION_DIM)),
    )
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return policy


def make_small_pi05() -> Policy:
    """π0.5 in the full model's proportions: an eighth of its widths, a third of its depth, 256 tokens a camera, a chunk of
    10. What benchmarks measure ratios on."""
    heads: dict[str, int] = {"depth": 6, "num_heads": 8, "num_kv_heads": 1, "head_dim": 32}
    config = dataclasses.replace(
        PRESETS["pi05"](tiny=True),
        backbone=PaliGemmaConfig(
            vision=SiglipConfig(image_px=224, patch_px=14, width=144, mlp_dim=538, depth=9, num_heads=4),
            text=DecoderConfig(width=256, mlp_dim=2048, **heads),
        ),
        expert=GemmaExpertConfig(gemma=DecoderConfig(width=128, mlp_dim=512, **heads)),
        horizon=10,
        state_layout=None,
        action_layout=None,
    )
    torch.manual_seed(0)
    embodiment = dataclasses.replace(embodiment_for(config), cameras=(*CAMERAS, "absent"))
    return Policy(config, embodiment, Statistics(state=statistics(8), actions=statistics(7)))


def make_small_smolvla() -> Policy:
    """SmolVLA in the full model's proportions: a quarter of its widths and of its depth, images of 512 pixels and so 64 tokens a
    camera, a chunk of 50; cross- and self-attention layers in turn. What benchmarks measure ratios on."""
    text = DecoderConfig(
        family="llama", width=240, depth=4, mlp_dim=640, num_heads=15, num_kv_heads=5, head_dim=16, norm_eps=1e-5
    )
    vision = SiglipConfig(image_px=512, patch_px=16, width=192, mlp_dim=768, depth=3, num_heads=12)
    config = dataclasses.replace(
        PRESETS["smolvla"](),
        backbone=SmolVLMConfig(vision=vision, text=text, vocab_size=None),
        expert=SmolVLAExpertConfig(decoder=dataclasses.replace(text, width=180, mlp_dim=512)),
    )
    torch.manual_seed(0)
    embodiment = dataclasses.replace(embodiment_for(config), cameras=(*CAMERAS, "absent"))
    return Policy(
        config, embodiment, Statistics(state=statistics(embodiment.state_dim), actions=statistics(ACTION_DIM))
    )


def make_batch(config: PolicyConfig, batch: int = 3, seed: int = 0) -> Batch:
    """Prompts of different lengths; the last sample lacks its second camera and its last two action steps."""
    random = np.random.default_rng(seed)
    state_dim = len(robot_for(config).state_names)
    num_offsets, px = len(config.observation_offsets), config.backbone.image_px
    lengths = np.arange(batch) % 4 + 3
    valid_BH = torch.ones(batch, config.horizon, dtype=torch.bool)
    valid_BH[-1, -2:] = False
    there = torch.ones(batch, num_offsets, dtype=torch.bool)
    wrist = there.clone()
    wrist[-1] = False
    images = random.integers(0, 256, (2, batch, num_offsets, px, px, 3), dtype=np.uint8)
    embedding_BLE = torch.from_numpy(random.normal(size=(batch, 8, 40)).astype(np.float32))
    return Batch(
        observation=Observation(
            images={camera: torch.from_numpy(images[i]) for i, camera in enumerate(CAMERAS)},
            image_mask={CAMERAS[0]: there, CAMERAS[1]: wrist},
            state_BTS=torch.from_numpy(random.normal(size=(batch, num_offsets, state_dim)).astype(np.float32)),
            prompts=Prompts(
                ids_BL=torch.from_numpy(random.integers(1, VOCABULARY, (batch, 8))),
                mask_BL=torch.from_numpy(np.arange(8)[None] < lengths[:, None]),
                embedding_BLE=embedding_BLE if config.backbone.reads_embeddings else None,
            ),
        ),
        actions_BHA=torch.from_numpy(random.normal(size=(batch, config.horizon, ACTION_DIM)).astype(np.float32)),
        valid_BH=valid_BH,
        sample_index_B=torch.arange(100, 100 + batch),
    )


def with_masked_content(batch: Batch) -> Batch:
    """The same batch with other content wherever a mask says that there is none."""
    observation = batch.observation
    prompts = observation.prompts
    embedding = prompts.embedding_BLE
    return dataclasses.replace(
        batch,
        observation=dataclasses.replace(
            observation,
            images={
                camera: torch.where(observation.image_mask[camera][..., None, None, None], image, 255 - image)
                for camera, image in observation.images.items()
            },
            prompts=dataclasses.replace(
                prompts,
                ids_BL=torch.where(prompts.mask_BL, prompts.ids_BL, 7),
                embedding_BLE=None if embedding is None else torch.where(prompts.mask_BL[..., None], embedding, 3.0),
            ),
        ),
    )
