"""Sine-cosine features of a scalar in [0, 1], as openpi and LeRobot embed the flow time; and a second such scalar."""

import math

import torch
from torch import Tensor, nn


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


class SecondLevelEmbedding(nn.Module):
    """What an objective with a second time input (a shortcut's step, a flow map's target) adds to an expert.

    Its last layer starts at zero, so that a pretrained expert computes at first what it did; only the last, because a zero
    first layer behind a zero last one would never receive a gradient."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear_in = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def forward(self, second_level_B: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        features_BD = embed_noise_level(second_level_B, self.width).to(self.linear_in.weight.dtype)
        return self.linear_out(nn.functional.silu(self.linear_in(features_BD)))


def make_second_level(width: int, wanted: bool) -> SecondLevelEmbedding | None:
    return SecondLevelEmbedding(width) if wanted else None


def with_second_level(
    features_BD: Tensor, embedding: SecondLevelEmbedding | None, second_level_B: Tensor | None
) -> Tensor:
    """The noise level's features plus those of the second level. Raises ValueError if just one of the two is there."""
    if embedding is None and second_level_B is None:
        return features_BD
    if embedding is None or second_level_B is None:
        missing = "the expert was built without one" if embedding is None else "the objective gives none"
        raise ValueError(
            f"a second level needs an objective that gives it and an expert that was built for it; {missing}"
        )
    return features_BD + embedding(second_level_B)
