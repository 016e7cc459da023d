"""Gemma-style action expert: a narrow transformer whose layer l reads layer l of the prefix's keys and values (π0.5's).

All action tokens see the prefix and one another. The noise level enters through adaptive norms.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..layers.gemma import GEMMA_300M, GemmaBlock, GemmaConfig
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

    reads = "kv"

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
        return BoundGemmaExpert(self, prefix)

    def forward(self, x_BHA: Tensor, noise_level_B: Tensor, prefix: Prefix) -> Tensor:
        return self.bind(prefix)(x_BHA, noise_level_B)


class BoundGemmaExpert:
    """A `GemmaExpert` with the prefix it reads; see `BoundExpert`."""

    def __init__(self, expert: GemmaExpert, prefix: Prefix) -> None:
        self.expert = expert
        self.prefix = prefix

    def fan_out(self, num_candidates: int) -> "BoundGemmaExpert":
        def repeated(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(num_candidates, dim=0)

        assert self.prefix.layers_kv is not None  # checked by bind
        prefix = Prefix(
            mask_BP=repeated(self.prefix.mask_BP),
            layers_kv=tuple((repeated(keys), repeated(values)) for keys, values in self.prefix.layers_kv),
        )
        return BoundGemmaExpert(self.expert, prefix)

    def __call__(self, x_BHA: Tensor, noise_level_B: Tensor) -> Tensor:
        expert, prefix = self.expert, self.prefix
        assert prefix.layers_kv is not None  # checked by bind
        dtype = prefix.layers_kv[0][0].dtype
        horizon = x_BHA.shape[1]

        condition_BD = embed_noise_level(noise_level_B, expert.width).to(dtype)
        condition_BD = functional.silu(expert.time_mlp_out(functional.silu(expert.time_mlp_in(condition_BD))))

        positions_BH = prefix.num_tokens_B[:, None] + torch.arange(horizon, device=x_BHA.device)
        angles = rotary_angles(positions_BH, expert.head_dim)
        own_mask_BH = prefix.mask_BP.new_ones(x_BHA.shape[0], horizon)
        mask_B1HN = torch.cat([prefix.mask_BP, own_mask_BH], dim=1)[:, None, None, :].expand(-1, 1, horizon, -1)

        x_BHD = expert.action_in_proj(x_BHA.to(dtype))
        for layer, keys_values in zip(expert.layers, prefix.layers_kv, strict=True):
            x_BHD, _ = layer(x_BHD, angles, mask_B1HN, prefix=keys_values, condition_BD=condition_BD)
        x_BHD, _ = expert.norm(x_BHD, condition_BD)
        return expert.action_out_proj(x_BHD).float()
