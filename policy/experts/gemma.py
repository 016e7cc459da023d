"""Gemma-style action expert: a narrow transformer whose layer l reads layer l of the prefix's keys and values (π0.5's).

All action tokens see the prefix and one another. The noise level enters through adaptive norms.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..layers.gemma import GEMMA_300M, GemmaBlock, GemmaConfig, KeysValues
from ..layers.noise_level_embedding import embed_noise_level
from ..layers.norms import AdaRMSNorm
from ..layers.rotary import rotary_angles
from ..prefix import Prefix


@dataclass(frozen=True, kw_only=True)
class GemmaExpertConfig:
    """An expert of the same depth and head shape as its backbone's prefix, of any width."""

    type: Literal["gemma"] = "gemma"
    gemma: GemmaConfig = GEMMA_300M

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """The cache of keys and values that it can read."""
        return self.gemma.kv_shape


class GemmaExpert(nn.Module):
    """Noisy actions, noise level and a prefix -> one output per action entry."""

    def __init__(self, config: GemmaExpertConfig, *, action_dim: int) -> None:
        super().__init__()
        self.head_dim = config.gemma.head_dim
        width = config.gemma.width
        self.width = width
        self.action_in_proj = nn.Linear(action_dim, width)
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)
        self.layers = nn.ModuleList(GemmaBlock(config.gemma, adaptive=True) for _ in range(config.gemma.depth))
        self.norm = AdaRMSNorm(width)
        self.action_out_proj = nn.Linear(width, action_dim)

    def bind(self, prefix: Prefix) -> "BoundGemmaExpert":
        """Raises ValueError if the prefix carries no keys and values."""
        if prefix.layers_kv is None:
            raise ValueError("this expert reads keys and values, and the backbone's prefix carries none")
        return BoundGemmaExpert(self, prefix.mask_BP, prefix.layers_kv)


class BoundGemmaExpert:
    """A `GemmaExpert` with the keys and values that it reads; see `BoundExpert`."""

    def __init__(self, expert: GemmaExpert, mask_BP: Tensor, layers_kv: tuple[KeysValues, ...]) -> None:
        self.expert = expert
        self.mask_BP = mask_BP
        self.layers_kv = layers_kv

    def fan_out(self, num_candidates: int) -> "BoundGemmaExpert":
        def repeated(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(num_candidates, dim=0)

        layers_kv = tuple((repeated(keys), repeated(values)) for keys, values in self.layers_kv)
        return BoundGemmaExpert(self.expert, repeated(self.mask_BP), layers_kv)

    def __call__(self, x_BHA: Tensor, noise_level_B: Tensor) -> Tensor:
        expert = self.expert
        dtype = self.layers_kv[0][0].dtype
        horizon = x_BHA.shape[1]

        condition_BD = embed_noise_level(noise_level_B, expert.width).to(dtype)
        condition_BD = functional.silu(expert.time_mlp_out(functional.silu(expert.time_mlp_in(condition_BD))))

        # Action tokens are placed after the prefix's valid tokens.
        positions_BH = self.mask_BP.sum(-1, keepdim=True) + torch.arange(horizon, device=x_BHA.device)
        angles = rotary_angles(positions_BH, expert.head_dim)
        own_mask_BH = self.mask_BP.new_ones(x_BHA.shape[0], horizon)
        mask_B1HN = torch.cat([self.mask_BP, own_mask_BH], dim=1)[:, None, None, :].expand(-1, 1, horizon, -1)

        x_BHD = expert.action_in_proj(x_BHA.to(dtype))
        for layer, keys_values in zip(expert.layers, self.layers_kv, strict=True):
            x_BHD, _ = layer(x_BHD, angles, mask_B1HN, prefix=keys_values, condition_BD=condition_BD)
        x_BHD, _ = expert.norm(x_BHD, condition_BD)
        return expert.action_out_proj(x_BHD).float()
