"""SmolVLA's action expert: a narrow transformer that reads every layer of the prefix's keys and values in one of two ways.

Every `self_attn_every`-th layer joins its own keys and values to the prefix's: an action token sees the prefix and the
actions up to itself (π0's see all). The layers between them attend to the prefix alone, through keys and values that the
expert projects anew from the backbone's; those do not depend on actions or noise and are computed once, when the expert is
bound. Shukor et al. 2025."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..layers.decoder import DecoderBlock, DecoderConfig, KeysValues, make_norm, repeated
from ..layers.noise_level_embedding import embed_noise_level, make_second_level, with_second_level
from ..layers.rotary import rotary_angles
from ..prefix import Prefix, PrefixShape
from .expert import LevelFeatures

SMOLVLA_EXPERT = DecoderConfig(
    family="llama", width=720, depth=16, mlp_dim=2048, num_heads=15, num_kv_heads=5, head_dim=64, norm_eps=1e-5
)


@dataclass(frozen=True, kw_only=True)
class SmolVLAExpertConfig:
    """An expert of the same depth and head shape as its backbone's prefix, of any width."""

    type: Literal["smolvla"] = "smolvla"
    decoder: DecoderConfig = SMOLVLA_EXPERT
    self_attn_every: int = 2
    """Layers 0, n, 2n, … attend to prefix and actions, the others to the prefix alone; 1: all attend to both."""

    def __post_init__(self) -> None:
        if self.self_attn_every < 1:
            raise ValueError(f"expert.self_attn_every is {self.self_attn_every}; it must be at least 1")

    @property
    def reads(self) -> Literal["kv"]:
        return "kv"


class PrefixReader(DecoderBlock):
    """A layer that attends to the prefix alone, through keys and values that it projects from the backbone's."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        kv_dim = config.num_kv_heads * config.head_dim
        self.self_attn.k_proj = nn.Linear(kv_dim, kv_dim, bias=False)
        self.self_attn.v_proj = nn.Linear(kv_dim, kv_dim, bias=False)

    def projected(self, keys_values: KeysValues) -> KeysValues:
        """Of the same shape. The keys come rotated to their places in the prefix, and are not rotated again."""
        keys, values = (tensor.transpose(1, 2).flatten(2) for tensor in keys_values)
        attention = self.self_attn
        return attention.heads(attention.k_proj(keys)), attention.heads(attention.v_proj(values))


class SmolVLAExpert(nn.Module):
    """See `Expert`."""

    def __init__(
        self,
        config: SmolVLAExpertConfig,
        *,
        prefix: PrefixShape,
        horizon: int,
        action_dim: int,
        second_level: bool = False,
    ) -> None:
        super().__init__()
        decoder = config.decoder
        if prefix.kv != decoder.kv_shape:
            raise ValueError(
                f"the backbone writes keys and values of (layers, heads, head_dim) {prefix.kv}, the expert reads "
                f"{decoder.kv_shape}; give policy.expert.decoder the depth, num_kv_heads and head_dim of policy.backbone.text"
            )
        self.config = config
        self.action_in_proj = nn.Linear(action_dim, decoder.width)
        self.action_time_mlp_in = nn.Linear(2 * decoder.width, decoder.width)
        self.action_time_mlp_out = nn.Linear(decoder.width, decoder.width)
        self.second_level_embedding = make_second_level(decoder.width, second_level)
        self.layers = nn.ModuleList(
            PrefixReader(decoder) if layer % config.self_attn_every else DecoderBlock(decoder)
            for layer in range(decoder.depth)
        )
        self.norm = make_norm(decoder)
        self.action_out_proj = nn.Linear(decoder.width, action_dim)

    def unread_parameters(self) -> list[nn.Parameter]:
        return []

    def bind(self, prefix: Prefix) -> "BoundSmolVLAExpert":
        """Raises ValueError if the prefix carries no keys and values."""
        if prefix.layers_kv is None or prefix.mask_BP is None:
            raise ValueError("this expert reads keys and values, and the backbone's prefix carries none")
        layers_kv = tuple(
            layer.projected(keys_values) if isinstance(layer, PrefixReader) else keys_values
            for layer, keys_values in zip(self.layers, prefix.layers_kv, strict=True)
        )
        return BoundSmolVLAExpert(self, prefix.mask_BP, layers_kv)


class BoundSmolVLAExpert:
    """A `SmolVLAExpert` with the keys and values that each of its layers reads; see `BoundExpert`."""

    def __init__(self, expert: SmolVLAExpert, mask_BP: Tensor, layers_kv: tuple[KeysValues, ...]) -> None:
        self.expert = expert
        self.mask_BP = mask_BP
        self.layers_kv = layers_kv

    def fan_out(self, num_candidates: int) -> "BoundSmolVLAExpert":
        mask_BP = self.mask_BP.repeat_interleave(num_candidates, dim=0)
        return BoundSmolVLAExpert(self.expert, mask_BP, repeated(self.layers_kv, num_candidates))

    def __call__(self, x_BHA: Tensor, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> Tensor:
        return self.evaluate(x_BHA, self.level_features(noise_level_B, second_level_B))

    def level_features(self, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> LevelFeatures:
        level_BD = embed_noise_level(noise_level_B, self.expert.config.decoder.width).to(self.layers_kv[0][0].dtype)
        return (with_second_level(level_BD, self.expert.second_level_embedding, second_level_B),)

    def evaluate(self, x_BHA: Tensor, features: LevelFeatures) -> Tensor:
        expert, config = self.expert, self.expert.config
        x_BHD = expert.action_in_proj(x_BHA.to(self.layers_kv[0][0].dtype))
        x_BHD = torch.cat([x_BHD, features[0][:, None].expand_as(x_BHD)], dim=-1)
        x_BHD = expert.action_time_mlp_out(functional.silu(expert.action_time_mlp_in(x_BHD)))

        mask_B1HP = self.mask_BP[:, None, None, :].expand(-1, 1, x_BHD.shape[1], -1)
        joint_mask_B1HN = torch.cat([mask_B1HP, self.action_mask(x_BHD)], dim=-1)
        step_BH = torch.arange(x_BHD.shape[1], device=x_BHD.device).expand(x_BHD.shape[:2])
        # Where actions attend to actions, they are placed after the prefix's valid tokens; where they attend to the prefix
        # alone, the checkpoints were trained with steps counted from 0.
        joint_angles = rotary_angles(self.mask_BP.sum(-1, keepdim=True) + step_BH, config.decoder.head_dim)
        cross_angles = rotary_angles(step_BH, config.decoder.head_dim)
        for layer, keys_values in zip(expert.layers, self.layers_kv, strict=True):
            if isinstance(layer, PrefixReader):
                x_BHD = layer.cross(x_BHD, cross_angles, keys_values, mask_B1HP)
            else:
                x_BHD, _ = layer(x_BHD, joint_angles, joint_mask_B1HN, prefix=keys_values)
        x_BHD, _ = expert.norm(x_BHD)
        return expert.action_out_proj(x_BHD).float()

    @staticmethod
    def action_mask(x_BHD: Tensor) -> Tensor:
        """(B, 1, H, H), True where an action (row) sees an action (column): itself and those before."""
        batch, horizon = x_BHD.shape[:2]
        causal_HH = torch.ones(horizon, horizon, dtype=torch.bool, device=x_BHD.device).tril()
        return causal_HH.expand(batch, 1, -1, -1)
