"""AdamW's parameter groups and its schedule as a pure function of the step."""

import math

import torch
from torch import nn

from .config import AdamWConfig


def make_optimizer(model: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    """Two groups, decayed and not; every trainable parameter is in exactly one."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1 and id(p) not in embeddings]
    spared = [p for p in trainable if p.ndim <= 1 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    # A group without parameters makes ZeRO fail with an IndexError.
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=1e-8, fused=True)


def learning_rate_at(step: int, num_steps: int, config: AdamWConfig) -> float:
    """The rate of optimizer step `step`, counted from 0: linear warm-up, then half a cosine to the final rate."""
    if step < config.num_warmup_steps:
        return config.learning_rate * (step + 1) / (config.num_warmup_steps + 1)
    progress = (step - config.num_warmup_steps) / max(1, num_steps - config.num_warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine
