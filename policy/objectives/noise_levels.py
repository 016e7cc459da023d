"""Laws from which training draws noise levels, each one uniform number through an inverse distribution function.

One number whatever the law: changing the law changes no other draw. Black et al. 2024 (π0); Esser et al. 2024 (logit-normal
and shift); arXiv 2606.05737 (a shift of 3 to 8 towards noise, for acting in one step)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NoiseLevelLaw:
    """How noise levels are drawn; the objectives that draw them have these settings as their own."""

    noise_levels: Literal["uniform", "pi0", "logit_normal"] = "pi0"
    """How training draws the noise level: uniform on [0, 1]; π0's Beta(1.5, 1) on [0.001, 1], which favours noise; or
    the sigmoid of a normal number."""
    logit_mean: float = 0.0
    """Of that normal number; its sigmoid is the median level. Read with 'logit_normal' alone, as is logit_std."""
    logit_std: float = 1.0
    """Its standard deviation."""
    level_shift: float = 1.0
    """Turns a drawn level t into level_shift * t / (1 + (level_shift - 1) * t): above 1 towards noise, 1 leaves it. 4 over
    'pi0' or 'uniform' is for acting in one step, which makes acting in many worse."""
    pure_noise_share: float = 0.0
    """Share of draws at level 1 exactly, whatever the law; the others follow it."""

    def __post_init__(self) -> None:
        if self.logit_std <= 0 or self.level_shift <= 0:
            raise ValueError(
                f"objective.logit_std is {self.logit_std} and objective.level_shift {self.level_shift}; both must be more than 0"
            )
        if not 0 <= self.pure_noise_share <= 1:
            raise ValueError(f"objective.pure_noise_share is {self.pure_noise_share}; it is a share, from 0 to 1")

    def level(self, uniform_B: Tensor) -> Tensor:
        """(B,) uniform on [0, 1) -> (B,) noise levels in [0, 1], 1 = pure noise."""
        share = self.pure_noise_share
        if share == 0:
            return self._level_of_law(uniform_B)
        if share == 1:
            return torch.ones_like(uniform_B)
        rest_B = ((uniform_B - share) / (1 - share)).clamp(min=0)
        return torch.where(uniform_B < share, 1.0, self._level_of_law(rest_B))

    def _level_of_law(self, uniform_B: Tensor) -> Tensor:
        if self.noise_levels == "uniform":
            level_B = uniform_B
        elif self.noise_levels == "pi0":
            level_B = 0.001 + 0.999 * uniform_B ** (2 / 3)  # u^(2/3) is distributed as Beta(1.5, 1)
        else:
            level_B = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(uniform_B))
        if self.level_shift == 1:
            return level_B
        return self.level_shift * level_B / (1 + (self.level_shift - 1) * level_B)
