"""Rotary position embedding, the split-half form of Gemma and Llama."""

import torch
from torch import Tensor


def rotary_angles(positions_BN: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, 1, N, head_dim / 2), float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BN.device) / head_dim
    angles = positions_BN[:, None, :, None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """`x` (B, heads, N, head_dim), rotated in float32 and returned in its own dtype."""
    cos, sin = angles
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
