"""The plain baseline: an MLP over the flattened action chunk, the noise level and one condition vector.

With `fusion` and the `clip` backbone it is CLIP with rectified flow: image and text embeddings, an MLP over proprioception
and one over the end effector's pose, joined by a fusion MLP, and a velocity MLP on top.

Shape letters: B batch, H horizon, A action, N tokens of one kind, C condition, D width.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from ..layers.noise_level_embedding import embed_noise_level, make_second_level, with_second_level
from ..prefix import Prefix, PrefixShape
from .expert import LevelFeatures
from .pooling import PoolingConfig, TokenPooling, newest_state, read_tokens


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How tokens and state are concatenated and fused."""

    num_image_tokens: int = 2
    """Image tokens that are kept apart, one per camera: the clip backbone's pooled features; 1: the mean of all image tokens."""
    pose_dims: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Which entries of the state are the end effector's pose; the others, joints or fingers, have an MLP of their own."""
    state_width: int = 128
    """Features of each of these two MLPs."""
    hidden_width: int = 768
    """Hidden features of the fusion MLP."""
    width: int = 512
    """Features of the condition."""
    standardise: bool = False
    """Bring each token feature to mean 0 and deviation 1 over training data, measured once before the first step. Frozen embeddings lie in a
    narrow cone: what tells two pictures apart is a few percent of them, which an MLP finds slowly."""


@dataclass(frozen=True, kw_only=True)
class MLPExpertConfig:
    """An MLP; reads tokens. With the clip backbone the defaults train about 4 M parameters."""

    type: Literal["mlp"] = "mlp"
    condition: Literal["pooling", "fusion"] = "fusion"
    """What the velocity reads: pooled tokens, or everything concatenated through a fusion MLP."""
    pooling: PoolingConfig = field(default_factory=PoolingConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    noise_level_width: int = 256
    """Features of the embedded noise level, and of its MLP."""
    width: int = 768
    """Hidden features of the velocity MLP."""
    num_layers: int = 3
    """Its hidden layers."""

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"expert.num_layers is {self.num_layers}; it must be at least 1")

    @property
    def reads(self) -> Literal["tokens"]:
        return "tokens"


def silu_mlp(*widths: int) -> nn.Sequential:
    """Linear layers from each width to the next, SiLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class Fusion(nn.Module):
    """`Prefix` -> condition: the tokens of every kind and the state's features, concatenated; masked tokens are zeros.

    Images keep their cameras apart; every other kind, whose number of tokens varies, enters by its mean."""

    pose_dims: Tensor
    proprioception_dims: Tensor

    def __init__(self, config: FusionConfig, prefix: PrefixShape) -> None:
        """Raises ValueError if `pose_dims` does not fit the state."""
        super().__init__()
        dims, state_dim = config.pose_dims, prefix.state_dim
        if len(set(dims)) != len(dims) or any(not 0 <= dim < state_dim for dim in dims):
            raise ValueError(
                f"expert.fusion.pose_dims is {dims}, and the state has {state_dim} entries; give distinct numbers from 0 to "
                f"{state_dim - 1}"
            )
        self.config = config
        self.kinds = tuple(prefix.tokens)
        rest = [dim for dim in range(state_dim) if dim not in dims]
        self.register_buffer("pose_dims", torch.tensor(dims, dtype=torch.int64), persistent=False)
        self.register_buffer("proprioception_dims", torch.tensor(rest, dtype=torch.int64), persistent=False)
        num_inputs = sum(
            width * (config.num_image_tokens if kind == "image" else 1) for kind, width in prefix.tokens.items()
        )
        self.token_mean: nn.Parameter | None = None
        self.token_std: nn.Parameter | None = None
        if config.standardise:  # parameters that nobody trains: they travel with the weights
            self.token_mean = nn.Parameter(torch.zeros(num_inputs), requires_grad=False)
            self.token_std = nn.Parameter(torch.ones(num_inputs), requires_grad=False)
        # A state may be all pose or have none.
        self.pose_mlp = silu_mlp(len(dims), config.state_width, config.state_width) if dims else None
        self.proprioception_mlp = silu_mlp(len(rest), config.state_width, config.state_width) if rest else None
        num_inputs += config.state_width * (bool(dims) + bool(rest))
        self.fusion_mlp = silu_mlp(num_inputs, config.hidden_width, config.width)

    def forward(self, prefix: Prefix) -> Tensor:
        """(B, C) in the parameters' dtype; raises ValueError if the prefix lacks what is read or has other image tokens."""
        dtype = next(self.parameters()).dtype
        parts = [self._tokens(prefix).to(dtype)]
        state_BS = newest_state(prefix).to(dtype)
        for mlp, dims in ((self.pose_mlp, self.pose_dims), (self.proprioception_mlp, self.proprioception_dims)):
            if mlp is not None:
                parts.append(mlp(state_BS.index_select(-1, dims)))
        condition_BC: Tensor = self.fusion_mlp(torch.cat(parts, dim=-1))
        return condition_BC

    @property
    def is_calibrated(self) -> bool:
        return self.token_mean is not None and bool(self.token_mean.any())

    def calibrate(self, prefix: Prefix) -> None:
        """Measure mean and deviation of what is standardised, over the rows of `prefix`. A feature that does not vary there is centred and
        keeps its scale."""
        assert self.token_mean is not None and self.token_std is not None, "nothing is standardised"
        tokens_BW, there_BW = self._joined_tokens(prefix)
        num_W = there_BW.sum(dim=0).clamp(min=1)
        mean_W = (tokens_BW * there_BW).sum(dim=0) / num_W
        std_W = (((tokens_BW - mean_W) * there_BW).square().sum(dim=0) / num_W).sqrt()
        with torch.no_grad():
            self.token_mean.copy_(mean_W)
            self.token_std.copy_(torch.where(std_W > 1e-3 * mean_W.abs() + 1e-6, std_W, 1.0))

    def _tokens(self, prefix: Prefix) -> Tensor:
        tokens_BW, there_BW = self._joined_tokens(prefix)
        if self.token_mean is None or self.token_std is None:
            return tokens_BW
        return (tokens_BW - self.token_mean) / self.token_std * there_BW

    def _joined_tokens(self, prefix: Prefix) -> tuple[Tensor, Tensor]:
        """Tokens of all kinds, one vector a row, and 1 where they are there, 0 where an absent camera leaves zeros."""
        joined, there = [], []
        for kind, (features_BND, mask_BN) in read_tokens(prefix, self.kinds).items():
            joined.append(self._joined(kind, features_BND, mask_BN))
            mask_BN1 = (
                mask_BN[..., None] if joined[-1].shape[1] > features_BND.shape[2] else mask_BN.any(1)[:, None, None]
            )
            there.append(mask_BN1.expand(-1, -1, features_BND.shape[2]).flatten(1).to(features_BND.dtype))
        return torch.cat(joined, dim=-1), torch.cat(there, dim=-1)

    def _joined(self, kind: str, features_BND: Tensor, mask_BN: Tensor) -> Tensor:
        """One vector per row: image tokens side by side, other tokens by their mean."""
        kept_apart = self.config.num_image_tokens
        if kind != "image" or kept_apart == 1:
            return features_BND.sum(dim=1) / mask_BN.sum(dim=1, keepdim=True).clamp(min=1)
        if features_BND.shape[1] != kept_apart:
            raise ValueError(
                f"expert.fusion.num_image_tokens is {kept_apart}, and the backbone gives {features_BND.shape[1]} image tokens; "
                "give the number of cameras with the clip backbone's pooled features, or 1 to read the mean of all"
            )
        return features_BND.flatten(1)


