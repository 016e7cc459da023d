"""Shortcut models: the average velocity over a step of stated length, learned from two steps of half that length.

`x` as in flow. The expert gets the step's length d itself as its second time input, in [1/M, 1], and answers with the
average velocity from `level` down to `level - d`. Steps of 1/M regress `noise - action` as flow does; longer ones, 2/M to 1,
regress the mean of the expert's own two half steps, taken without gradients from the live weights (there is no moving
average of them). What can be learned is the result of M Euler steps, in one.
Frans et al., arXiv 2410.12557; default M and bootstrapped share as in the authors' code.

Cost: every training step makes the same three calls of the expert on every rank, whatever was drawn: two without gradients on
ceil(bootstrap_share * num_draws) rows per observation, then one with. With one draw per observation the first two run on all
rows and use a share of them, about 1.7 times flow's cost in the expert; with num_draws = 1 / bootstrap_share nothing is wasted
and it is about 1.1 times at a share of 1/8.

K draws per observation; C of them that may be bootstrapped.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..experts.expert import BoundExpert
from .draws import DrawKeys
from .flow import mixed
from .objective import Draw, Loss, fanned_out


@dataclass(frozen=True, kw_only=True)
class Shortcut:
    """Average velocities over steps of 1/M to 1, for acting in 1, 2, 4, … M steps."""

    type: Literal["shortcut"] = "shortcut"
    num_base_steps: int = 128
    """M, a power of two: the shortest step is 1/M, trained as flow; each longer one is learned from two of half its length."""
    bootstrap_share: float = 0.125
    """Share of draws that learn a longer step. Stratified over num_draws: with 8 draws and 1/8 it is the first of each 8."""
    clip: float | None = None
    """Bound on the half-way point and on the targets of longer steps, normalised units (the authors': 4); None: no bound."""
    num_draws: int = 1
    """Noise draws per encoded observation: the expectation is the same, the gradient less noisy, the backbone's cost
    shared. 1 / bootstrap_share of them waste no call."""
    num_sampling_steps: int = 1
    """Steps when acting, a call of the expert each: a power of two up to num_base_steps."""

    def __post_init__(self) -> None:
        if self.num_draws < 1:
            raise ValueError(f"objective.num_draws is {self.num_draws}; it must be at least 1")
        if self.num_base_steps < 2 or not _is_power_of_two(self.num_base_steps):
            raise ValueError(
                f"objective.num_base_steps is {self.num_base_steps}; steps are halved down to 1/num_base_steps, so it must be a "
                "power of two, 2 or more"
            )
        if self.num_sampling_steps > self.num_base_steps or not _is_power_of_two(self.num_sampling_steps):
            raise ValueError(
                f"objective.num_sampling_steps is {self.num_sampling_steps}; a shortcut knows steps of length 1, 1/2, 1/4, …, so "
                f"it must be a power of two up to objective.num_base_steps, {self.num_base_steps}"
            )
        if not 0 < self.bootstrap_share < 1:
            raise ValueError(f"objective.bootstrap_share is {self.bootstrap_share}; it must lie between 0 and 1")

    @property
    def has_second_level(self) -> bool:
        return True

    def draw(self, actions_BHA: Tensor, keys: DrawKeys) -> Draw:
        """Levels are whole multiples of the step's length, from one step to 1; all lengths above 1/M are as likely."""
        uniform_B, noise_BHA = keys.draw(self.num_draws, tuple(actions_BHA.shape[1:]), actions_BHA.device)
        # One uniform of 24 bits holds the three choices: kind of row, length, level. float64 keeps them while it is cut up.
        draw_B = torch.arange(len(uniform_B), device=uniform_B.device) % self.num_draws
        place_B = (draw_B + uniform_B.double()) / self.num_draws
        share = self.bootstrap_share
        is_bootstrapped_B = place_B < share
        rest_B = torch.where(is_bootstrapped_B, place_B / share, (place_B - share) / (1 - share))
        num_lengths = self.num_base_steps.bit_length() - 1
        halvings_B = torch.floor(rest_B * num_lengths).clamp(max=num_lengths - 1)
        rest_B = torch.where(is_bootstrapped_B, rest_B * num_lengths - halvings_B, rest_B)
        num_levels_B = torch.where(is_bootstrapped_B, torch.exp2(halvings_B).round(), float(self.num_base_steps))
        # Rounding could make the last level one too many.
        level_B = (torch.floor(rest_B * num_levels_B) + 1).clamp(max=num_levels_B) / num_levels_B
        return Draw(noise_BHA=noise_BHA, noise_level_B=level_B.float(), second_level_B=(1 / num_levels_B).float())

    def loss(self, expert: BoundExpert, actions_BHA: Tensor, valid_BHA: Tensor, draw: Draw) -> Loss:
        """Metric `bootstrap_loss`: the part of the loss that longer steps make. Of a draw with num_draws rows per observation
        only the first ceil(bootstrap_share * num_draws) may have a longer step, as `draw` makes it; of others any row."""
        if draw.second_level_B is None:
            raise ValueError(
                "a shortcut's draw needs the lengths of its steps, second_level_B; make it with Shortcut.draw"
            )
        batch = actions_BHA.shape[0]
        fanned, actions_BHA, valid_BHA = fanned_out(expert, actions_BHA, valid_BHA, draw)
        x_BHA = mixed(actions_BHA, draw.noise_BHA, draw.noise_level_B)
        target_BKHA = (draw.noise_BHA - actions_BHA).unflatten(0, (batch, -1))
        num_draws = target_BKHA.shape[1]
        num_bootstrapped = num_draws
        if num_draws == self.num_draws:
            num_bootstrapped = math.ceil(self.bootstrap_share * num_draws)

        def first_draws(rows: Tensor) -> Tensor:
            return rows.unflatten(0, (batch, -1))[:, :num_bootstrapped].flatten(0, 1)

        length_B = first_draws(draw.second_level_B)
        two_steps_BHA = self._two_half_steps(
            expert if num_bootstrapped == 1 else expert.fan_out(num_bootstrapped),
            first_draws(x_BHA),
            first_draws(draw.noise_level_B),
            length_B,
        )
        is_longer_BC11 = (length_B > 1 / self.num_base_steps).unflatten(0, (batch, -1))[..., None, None]
        chosen_BCHA = torch.where(
            is_longer_BC11, two_steps_BHA.unflatten(0, (batch, -1)), target_BKHA[:, :num_bootstrapped]
        )
        target_BHA = torch.cat([chosen_BCHA, target_BKHA[:, num_bootstrapped:]], dim=1).flatten(0, 1)
        entries_BHA = (fanned(x_BHA, draw.noise_level_B, draw.second_level_B) - target_BHA).square()
        weight_BHA = valid_BHA.to(entries_BHA.dtype)
        is_longer_B11 = (draw.second_level_B > 1 / self.num_base_steps)[:, None, None]
        longer = (entries_BHA.detach() * weight_BHA * is_longer_B11).sum() / weight_BHA.sum().clamp(min=1)
        return Loss(entries_BHA=entries_BHA, weight_BHA=weight_BHA, metrics={"bootstrap_loss": longer})

    def sample(self, expert: BoundExpert, noise_BHA: Tensor) -> Tensor:
        x_BHA = noise_BHA
        length_B = torch.full_like(noise_BHA[:, 0, 0], 1 / self.num_sampling_steps)
        for step in range(self.num_sampling_steps):
            level_B = torch.full_like(length_B, 1 - step / self.num_sampling_steps)
            x_BHA = x_BHA - expert(x_BHA, level_B, length_B) / self.num_sampling_steps
        return x_BHA

    @torch.no_grad()
    def _two_half_steps(self, expert: BoundExpert, x_BHA: Tensor, noise_level_B: Tensor, length_B: Tensor) -> Tensor:
        """The average velocity over a step of `length_B` from `noise_level_B`, by two of half that length."""
        half_B = length_B / 2
        first_BHA = expert(x_BHA, noise_level_B, half_B)
        half_way_BHA = self._clipped(x_BHA - half_B[:, None, None] * first_BHA)
        second_BHA = expert(half_way_BHA, noise_level_B - half_B, half_B)
        return self._clipped((first_BHA + second_BHA) / 2)

    def _clipped(self, values_BHA: Tensor) -> Tensor:
        return values_BHA if self.clip is None else values_BHA.clamp(-self.clip, self.clip)


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
