"""What a policy measures on training data before its first step."""

import torch

from ..policy.experts.mlp import MLPExpert
from ..policy.policy import Policy
from .training_data import TrainingData

NUM_SAMPLES = 256
"""A mean and a deviation need no more."""


def calibrate(policy: Policy, data: TrainingData) -> None:
    """Measure what the expert standardises, on the CPU and on the same samples on every rank. Nothing for other policies, and for one
    whose pretrained weights brought it along."""
    fusion = policy.expert.standardised if isinstance(policy.expert, MLPExpert) else None
    if fusion is None or fusion.is_calibrated:
        return
    with torch.no_grad():
        fusion.calibrate(policy.prefix(data.first_samples(NUM_SAMPLES).observation))
