"""RDT-1B's diffusion transformer: action tokens that read images and language in turn, block by block.

Its own tokens are the noise level, the robot's control frequency, the newest state and the H actions. Even blocks
cross-attend to the language tokens, odd blocks to the image tokens. There is no adaptive norm: noise level and frequency are
tokens. Parameters have the names and shapes of upstream's state dict without its leading `model.`.
Liu et al. 2024 (RDT-1B); https://github.com/thu-ml/RoboticsDiffusionTransformer.

Shape letters: B batch, K candidates per prefix, N own tokens (3 + H), C condition tokens, D width, d features of a head.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..layers.noise_level_embedding import make_second_level, with_second_level
from ..prefix import Prefix, PrefixShape
from .expert import LevelFeatures

NUM_FREQUENCIES = 128
"""Cosines, and as many sines, of a scalar that becomes a token."""
NATIVE_STEPS = 1000
"""Upstream's diffusion steps: the scale on which its weights know the noise level."""
NORM_EPS = 1e-6

NormKind = Literal["timm103", "rms"]
Condition = tuple[Tensor, Tensor, Tensor]
"""What one block cross-attends to: keys and values (B, heads, C, d), and a bool mask (B, 1, 1, C)."""


@dataclass(frozen=True, kw_only=True)
class DiTExpertConfig:
    """RDT-1B's diffusion transformer, over image and language tokens of any backbone."""

    type: Literal["dit"] = "dit"
    width: int = 2048
    """Features of a token."""
    depth: int = 28
    """Blocks; even ones read language, odd ones images."""
    num_heads: int = 32
    """Attention heads."""
    num_image_tokens: int = 4374
    """Rows of the image tokens' position table; RDT's are 2 observations x 3 cameras x 729."""
    num_language_tokens: int = 1024
    """Rows of the language tokens' position table: the longest instruction."""
    norm_kind: NormKind = "timm103"
    """What every norm divides by. 'timm103': the standard deviation, though x is not centred, as the `RmsNorm` of the timm
    1.0.3 that RDT pins (without apex) computes it; 'rms': the root mean square, as timm has it since 1.0.15 and apex
    always did. Weights trained with one compute another function with the other."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads or self.width % 2:
            raise ValueError(
                f"expert.width is {self.width}; it must be even and a multiple of num_heads, {self.num_heads}"
            )
        if self.depth < 2:
            raise ValueError(
                f"expert.depth is {self.depth}; it must be at least 2: one block reads language, the next images"
            )

    @property
    def reads(self) -> Literal["tokens"]:
        return "tokens"


class DiTNorm(nn.Module):
    """`x / spread(x) * weight`, x not centred; see `DiTExpertConfig.norm_kind`. Statistics in float32."""

    def __init__(self, width: int, kind: NormKind) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        spread = wide.var(-1, keepdim=True) if self.kind == "timm103" else wide.square().mean(-1, keepdim=True)
        return (wide * torch.rsqrt(spread + NORM_EPS) * self.weight.float()).to(x.dtype)


class SelfAttention(nn.Module):
    """Among the expert's own tokens, in both directions; queries and keys are normed head by head."""

    def __init__(self, config: DiTExpertConfig) -> None:
        super().__init__()
        self.head_dim = config.width // config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.q_norm = DiTNorm(self.head_dim, config.norm_kind)
        self.k_norm = DiTNorm(self.head_dim, config.norm_kind)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x_BND: Tensor) -> Tensor:
        qkv_BN3hd = self.qkv(x_BND).unflatten(-1, (3, -1, self.head_dim))
        queries, keys, values = qkv_BN3hd.permute(2, 0, 3, 1, 4).unbind()
        attended = functional.scaled_dot_product_attention(self.q_norm(queries), self.k_norm(keys), values)
        return self.proj(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """From the expert's own tokens to a condition, whose keys and values are computed apart, once."""

    def __init__(self, config: DiTExpertConfig) -> None:
        super().__init__()
        self.head_dim = config.width // config.num_heads
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.q_norm = DiTNorm(self.head_dim, config.norm_kind)
        self.k_norm = DiTNorm(self.head_dim, config.norm_kind)
        self.proj = nn.Linear(config.width, config.width)

    def keys_values(self, condition_BCD: Tensor) -> tuple[Tensor, Tensor]:
        kv_BC2hd = self.kv(condition_BCD).unflatten(-1, (2, -1, self.head_dim))
        keys, values = kv_BC2hd.permute(2, 0, 3, 1, 4).unbind()
        return self.k_norm(keys), values

    def forward(self, x_BND: Tensor, condition: Condition) -> Tensor:
        """`x` may have K rows for each row of the condition: (B * K, N, D)."""
        keys, values, mask_B11C = condition
        # Queries do not see one another here, so K candidates are K * N queries of one row: keys and values, by far the
        # largest tensors bound, exist once however many candidates read them.
        queries = self.q(x_BND).reshape(keys.shape[0], -1, keys.shape[1], self.head_dim).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(self.q_norm(queries), keys, values, attn_mask=mask_B11C)
        return self.proj(attended.transpose(1, 2).reshape(x_BND.shape))


class FeedForward(nn.Module):
    """Two layers with a GELU (tanh) between."""

    def __init__(self, width: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to one condition, feed-forward; each behind a norm and with a residual."""

    def __init__(self, config: DiTExpertConfig) -> None:
        super().__init__()
        self.norm1 = DiTNorm(config.width, config.norm_kind)
        self.attn = SelfAttention(config)
        self.norm2 = DiTNorm(config.width, config.norm_kind)
        self.cross_attn = CrossAttention(config)
        self.norm3 = DiTNorm(config.width, config.norm_kind)
        self.ffn = FeedForward(config.width, config.width)

    def forward(self, x_BND: Tensor, condition: Condition) -> Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        x_BND = x_BND + self.cross_attn(self.norm2(x_BND), condition)
        return x_BND + self.ffn(self.norm3(x_BND))


class FinalLayer(nn.Module):
    """Norm and feed-forward to the action's dimensions; from scratch its outputs are 0, as upstream's."""

    def __init__(self, config: DiTExpertConfig, action_dim: int) -> None:
        super().__init__()
        self.norm_final = DiTNorm(config.width, config.norm_kind)
        self.ffn_final = FeedForward(config.width, action_dim)
        nn.init.zeros_(self.ffn_final.fc2.weight)
        nn.init.zeros_(self.ffn_final.fc2.bias)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.ffn_final(self.norm_final(x_BND))


class ScalarEmbedder(nn.Module):
    """A scalar per sample -> one token: cosines, then sines, through two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, scalar_B: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, 1, D). Angles of up to 1000 radians are formed in float32, as upstream: bfloat16 would round them away."""
        share = torch.arange(NUM_FREQUENCIES, dtype=torch.float32, device=scalar_B.device) / NUM_FREQUENCIES
        angle = scalar_B.float()[:, None] * torch.exp(-math.log(10_000.0) * share)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype))[:, None]


def make_adaptor(*widths: int) -> nn.Sequential:
    """Linear layers through `widths`, a GELU (tanh) between each two."""
    layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for before, after in itertools.pairwise(widths[1:]):
        layers += [nn.GELU(approximate="tanh"), nn.Linear(before, after)]
    return nn.Sequential(*layers)


def position_table(num_tokens: int, width: int) -> nn.Parameter:
    """Trainable, (1, num_tokens, width); starts as sines, then cosines, of the token's index.

    Upstream starts from codes of history step and camera instead; a checkpoint brings its own table either way."""
    periods = 10_000.0 ** (torch.arange(width // 2) / (width // 2))
    angle = torch.arange(num_tokens)[:, None] / periods
    return nn.Parameter(torch.cat([angle.sin(), angle.cos()], dim=-1)[None])


class DiTExpert(nn.Module):
    """See `Expert`."""

    def __init__(
        self, config: DiTExpertConfig, *, prefix: PrefixShape, horizon: int, action_dim: int, second_level: bool = False
    ) -> None:
        super().__init__()
        if not {"image", "language"} <= prefix.tokens.keys():
            raise ValueError(
                f"the expert 'dit' reads image and language tokens, the backbone writes {sorted(prefix.tokens) or 'none'}; "
                "choose a backbone that writes both"
            )
        if "state" in prefix.tokens:
            raise ValueError(
                "the expert 'dit' makes a token of the state itself, and the backbone writes another that nobody would read; choose a "
                "backbone without one (policy.backbone.state 'none')"
            )
        if prefix.state_dim != action_dim:
            raise ValueError(
                f"the expert 'dit' reads state and actions through one adaptor, but the state's vector has {prefix.state_dim} "
                f"entries and the action's {action_dim}; give policy.state_layout and policy.action_layout one width"
            )
        self.config = config
        self.horizon = horizon
        width = config.width
        self.x_pos_embed = position_table(3 + horizon, width)
        self.lang_cond_pos_embed = position_table(config.num_language_tokens, width)
        self.img_cond_pos_embed = position_table(config.num_image_tokens, width)
        self.t_embedder = ScalarEmbedder(width)
        self.freq_embedder = ScalarEmbedder(width)
        self.second_level_embedding = make_second_level(width, second_level)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, action_dim)
        self.lang_adaptor = make_adaptor(prefix.tokens["language"], width, width)
        self.img_adaptor = make_adaptor(prefix.tokens["image"], width, width)
        self.state_adaptor = make_adaptor(2 * action_dim, width, width, width)  # the vector, and which entries are used

    def unread_parameters(self) -> list[nn.Parameter]:
        return []

    def bind(self, prefix: Prefix) -> "BoundDiTExpert":
        """Adapted conditions, every block's keys and values of its condition, and the two tokens that no noise changes.

        Raises ValueError if the prefix lacks something or has more tokens than a position table."""
        state_BTS, mask_BA, control_hz_B = prefix.state_BTS, prefix.action_mask_BA, prefix.control_hz_B
        if state_BTS is None or mask_BA is None or control_hz_B is None:
            raise ValueError(
                "the expert 'dit' reads state_BTS, action_mask_BA and control_hz_B; bind what Policy.prefix returns"
            )
        dtype = self.x_pos_embed.dtype
        language = self._condition(prefix, "language", self.lang_adaptor, self.lang_cond_pos_embed)
        image = self._condition(prefix, "image", self.img_adaptor, self.img_cond_pos_embed)
        conditions = []
        for index, block in enumerate(self.blocks):
            assert isinstance(block, DiTBlock)
            features_BCD, mask_B11C = image if index % 2 else language
            conditions.append((*block.cross_attn.keys_values(features_BCD), mask_B11C))
        mask_B1A = mask_BA[:, None].to(dtype)
        state_B1D = self.state_adaptor(torch.cat([state_BTS[:, -1:].to(dtype), mask_B1A], dim=-1))
        fixed_B2D = torch.cat([self.freq_embedder(control_hz_B, dtype), state_B1D], dim=1)
        return BoundDiTExpert(self, tuple(conditions), fixed_B2D, mask_B1A)

    def _condition(self, prefix: Prefix, kind: str, adaptor: nn.Module, positions_1CD: Tensor) -> tuple[Tensor, Tensor]:
        if kind not in prefix.tokens:
            raise ValueError(f"the expert 'dit' reads {kind} tokens, and the backbone's prefix carries none")
        features, mask_BC = prefix.tokens[kind]
        num_tokens, num_rows = features.shape[1], positions_1CD.shape[1]
        if num_tokens > num_rows:
            raise ValueError(
                f"the prefix has {num_tokens} {kind} tokens, but the expert's position table {num_rows} rows; "
                f"set policy.expert.num_{kind}_tokens to {num_tokens} or more"
            )
        adapted_BCD = adaptor(features.to(positions_1CD.dtype)) + positions_1CD[:, :num_tokens]
        # RDT's image tokens are all to be seen, other backbones' not always. An all-True mask costs a slower attention
        # kernel, little beside the keys' and values' own cost; asking a mask whether it is all True would stall the GPU.
        return adapted_BCD, mask_BC[:, None, None, :]


class BoundDiTExpert:
    """A `DiTExpert` with what it reads; see `BoundExpert`."""

    def __init__(
        self, expert: DiTExpert, conditions: tuple[Condition, ...], fixed_B2D: Tensor, mask_B1A: Tensor
    ) -> None:
        """`conditions` is block by block; `fixed` is the tokens of frequency and state; `mask` is 1 at used entries."""
        self.expert = expert
        self.conditions = conditions
        self.fixed_B2D = fixed_B2D
        self.mask_B1A = mask_B1A

    def fan_out(self, num_candidates: int) -> "BoundDiTExpert":
        # The conditions stay as they are: `CrossAttention` lets several rows read one.
        return BoundDiTExpert(
            self.expert,
            self.conditions,
            self.fixed_B2D.repeat_interleave(num_candidates, dim=0),
            self.mask_B1A.repeat_interleave(num_candidates, dim=0),
        )

    def __call__(self, x_BHA: Tensor, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> Tensor:
        return self.evaluate(x_BHA, self.level_features(noise_level_B, second_level_B))

    def level_features(self, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> LevelFeatures:
        expert = self.expert
        level_B1D = expert.t_embedder(torch.round(NATIVE_STEPS * noise_level_B.float()), self.fixed_B2D.dtype)
        return (with_second_level(level_B1D[:, 0], expert.second_level_embedding, second_level_B),)

    def evaluate(self, x_BHA: Tensor, features: LevelFeatures) -> Tensor:
        expert = self.expert
        dtype = self.fixed_B2D.dtype
        level_B1D = features[0][:, None].expand(x_BHA.shape[0], -1, -1)
        actions_BHD = expert.state_adaptor(torch.cat([x_BHA.to(dtype), self.mask_B1A.expand_as(x_BHA)], dim=-1))
        x_BND = torch.cat([level_B1D, self.fixed_B2D, actions_BHD], dim=1) + expert.x_pos_embed
        for block, condition in zip(expert.blocks, self.conditions, strict=True):
            x_BND = block(x_BND, condition)
        return expert.final_layer(x_BND[:, -expert.horizon :]).float()
