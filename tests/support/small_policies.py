"""A tiny policy, observations and batches for the tests of this folder."""

import numpy as np
import torch

from vlatune.data.batch import Batch, Observation, Prompts, RawObservation
from vlatune.data.images import ImageRule
from vlatune.data.normalise import FieldStatistics, Statistics
from vlatune.policy.config import Embodiment
from vlatune.policy.policy import Policy
from vlatune.train.recipes import load_recipe

CAMERAS = ("agentview", "eye_in_hand")


def field_statistics(size: int, low: float = -2.0, high: float = 3.0) -> FieldStatistics:
    centre, spread = (low + high) / 2, (high - low) / 4
    return FieldStatistics(
        mean=(centre,) * size,
        std=(spread,) * size,
        min=(low,) * size,
        max=(high,) * size,
        q01=(low,) * size,
        q99=(high,) * size,
        count=100,
    )


def raw_observations(*instructions: str) -> list[RawObservation]:
    """One for each, as a robot sees it; every call gives the same."""
    random = np.random.default_rng(0)
    return [
        RawObservation(
            images={camera: random.integers(0, 256, (1, 24, 24, 3), dtype=np.uint8) for camera in CAMERAS},
            state_TS=random.normal(size=(1, 8)).astype(np.float32),
            instruction=instruction,
        )
        for instruction in instructions
    ]


def make_policy(seed: int = 0) -> Policy:
    torch.manual_seed(seed)
    embodiment = Embodiment(
        robot="libero_panda",
        state_dim=8,
        action_dim=7,
        control_hz=20.0,
        gripper_action=6,
        cameras=CAMERAS,
        image_rule=ImageRule(size_px=16),
        vocab_size=512,
        encoder_width=None,
    )
    statistics = Statistics(state=field_statistics(8), actions=field_statistics(7))
    policy = Policy(load_recipe("tiny").policy, embodiment, statistics)
    with torch.no_grad():
        # A fresh policy's modulations are zero, and zeros hide mistakes.
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return policy


def make_batch(batch: int = 3, horizon: int = 4, seed: int = 0) -> Batch:
    """Prompts of different lengths; the last sample lacks its second camera and its last two action steps."""
    random = np.random.default_rng(seed)
    lengths = np.arange(batch) % 4 + 3
    valid_BH = torch.ones(batch, horizon, dtype=torch.bool)
    valid_BH[-1, -2:] = False
    wrist = torch.ones(batch, dtype=torch.bool)
    wrist[-1] = False
    images = random.integers(0, 256, (2, batch, 1, 16, 16, 3), dtype=np.uint8)
    return Batch(
        observation=Observation(
            images={camera: torch.from_numpy(images[i]) for i, camera in enumerate(CAMERAS)},
            image_mask={CAMERAS[0]: torch.ones(batch, 1, dtype=torch.bool), CAMERAS[1]: wrist[:, None]},
            state_BTS=torch.from_numpy(random.normal(size=(batch, 1, 8)).astype(np.float32)),
            prompts=Prompts(
                ids_BL=torch.from_numpy(random.integers(1, 32, (batch, 8))),
                mask_BL=torch.from_numpy(np.arange(8)[None] < lengths[:, None]),
            ),
        ),
        actions_BHA=torch.from_numpy(random.normal(size=(batch, horizon, 7)).astype(np.float32)),
        valid_BH=valid_BH,
        sample_index_B=torch.arange(100, 100 + batch),
    )