class MLPExpert(nn.Module):
    """See `Expert`."""

    def __init__(
        self, config: MLPExpertConfig, *, prefix: PrefixShape, horizon: int, action_dim: int, second_level: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.horizon = horizon
        self.condition: nn.Module
        if config.condition == "pooling":
            self.condition, condition_width = TokenPooling(config.pooling, prefix), config.pooling.width
        else:
            self.condition, condition_width = Fusion(config.fusion, prefix), config.fusion.width
        level_width, chunk = config.noise_level_width, horizon * action_dim
        self.noise_level_mlp = silu_mlp(level_width, level_width, level_width)
        self.second_level_embedding = make_second_level(level_width, second_level)
        hidden = [config.width] * config.num_layers
        self.velocity_mlp = silu_mlp(chunk + level_width + condition_width, *hidden, chunk)

    def unread_parameters(self) -> list[nn.Parameter]:
        return [] if self.standardised is None else list(self.standardised.parameters(recurse=False))

    @property
    def standardised(self) -> Fusion | None:
        """What must be calibrated before the first step."""
        fusion = self.condition
        return fusion if isinstance(fusion, Fusion) and fusion.config.standardise else None

    def bind(self, prefix: Prefix) -> "BoundMLPExpert":
        """Raises ValueError if the prefix lacks tokens or proprioception, or has other image tokens than the fusion reads."""
        return BoundMLPExpert(self, self.condition(prefix))


class BoundMLPExpert:
    """An `MLPExpert` with its condition; see `BoundExpert`."""

    def __init__(self, expert: MLPExpert, condition_BC: Tensor) -> None:
        self.expert = expert
        self.condition_BC = condition_BC

    def fan_out(self, num_candidates: int) -> "BoundMLPExpert":
        return BoundMLPExpert(self.expert, self.condition_BC.repeat_interleave(num_candidates, dim=0))

    def __call__(self, x_BHA: Tensor, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> Tensor:
        return self.evaluate(x_BHA, self.level_features(noise_level_B, second_level_B))

    def level_features(self, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> LevelFeatures:
        expert = self.expert
        level_BD = embed_noise_level(noise_level_B, expert.config.noise_level_width).to(self.condition_BC.dtype)
        return (expert.noise_level_mlp(with_second_level(level_BD, expert.second_level_embedding, second_level_B)),)

    def evaluate(self, x_BHA: Tensor, features: LevelFeatures) -> Tensor:
        expert, dtype = self.expert, self.condition_BC.dtype
        level_BD = features[0].expand(x_BHA.shape[0], -1)
        out_BC = expert.velocity_mlp(torch.cat([x_BHA.to(dtype).flatten(1), level_BD, self.condition_BC], dim=-1))
        return out_BC.unflatten(1, (expert.horizon, -1)).float()
