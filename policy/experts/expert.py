"""What every action expert is, and the seam between experts and objectives."""

from collections.abc import Collection
from typing import Protocol, Self

from torch import Tensor, nn

from ..prefix import Prefix

LevelFeatures = tuple[Tensor, ...]
"""What an expert computes from the levels alone. The first dimension of each is the rows'; features of one row serve any batch."""


class BoundExpert(Protocol):
    """An action expert bound to one batch of observations; the prefix has been encoded once."""

    def __call__(self, x_BHA: Tensor, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> Tensor:
        """(B, H, A) and (B,) in [0, 1], 1 = pure noise -> (B, H, A) float32. What it means is the objective's choice.

        `second_level_B`, (B,) in [0, 1], where the objective declares a second time input."""

    def fan_out(self, num_candidates: int) -> Self:
        """The same expert over B * num_candidates rows; row b * num_candidates + k reads the prefix of row b."""


class SplitExpert(BoundExpert, Protocol):
    """What `Expert.bind` returns: a call is `evaluate` of the `level_features`, and can be made in these two parts."""

    def level_features(self, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> LevelFeatures:
        """What depends on the levels and on weights, and neither on actions nor on the observation: sampling, whose levels are the same
        at every decision, computes it once and for all."""

    def evaluate(self, x_BHA: Tensor, features: LevelFeatures) -> Tensor:
        """(B, H, A) float32: the rest of a call."""


class Expert(Protocol):
    """A module, built as `GemmaExpert(config, prefix=…, horizon=…, action_dim=…, second_level=…)` with the backbone's
    `PrefixShape`, H and A (of the model's vectors, which may be wider than the robot's), and whether the objective has a second
    time input, for which it then has a `second_level_embedding`; raises ValueError where they do not fit. Its config's `reads`
    names the part of the prefix that it reads."""

    def bind(self, prefix: Prefix) -> SplitExpert:
        """Compute once what depends on the observation and on the expert's own weights."""

    def unread_parameters(self) -> Collection[nn.Parameter]:
        """Parameters that no output depends on: kept in checkpoints, without gradients."""
