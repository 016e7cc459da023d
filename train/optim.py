"""AdamW's parameter groups and its schedule as a pure function of the step."""

import math

import torch
from torch import nn

from .config import AdamWConfig


def make_optimizer(model: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    """Every trainable parameter is in exactly one group; a group has its weight decay and its `rate_factor`, by which the
    schedule's rate is multiplied. Raises ValueError for a module of `rate_factors` that trains nothing."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for module in config.rate_factors:
        if not any(name.startswith(f"{module}.") for name in trainable):
            there = sorted({".".join(name.split(".")[:2]) for name in trainable})
            raise ValueError(
                f"optimizer.rate_factors names {module!r}, where nothing is trained; modules that are: {', '.join(there)}"
            )
    members: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        fitting = [module for module in config.rate_factors if name.startswith(f"{module}.")]
        factor = config.rate_factors[max(fitting, key=len)] if fitting else 1.0
        decayed = parameter.ndim > 1 and id(parameter) not in embeddings
        members.setdefault((factor, decayed), []).append(parameter)
    groups = [
        {"params": members[key], "weight_decay": config.weight_decay if key[1] else 0.0, "rate_factor": key[0]}
        for key in sorted(members, key=lambda key: (key[0], not key[1]))
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=1e-8, fused=True)


def learning_rate_at(step: int, num_steps: int, config: AdamWConfig) -> float:
    """The rate of optimizer step `step`, counted from 0: linear warm-up, then half a cosine to the final rate."""
    if step < config.num_warmup_steps:
        return config.learning_rate * (step + 1) / (config.num_warmup_steps + 1)
    progress = (step - config.num_warmup_steps) / max(1, num_steps - config.num_warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine
