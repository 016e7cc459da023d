"""Gemma-style action expert: a narrow transformer whose layer l reads layer l of the prefix's keys and values.

All action tokens see the prefix and one another. In π0.5 the noise level enters through adaptive norms; in π0 it is mixed
into every action token, and proprioception is a token of the expert's own, which sees the prefix but no action: it is
computed once, when the expert is bound, and joins the keys and values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..layers.decoder import GEMMA_300M, DecoderBlock, DecoderConfig, KeysValues, appended, make_norm, repeated
from ..layers.noise_level_embedding import embed_noise_level, make_second_level, with_second_level
from ..layers.norms import AdaRMSNorm
from ..layers.rotary import rotary_angles
from ..prefix import Prefix, PrefixShape
from .expert import LevelFeatures


@dataclass(frozen=True, kw_only=True)
class GemmaExpertConfig:
    """An expert of the same depth and head shape as its backbone's prefix, of any width."""

    type: Literal["gemma"] = "gemma"
    gemma: DecoderConfig = GEMMA_300M
    noise_level: Literal["adaptive_norm", "action_token"] = "adaptive_norm"
    """Where the noise level enters: scale, shift and gate of every norm (π0.5), or an MLP over each action token (π0)."""
    state: Literal["token", "none"] = "none"
    """Whether proprioception is a token of the expert (π0)."""

    @property
    def reads(self) -> Literal["kv"]:
        return "kv"


class GemmaExpert(nn.Module):
    """See `Expert`."""

    def __init__(
        self,
        config: GemmaExpertConfig,
        *,
        prefix: PrefixShape,
        horizon: int,
        action_dim: int,
        second_level: bool = False,
    ) -> None:
        super().__init__()
        if prefix.kv != config.gemma.kv_shape:
            raise ValueError(
                f"the backbone writes keys and values of (layers, heads, head_dim) {prefix.kv}, the expert reads "
                f"{config.gemma.kv_shape}; give policy.expert.gemma the depth, num_kv_heads and head_dim of policy.backbone.text"
            )
        self.config = config
        width = config.gemma.width
        adaptive = config.noise_level == "adaptive_norm"
        self.action_in_proj = nn.Linear(action_dim, width)
        if adaptive:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        else:
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)
        if config.state == "token":
            self.state_proj = nn.Linear(prefix.state_dim, width)
        self.second_level_embedding = make_second_level(width, second_level)
        self.layers = nn.ModuleList(DecoderBlock(config.gemma, adaptive=adaptive) for _ in range(config.gemma.depth))
        self.norm = AdaRMSNorm(width, config.gemma.norm_eps) if adaptive else make_norm(config.gemma)
        self.action_out_proj = nn.Linear(width, action_dim)

    def unread_parameters(self) -> list[nn.Parameter]:
        return []

    def adaptive_norms(self) -> Iterator[AdaRMSNorm]:
        """In the order of a call: two a layer, then the last; none in π0."""
        return (module for module in self.modules() if isinstance(module, AdaRMSNorm))

    def bind(self, prefix: Prefix) -> "BoundGemmaExpert":
        """Raises ValueError if the prefix carries no keys and values."""
        if prefix.layers_kv is None or prefix.mask_BP is None:
            raise ValueError("this expert reads keys and values, and the backbone's prefix carries none")
        bound = BoundGemmaExpert(self, prefix.mask_BP, prefix.layers_kv)
        if self.config.state == "none":
            return bound
        if prefix.state_BTS is None:
            raise ValueError("this expert reads proprioception, and the prefix carries none")
        dtype = prefix.layers_kv[0][0].dtype
        _, state_kv = bound.through_layers(self.state_proj(prefix.state_BTS[:, -1:].to(dtype)))
        mask_BP = torch.cat([prefix.mask_BP, torch.ones_like(prefix.mask_BP[:, :1])], dim=1)
        return BoundGemmaExpert(
            self, mask_BP, tuple(appended(seen, own) for seen, own in zip(prefix.layers_kv, state_kv, strict=True))
        )


class BoundGemmaExpert:
    """A `GemmaExpert` with the keys and values that it reads; see `BoundExpert`."""

    def __init__(self, expert: GemmaExpert, mask_BP: Tensor, layers_kv: tuple[KeysValues, ...]) -> None:
        self.expert = expert
        self.mask_BP = mask_BP
        self.layers_kv = layers_kv

    def fan_out(self, num_candidates: int) -> "BoundGemmaExpert":
        mask_BP = self.mask_BP.repeat_interleave(num_candidates, dim=0)
        return BoundGemmaExpert(self.expert, mask_BP, repeated(self.layers_kv, num_candidates))

    def __call__(self, x_BHA: Tensor, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> Tensor:
        return self.evaluate(x_BHA, self.level_features(noise_level_B, second_level_B))

    def level_features(self, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> LevelFeatures:
        """The modulations of all norms, in order; for π0 the one embedding that joins the action tokens."""
        expert = self.expert
        level_BD = embed_noise_level(noise_level_B, expert.config.gemma.width).to(self.layers_kv[0][0].dtype)
        level_BD = with_second_level(level_BD, expert.second_level_embedding, second_level_B)
        if expert.config.noise_level == "action_token":
            return (level_BD,)
        condition_BD = functional.silu(expert.time_mlp_out(functional.silu(expert.time_mlp_in(level_BD))))
        return tuple(norm.modulation(condition_BD) for norm in expert.adaptive_norms())

    def evaluate(self, x_BHA: Tensor, features: LevelFeatures) -> Tensor:
        expert = self.expert
        x_BHD = expert.action_in_proj(x_BHA.to(self.layers_kv[0][0].dtype))
        if expert.config.noise_level == "adaptive_norm":
            x_BHD, _ = self.through_layers(x_BHD, features)
            x_BHD, _ = expert.norm(x_BHD, features[-1])
        else:
            x_BHD = torch.cat([x_BHD, features[0][:, None].expand_as(x_BHD)], dim=-1)
            x_BHD = expert.action_time_mlp_out(functional.silu(expert.action_time_mlp_in(x_BHD)))
            x_BHD, _ = self.through_layers(x_BHD)
            x_BHD, _ = expert.norm(x_BHD)
        return expert.action_out_proj(x_BHD).float()

    def through_layers(self, x_BND: Tensor, modulations: Sequence[Tensor] = ()) -> tuple[Tensor, list[KeysValues]]:
        """Tokens that see what is bound and one another: the last layer's output, and every layer's keys and values. `modulations` are
        those of the layers' norms, two a layer, where they are adaptive."""
        num_tokens = x_BND.shape[1]
        # They are placed after the prefix's valid tokens.
        positions_BN = self.mask_BP.sum(-1, keepdim=True) + torch.arange(num_tokens, device=x_BND.device)
        angles = rotary_angles(positions_BN, self.expert.config.gemma.head_dim)
        own_mask_BN = self.mask_BP.new_ones(x_BND.shape[0], num_tokens)
        mask_B1NP = torch.cat([self.mask_BP, own_mask_BN], dim=1)[:, None, None, :].expand(-1, 1, num_tokens, -1)
        own = []
        for index, (layer, keys_values) in enumerate(zip(self.expert.layers, self.layers_kv, strict=True)):
            pair = (modulations[2 * index], modulations[2 * index + 1]) if modulations else (None, None)
            x_BND, layer_kv = layer(x_BND, angles, mask_B1NP, prefix=keys_values, modulations=pair)
            own.append(layer_kv)
        return x_BND, own
