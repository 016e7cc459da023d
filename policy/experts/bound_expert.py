"""The seam between experts and objectives."""

from typing import Protocol, Self

from torch import Tensor


class BoundExpert(Protocol):
    """An action expert bound to one batch of observations; the prefix has been encoded once."""

    def __call__(self, x_BHA: Tensor, noise_level_B: Tensor) -> Tensor:
        """(B, H, A) and (B,) in [0, 1], 1 = pure noise -> (B, H, A). What the output means is the objective's choice."""

    def fan_out(self, num_candidates: int) -> Self:
        """The same expert over B * num_candidates rows; row b * num_candidates + k reads the prefix of row b."""
