"""Tiny checkpoints of every preset with a language of their own, and observations for them: what exports are tested on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from preset_policies import ACTION_DIM, CAMERAS, embodiment_for, robot_for, statistics

from vlatune.data.language import Language
from vlatune.data.normalise import Statistics
from vlatune.data.raw_observation import RawObservation
from vlatune.policy.checkpoints.folder import write_policy
from vlatune.policy.checkpoints.layout import COMPLETE
from vlatune.policy.config import PolicyConfig
from vlatune.policy.policy import Policy
from vlatune.policy.presets import PRESETS

INSTRUCTIONS = ("pick up the red cube", "push it", "put the blue cube on the left target and then go back")
"""Of different lengths."""


def shallow(config: PolicyConfig) -> PolicyConfig:
    """With as few layers as still have every kind: a graph is traced layer by layer, in seconds."""
    backbone: Any = config.backbone
    expert: Any = config.expert
    backbone = replace(backbone, vision=replace(backbone.vision, depth=1))
    if hasattr(backbone, "text"):
        # Of a decoder's layers the last computes less than the others.
        backbone = replace(backbone, text=replace(backbone.text, depth=1 if backbone.type == "clip" else 2))
    if hasattr(expert, "gemma"):
        expert = replace(expert, gemma=replace(expert.gemma, depth=2))
    elif hasattr(expert, "decoder"):
        expert = replace(expert, decoder=replace(expert.decoder, depth=2))
    elif hasattr(expert, "depth"):
        expert = replace(expert, depth=2)
    return replace(config, backbone=backbone, expert=expert)


def write_checkpoint(folder: Path, preset: str, **changes: Any) -> Path:
    """A preset's tiny policy with random weights, none of them zero; `changes` are fields of its config."""
    config = replace(shallow(PRESETS[preset](tiny=True)), **changes)
    encoder = "seeded-t5" if config.backbone.reads_embeddings else "none"
    language = Language.build(INSTRUCTIONS, encoder=encoder)
    embodiment = embodiment_for(config, vocab_size=language.vocab_size, encoder_width=language.embedding_width or 0)
    torch.manual_seed(0)
    numbers = Statistics(state=statistics(embodiment.state_dim), actions=statistics(ACTION_DIM))
    policy = Policy(config, embodiment, numbers)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    folder.mkdir(parents=True)
    write_policy(folder, policy, policy.state_dict(), language, {})
    (folder / COMPLETE).write_text("")
    return folder


def observations(config: PolicyConfig, number: int, *, seed: int = 0) -> list[RawObservation]:
    """Pictures of another size than the policy reads, and the instructions in turn."""
    random = np.random.default_rng(seed)
    times, state_dim = len(config.observation_offsets), len(robot_for(config).state_names)
    return [
        RawObservation(
            images={camera: random.integers(0, 256, (times, 24, 32, 3), dtype=np.uint8) for camera in CAMERAS},
            state_TS=random.normal(0.5, 1.5, (times, state_dim)).astype(np.float32),
            instruction=INSTRUCTIONS[row % len(INSTRUCTIONS)],
        )
        for row in range(number)
    ]
