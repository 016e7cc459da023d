"""Three tiny action distributions whose best answers are known in closed form, an expert that gives them, and one that learns.

`x = (1 - level) * action + level * noise`, level 1 = noise; a velocity points towards noise. Everything works element by
element and in the dtype of `x`; levels are numbers or tensors that broadcast against `x`. The formulas are those of
../shared/reference/objectives.md, section 2.

B batch, H action steps, A action dimensions, C features of the condition.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlatune.policy.layers.noise_level_embedding import embed_noise_level
from vlatune.policy.objectives.draws import DrawKeys


def seeded_normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@dataclass(frozen=True)
class Gaussian:
    """G: every entry is N(mean, std²) on its own."""

    mean: float = 0.7
    std: float = 0.3

    def actions(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.mean + self.std * seeded_normal(*shape, seed=seed, dtype=dtype)

    def variance(self, level: Any) -> Any:
        """Of x at a level."""
        return (1 - level) ** 2 * self.std**2 + level**2

    def velocity(self, x: Tensor, level: Any) -> Tensor:
        """E[noise - action | x]."""
        slope = (level - (1 - level) * self.std**2) / self.variance(level)
        return -self.mean + slope * (x - (1 - level) * self.mean)

    def clean(self, x: Tensor, level: Any) -> Tensor:
        """E[action | x]."""
        return x - level * self.velocity(x, level)

    def velocity_variance(self, level: Any) -> Any:
        """What of noise - action no function of x can know: the floor of flow's squared error at a level."""
        return self.std**2 / self.variance(level)

    @property
    def uniform_loss_floor(self) -> float:
        """Flow's, noise levels uniform; 0.350128 for Beta(1.5, 1) at std 0.3."""
        return math.pi * self.std / 2

    def flow_map(self, x: Tensor, level: Any, target_level: Any) -> Tensor:
        """Where the exact field carries x, from `level` to `target_level`."""
        scale = (self.variance(target_level) / self.variance(level)) ** 0.5
        return (1 - target_level) * self.mean + scale * (x - (1 - level) * self.mean)

    def average_velocity(self, x: Tensor, level: Any, target_level: Any) -> Tensor:
        """Of the exact field over the way from `level` down to `target_level`, which is below it."""
        return (x - self.flow_map(x, level, target_level)) / (level - target_level)

    def euler_std(self, num_steps: int) -> float:
        """Spread of samples from the exact field with Euler steps: below `std`, 0 for one step."""
        product = 1.0
        for step in range(num_steps):
            level = 1 - step / num_steps
            product *= 1 - (level - (1 - level) * self.std**2) / self.variance(level) / num_steps
        return product


@dataclass(frozen=True)
class TwoModes:
    """T: every entry is -1 or 1, as likely."""

    def actions(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return seeded_normal(*shape, seed=seed, dtype=dtype).sign()

    def clean(self, x: Tensor, level: Any) -> Tensor:
        return torch.tanh((1 - level) * x / level**2)

    def velocity(self, x: Tensor, level: Any) -> Tensor:
        """Not at level 0."""
        return (x - self.clean(x, level)) / level


@dataclass(frozen=True)
class Skew:
    """K: every entry is 1 with probability `share`, else 0."""

    share: float = 0.3

    def actions(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        return (uniform < self.share).to(dtype)

    def clean(self, x: Tensor, level: Any) -> Tensor:
        evidence = (1 - level) * (2 * x - (1 - level)) / (2 * level**2)
        return torch.sigmoid(math.log(self.share / (1 - self.share)) + evidence)

    def velocity(self, x: Tensor, level: Any) -> Tensor:
        """Not at level 0."""
        return (x - self.clean(x, level)) / level


@dataclass
class ClosedFormExpert:
    """A bound expert that answers `function(x, level)`, or `function(x, level, second_level)`; levels come as (B, 1, 1).

    All in the dtype of x. `shift`, added to every answer, is there to be differentiated."""

    function: Callable[..., Tensor]
    shift: Tensor | None = None
    levels: list[float] = field(default_factory=list)
    """Of the first row, one entry per call."""
    num_rows: list[int] = field(default_factory=list)
    """Rows of each call."""

    def __call__(self, x_BHA: Tensor, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> Tensor:
        self.levels.append(noise_level_B[0].item())
        self.num_rows.append(len(x_BHA))
        given = [level_B for level_B in (noise_level_B, second_level_B) if level_B is not None]
        levels = [level_B.to(x_BHA.dtype)[:, None, None] for level_B in given]
        answer_BHA = self.function(x_BHA, *levels)
        return answer_BHA if self.shift is None else answer_BHA + self.shift

    def fan_out(self, num_candidates: int) -> "ClosedFormExpert":
        return self


class LearningExpert(nn.Module):
    """A perceptron over (x, level, condition), small enough to be trained in a test; `bind(condition_BC)` it."""

    def __init__(
        self,
        *,
        horizon: int = 1,
        action_dim: int = 1,
        condition_dim: int = 0,
        width: int = 64,
        second_level: bool = False,
    ) -> None:
        super().__init__()
        self.level_width = 16
        wide = horizon * action_dim + (2 if second_level else 1) * self.level_width + condition_dim
        self.net = nn.Sequential(
            nn.Linear(wide, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, horizon * action_dim),
        )

    def bind(self, condition_BC: Tensor) -> "BoundLearningExpert":
        return BoundLearningExpert(self, condition_BC)


@dataclass
class BoundLearningExpert:
    expert: LearningExpert
    condition_BC: Tensor

    def fan_out(self, num_candidates: int) -> "BoundLearningExpert":
        return BoundLearningExpert(self.expert, self.condition_BC.repeat_interleave(num_candidates, dim=0))

    def __call__(self, x_BHA: Tensor, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> Tensor:
        parts = [x_BHA.flatten(1), self.condition_BC]
        for level_B in (noise_level_B, second_level_B):
            if level_B is not None:
                # Long periods only: a level is to be a smooth input here.
                parts.append(embed_noise_level(level_B, self.expert.level_width, min_period=0.5).to(x_BHA.dtype))
        answer_BHA: Tensor = self.expert.net(torch.cat(parts, dim=-1)).view_as(x_BHA)
        return answer_BHA


def trained(
    objective: Any, actions_of: Callable[[int], tuple[Tensor, Tensor]], expert: LearningExpert, *, num_steps: int
) -> LearningExpert:
    """`expert` after Adam steps on fresh data; `actions_of(step)` gives condition_BC and actions_BHA, all of them valid."""
    optimizer = torch.optim.Adam(expert.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for step in range(num_steps):
        condition_BC, actions_BHA = actions_of(step)
        keys = DrawKeys(seed=0, step=step, sample_index_B=torch.arange(len(actions_BHA)))
        draw = objective.draw(actions_BHA, keys)
        valid_BHA = torch.ones_like(actions_BHA, dtype=torch.bool)
        loss = objective.loss(expert.bind(condition_BC), actions_BHA, valid_BHA, draw)
        optimizer.zero_grad()
        ((loss.entries_BHA * loss.weight_BHA).sum() / loss.weight_BHA.sum()).backward()
        optimizer.step()
        schedule.step()
    return expert
