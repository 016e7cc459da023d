"""The 1-D convolutional U-Net of Diffusion Policy over the steps of an action chunk, conditioned by FiLM.

The observation is one vector, pooled from the prefix; with the embedded noise level it scales and shifts the features of
every residual block. Chi et al. 2023; weights have the names of its `ConditionalUnet1D`.

Shape letters: B batch, H horizon, A action, C condition, K features of a convolution.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from ..layers.noise_level_embedding import make_second_level, with_second_level
from ..prefix import Prefix, PrefixShape
from .expert import LevelFeatures
from .pooling import PoolingConfig, TokenPooling

FINAL_GROUPS = 8
"""Groups of the last norm, whatever the others have: Diffusion Policy's constant."""

WHOLE_STEP = 1e-4
"""A native time this close to an integer is that integer. float32 misses the integers up to 1000 by less."""


@dataclass(frozen=True, kw_only=True)
class UNetExpertConfig:
    """A U-Net over the chunk's steps; reads tokens."""

    type: Literal["unet"] = "unet"
    pooling: PoolingConfig = field(default_factory=PoolingConfig)
    down_dims: tuple[int, ...] = (256, 512, 1024)
    """Features at every resolution; each after the first halves the number of steps."""
    kernel_size: int = 5
    """Steps that a convolution spans; odd."""
    num_groups: int = 8
    """Groups of the norms."""
    step_embed_dim: int = 256
    """Features of the embedded noise level."""
    film_scale: bool = True
    """Whether the condition scales features besides shifting them (`cond_predict_scale`)."""
    time_scale: float = 100.0
    """Native time at noise level 1; Diffusion Policy counts its 100 training steps. Any level between is embedded as it is;
    a level i / 100 comes back as exactly i."""

    def __post_init__(self) -> None:
        if not self.down_dims or self.down_dims[0] % FINAL_GROUPS or any(d % self.num_groups for d in self.down_dims):
            raise ValueError(
                f"expert.down_dims is {self.down_dims}; give at least one, multiples of num_groups ({self.num_groups}), the "
                f"first also of {FINAL_GROUPS}"
            )
        if self.kernel_size % 2 == 0 or self.step_embed_dim % 2 or self.step_embed_dim < 4:
            raise ValueError(
                f"expert.kernel_size is {self.kernel_size} and step_embed_dim {self.step_embed_dim}; give an odd and an even "
                "number, the latter 4 or more"
            )

    @property
    def reads(self) -> Literal["tokens"]:
        return "tokens"

    def check_horizon(self, horizon: int) -> None:
        """Raises ValueError where halving and doubling would not give the same number of steps back."""
        multiple = 2 ** (len(self.down_dims) - 1)
        if horizon % multiple:
            below = horizon // multiple * multiple
            nearest = f"{below} or {below + multiple}" if below else f"{multiple}"
            raise ValueError(
                f"policy.horizon is {horizon}; a U-Net of {len(self.down_dims)} resolutions needs a multiple of {multiple}: "
                f"give {nearest}"
            )


def native_time(noise_level_B: Tensor, time_scale: float) -> Tensor:
    """(B,) float64: `noise_level * time_scale`, an integer exactly where it is one but for rounding.

    Only the value is corrected: a derivative by the noise level sees the product alone."""
    time_B = noise_level_B.double() * time_scale
    rounding_B = (time_B.round() - time_B).detach()
    return time_B + torch.where(rounding_B.abs() < WHOLE_STEP, rounding_B, 0.0)


def embed_step(time_B: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width) float32: sines, then cosines, angular frequencies geometric from 1 to 1e-4."""
    share = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time_B.device)
    angle = time_B.double()[:, None] * torch.exp(-math.log(1e4) * share)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def conv_block(before: int, after: int, kernel_size: int, num_groups: int) -> nn.Sequential:
    """Convolution, norm, activation; torch's group norm has its statistics in float32 for any dtype."""
    conv = nn.Conv1d(before, after, kernel_size, padding=kernel_size // 2)
    return nn.Sequential(OrderedDict(block=nn.Sequential(conv, nn.GroupNorm(num_groups, after), nn.Mish())))


class FilmBlock(nn.Module):
    """Two convolutions with a residual; between them the condition scales (by `scale`, not 1 + scale) and shifts."""

    def __init__(self, before: int, after: int, condition_dim: int, config: UNetExpertConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            conv_block(width, after, config.kernel_size, config.num_groups) for width in (before, after)
        )
        num_outputs = 2 * after if config.film_scale else after
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(condition_dim, num_outputs))
        self.residual_conv = nn.Identity() if before == after else nn.Conv1d(before, after, kernel_size=1)
        self.film_scale = config.film_scale

    def forward(self, x_BKH: Tensor, condition_BC: Tensor) -> Tensor:
        film_BK1 = self.cond_encoder(condition_BC)[..., None]
        inner_BKH = self.blocks[0](x_BKH)
        if self.film_scale:
            scale_BK1, shift_BK1 = film_BK1.chunk(2, dim=1)
            inner_BKH = scale_BK1 * inner_BKH + shift_BK1
        else:
            inner_BKH = inner_BKH + film_BK1
        return self.blocks[1](inner_BKH) + self.residual_conv(x_BKH)


