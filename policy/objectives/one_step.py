"""Flow fine-tuned to act in one step: `action = noise - velocity(noise, 1)`, the flow step from pure noise to the end.

Drawing most levels near pure noise makes that one step good (arXiv 2606.05737); here a share of the draws, all by default,
is at pure noise itself and regresses the end point. Noise says nothing about its action there, so what is learned is the
mean of the actions (or the median), the same for every noise: it suits demonstrations that differ little, and averages
between modes where they do not.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..experts.expert import BoundExpert
from .draws import DrawKeys
from .flow import integrated, mixed
from .noise_levels import NoiseLevelLaw
from .objective import Draw, Loss, fanned_out


@dataclass(frozen=True, kw_only=True)
class OneStep(NoiseLevelLaw):
    """Acting in one step from a flow expert, by regressing the end point of that step."""

    type: Literal["one_step"] = "one_step"
    pure_noise_share: float = 1.0
    """Share of draws at level 1 exactly, where the one step starts. The others are flow matching, at levels of the law
    above: they keep the expert a flow for several steps."""
    error: Literal["l2", "l1"] = "l2"
    """Of the end point, at level 1: l2 learns the mean of the actions, l1 their median in each dimension. Below level 1 it
    is flow's squared error always."""
    num_draws: int = 1
    """Noise draws per encoded observation, as in flow. With more than one, `draw_std` is measured."""
    num_sampling_steps: int = 1
    """Euler steps when acting, a call of the expert each; more than one needs pure_noise_share below 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_draws < 1 or self.num_sampling_steps < 1:
            raise ValueError("objective.num_draws and objective.num_sampling_steps must be at least 1")
        if self.pure_noise_share == 0:
            raise ValueError(
                "objective.pure_noise_share is 0, which trains no one step; set it above 0, or choose the objective 'flow'"
            )
        if self.pure_noise_share == 1 and self.num_sampling_steps > 1:
            raise ValueError(
                f"objective.num_sampling_steps is {self.num_sampling_steps}, and with objective.pure_noise_share 1 only the "
                "level that one step starts from is trained; set num_sampling_steps to 1, or pure_noise_share below 1"
            )

    @property
    def has_second_level(self) -> bool:
        return False

    def draw(self, actions_BHA: Tensor, keys: DrawKeys) -> Draw:
        uniform_B, noise_BHA = keys.draw(self.num_draws, tuple(actions_BHA.shape[1:]), actions_BHA.device)
        return Draw(noise_BHA=noise_BHA, noise_level_B=self.level(uniform_B))

    def loss(self, expert: BoundExpert, actions_BHA: Tensor, valid_BHA: Tensor, draw: Draw) -> Loss:
        """Metric `draw_std`: spread of the one-step action between the draws of an observation, in units of the normalised
        action; it goes to 0 as the expert stops reading its noise."""
        batch = actions_BHA.shape[0]
        expert, actions_BHA, valid_BHA = fanned_out(expert, actions_BHA, valid_BHA, draw)
        velocity_BHA = expert(mixed(actions_BHA, draw.noise_BHA, draw.noise_level_B), draw.noise_level_B)
        # At level 1 this is the error of noise - velocity as the action, up to its sign.
        error_BHA = velocity_BHA - (draw.noise_BHA - actions_BHA)
        is_end_point_B = draw.noise_level_B == 1
        entries_BHA = error_BHA.square()
        if self.error == "l1":
            entries_BHA = torch.where(is_end_point_B[:, None, None], error_BHA.abs(), entries_BHA)
        weight_BHA = valid_BHA.to(error_BHA.dtype)
        metrics = {}
        if len(draw.noise_level_B) > batch:
            action_BHA = (draw.noise_BHA - velocity_BHA).detach()
            counted_BHA = weight_BHA * is_end_point_B[:, None, None]
            metrics["draw_std"] = _spread_within(
                action_BHA.unflatten(0, (batch, -1)), counted_BHA.unflatten(0, (batch, -1))
            )
        return Loss(entries_BHA=entries_BHA, weight_BHA=weight_BHA, metrics=metrics)

    def sample(self, expert: BoundExpert, noise_BHA: Tensor) -> Tensor:
        return integrated(expert, noise_BHA, num_steps=self.num_sampling_steps)


def _spread_within(values_BKHA: Tensor, counted_BKHA: Tensor) -> Tensor:
    """Standard deviation over K, pooled over all else; entries with a count of 0 are left out."""
    count_B1HA = counted_BKHA.sum(dim=1, keepdim=True)
    mean_B1HA = (values_BKHA * counted_BKHA).sum(dim=1, keepdim=True) / count_B1HA.clamp(min=1)
    squares = ((values_BKHA - mean_B1HA).square() * counted_BKHA).sum()
    return (squares / (count_B1HA - 1).clamp(min=0).sum().clamp(min=1)).sqrt()
