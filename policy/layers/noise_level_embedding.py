"""Sine-cosine features of a scalar in [0, 1], as openpi and LeRobot embed the flow time."""

import math

import torch
from torch import Tensor


def embed_noise_level(
    noise_level_B: Tensor, width: int, *, min_period: float = 4e-3, max_period: float = 4.0
) -> Tensor:
    """(B,) -> (B, width) float32: sines, then cosines, periods geometric from `min_period` to `max_period`.

    The angles are formed in float64: at the shortest period a float32 phase loses its last digits, a bfloat16 one
    everything."""
    share = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=noise_level_B.device)
    period = min_period * (max_period / min_period) ** share
    angle = noise_level_B.double()[:, None] * (2 * math.pi / period)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()
