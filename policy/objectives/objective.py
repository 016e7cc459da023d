"""What every objective is: a draw, a loss and a way to sample, over a bound expert and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..experts.expert import BoundExpert
from .draws import DrawKeys


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What an objective drew; a function of (seed, optimizer step, global sample index), or recorded and put in.

    With K draws per prefix the first dimension is B * K; row b * K + k belongs to sample b."""

    noise_BHA: Tensor
    noise_level_B: Tensor
    second_level_B: Tensor | None = None
    """Where the objective has a second time input."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Unreduced: the trainer takes the mean of the entries, weighted."""

    entries_BHA: Tensor
    weight_BHA: Tensor
    """0 where padded, unused or rejected."""
    metrics: Mapping[str, Tensor]
    """Detached scalars."""


class Objective(Protocol):
    """Actions here are normalised; `valid_BHA` is True where a step is real and a dimension used."""

    @property
    def has_second_level(self) -> bool:
        """Whether it gives the expert a second time input, for which the expert then has an embedding."""

    @property
    def num_sampling_steps(self) -> int:
        """Steps of sampling, as results name them: a call of the expert each, or as many as the objective's solver says."""

    def draw(self, actions_BHA: Tensor, keys: DrawKeys) -> Draw: ...

    def loss(self, expert: BoundExpert, actions_BHA: Tensor, valid_BHA: Tensor, draw: Draw) -> Loss: ...

    def sample(self, expert: BoundExpert, noise_BHA: Tensor) -> Tensor: ...


def fanned_out(
    expert: BoundExpert, actions_BHA: Tensor, valid_BHA: Tensor, draw: Draw
) -> tuple[BoundExpert, Tensor, Tensor]:
    """Expert, actions and validity with a row for each of the K draws per prefix: (B * K, H, A)."""
    num_draws = draw.noise_BHA.shape[0] // actions_BHA.shape[0]
    if num_draws == 1:
        return expert, actions_BHA, valid_BHA
    return (
        expert.fan_out(num_draws),
        actions_BHA.repeat_interleave(num_draws, dim=0),
        valid_BHA.repeat_interleave(num_draws, dim=0),
    )