class Level(nn.ModuleList):
    """Two blocks at one resolution, and the way to the next."""

    def __init__(
        self, before: int, after: int, condition_dim: int, config: UNetExpertConfig, resample: nn.Module | None
    ) -> None:
        blocks = [FilmBlock(width, after, condition_dim, config) for width in (before, after)]
        way_on = nn.Identity() if resample is None else nn.Sequential(OrderedDict(conv=resample))
        super().__init__([*blocks, way_on])

    def forward(self, x_BKH: Tensor, condition_BC: Tensor) -> tuple[Tensor, Tensor]:
        """The features at this resolution, and at the next."""
        first, second, resample = self
        x_BKH = second(first(x_BKH, condition_BC), condition_BC)
        return x_BKH, resample(x_BKH)


class ConditionalUNet(nn.Module):
    """Noisy actions, native time and condition -> one output per action entry."""

    def __init__(self, config: UNetExpertConfig, *, action_dim: int, condition_dim: int) -> None:
        super().__init__()
        step_dim = config.step_embed_dim
        self.step_embed_dim = step_dim
        # Diffusion Policy's entry 0 is the embedding, which has no weights.
        self.diffusion_step_encoder = nn.Sequential(
            OrderedDict(
                {"1": nn.Linear(step_dim, 4 * step_dim), "2": nn.Mish(), "3": nn.Linear(4 * step_dim, step_dim)}
            )
        )
        condition_dim += step_dim
        dims = config.down_dims
        top = dims[-1]
        self.down_modules = nn.ModuleList(
            Level(
                before,
                after,
                condition_dim,
                config,
                None if i == len(dims) - 1 else nn.Conv1d(after, after, kernel_size=3, stride=2, padding=1),
            )
            for i, (before, after) in enumerate(pairwise((action_dim, *dims)))
        )
        self.mid_modules = nn.ModuleList(FilmBlock(top, top, condition_dim, config) for _ in range(2))
        # The finest skip is left out: the last level up ends at its resolution.
        self.up_modules = nn.ModuleList(
            Level(
                2 * coarse,
                fine,
                condition_dim,
                config,
                nn.ConvTranspose1d(fine, fine, kernel_size=4, stride=2, padding=1),
            )
            for coarse, fine in pairwise(reversed(dims))
        )
        self.final_conv = nn.Sequential(
            conv_block(dims[0], dims[0], config.kernel_size, FINAL_GROUPS), nn.Conv1d(dims[0], action_dim, 1)
        )

    def encoded_time(self, time_B: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) -> (B, step_embed_dim)."""
        encoded_BC: Tensor = self.diffusion_step_encoder(embed_step(time_B, self.step_embed_dim).to(dtype))
        return encoded_BC

    def forward(self, x_BHA: Tensor, step_BC: Tensor, condition_BC: Tensor) -> Tensor:
        """(B, H, A), the encoded time (B or 1, step_embed_dim) and (B, C) -> (B, H, A), in the condition's dtype."""
        dtype = condition_BC.dtype
        condition_BC = torch.cat([step_BC.expand(condition_BC.shape[0], -1), condition_BC], dim=-1)
        x_BKH = x_BHA.to(dtype).transpose(1, 2)
        skips = []
        for level in self.down_modules:
            skip_BKH, x_BKH = level(x_BKH, condition_BC)
            skips.append(skip_BKH)
        for block in self.mid_modules:
            x_BKH = block(x_BKH, condition_BC)
        for level in self.up_modules:
            _, x_BKH = level(torch.cat([x_BKH, skips.pop()], dim=1), condition_BC)
        out_BAH: Tensor = self.final_conv(x_BKH)
        return out_BAH.transpose(1, 2)


class UNetExpert(nn.Module):
    """See `Expert`."""

    def __init__(
        self,
        config: UNetExpertConfig,
        *,
        prefix: PrefixShape,
        horizon: int,
        action_dim: int,
        second_level: bool = False,
    ) -> None:
        super().__init__()
        config.check_horizon(horizon)
        self.config = config
        self.pooling = TokenPooling(config.pooling, prefix)
        self.second_level_embedding = make_second_level(config.pooling.width, second_level)
        self.unet = ConditionalUNet(config, action_dim=action_dim, condition_dim=config.pooling.width)

    def unread_parameters(self) -> list[nn.Parameter]:
        return []

    def bind(self, prefix: Prefix) -> "BoundUNetExpert":
        """Raises ValueError if the prefix lacks tokens or proprioception."""
        return BoundUNetExpert(self, self.pooling(prefix))


class BoundUNetExpert:
    """A `UNetExpert` with its condition; see `BoundExpert`."""

    def __init__(self, expert: UNetExpert, condition_BC: Tensor) -> None:
        self.expert = expert
        self.condition_BC = condition_BC

    def fan_out(self, num_candidates: int) -> "BoundUNetExpert":
        return BoundUNetExpert(self.expert, self.condition_BC.repeat_interleave(num_candidates, dim=0))

    def __call__(self, x_BHA: Tensor, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> Tensor:
        return self.evaluate(x_BHA, self.level_features(noise_level_B, second_level_B))

    def level_features(self, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> LevelFeatures:
        """The encoded time, and what the second level adds to the condition, zeros without one."""
        expert, dtype = self.expert, self.condition_BC.dtype
        time_B = native_time(noise_level_B, expert.config.time_scale)
        nothing_BC = torch.zeros(len(time_B), self.condition_BC.shape[1], dtype=dtype, device=time_B.device)
        added_BC = with_second_level(nothing_BC, expert.second_level_embedding, second_level_B)
        return expert.unet.encoded_time(time_B, dtype), added_BC

    def evaluate(self, x_BHA: Tensor, features: LevelFeatures) -> Tensor:
        step_BC, added_BC = features
        out_BHA: Tensor = self.expert.unet(x_BHA, step_BC, self.condition_BC + added_BC)
        return out_BHA.float()
