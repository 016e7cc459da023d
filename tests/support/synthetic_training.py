"""Policies with random weights, made where they are trained, and random batches for them."""

import torch
from preset_policies import ACTION_DIM, CAMERAS, VOCABULARY, embodiment_for, statistics

from vlatune.data.batch import Batch, Observation, Prompts
from vlatune.data.normalise import Statistics
from vlatune.policy.config import PolicyConfig
from vlatune.policy.policy import Policy
from vlatune.train.cost import T5_XXL_WIDTH

NUM_TOKENS, BUCKET = 20, 24
"""Of a prompt, and of its batch; LIBERO's have 8 to 24."""


def random_policy(config: PolicyConfig, device: torch.device, dtype: torch.dtype) -> Policy:
    """Weights made where and as they are trained; buffers stay float32, as under DeepSpeed."""
    embodiment = embodiment_for(config, encoder_width=T5_XXL_WIDTH)
    numbers = Statistics(state=statistics(embodiment.state_dim), actions=statistics(ACTION_DIM))
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            policy = Policy(config, embodiment, numbers)
    finally:
        torch.set_default_dtype(torch.float32)
    for buffer in policy.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    return policy


def random_batch(policy: Policy, size: int, device: torch.device) -> Batch:
    """Random numbers of a real batch's shapes and dtypes; all pictures are there, all chunk steps count."""
    config, embodiment = policy.config, policy.embodiment
    times, px = len(config.observation_offsets), config.backbone.image_px
    text = torch.randn(size, BUCKET, T5_XXL_WIDTH, device=device) if config.backbone.reads_embeddings else None
    return Batch(
        observation=Observation(
            images={
                camera: torch.randint(0, 256, (size, times, px, px, 3), dtype=torch.uint8, device=device)
                for camera in CAMERAS
            },
            image_mask={camera: torch.ones(size, times, dtype=torch.bool, device=device) for camera in CAMERAS},
            state_BTS=torch.randn(size, times, embodiment.state_dim, device=device),
            prompts=Prompts(
                ids_BL=torch.randint(1, VOCABULARY, (size, BUCKET), device=device),
                mask_BL=(torch.arange(BUCKET, device=device) < NUM_TOKENS).expand(size, -1),
                embedding_BLE=text,
            ),
        ),
        actions_BHA=torch.randn(size, config.horizon, ACTION_DIM, device=device),
        valid_BH=torch.ones(size, config.horizon, dtype=torch.bool, device=device),
        sample_index_B=torch.arange(size),  # on the CPU, as the loader hands it over
    )
