"""Flow matching on the straight path between an action and noise (rectified flow), as π0 and SmolVLA train it.

`x = (1 - level) * action + level * noise`; the expert's output is the velocity `noise - action`, which points towards
noise, or the action that it is made of. Sampling integrates it from level 1 to 0. Lipman et al. 2023; Liu et al. 2023; Black et al. 2024 (π0).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..experts.expert import BoundExpert
from .draws import DrawKeys
from .noise_levels import NoiseLevelLaw
from .objective import Draw, Loss, fanned_out

Solver = Literal["euler", "midpoint", "heun"]
Velocity = Callable[[Tensor, Tensor], Tensor]
"""(points (B, H, A), levels (B,)) -> velocities."""
LEAST_LEVEL = 0.05
"""Below, an error of a predicted action counts as at this level: its velocity's has no bound. As Li and He (arXiv 2511.13720)."""


@dataclass(frozen=True, kw_only=True)
class Flow(NoiseLevelLaw):
    """Flow matching: a velocity at every noise level, integrated when acting."""

    type: Literal["flow"] = "flow"
    prediction: Literal["velocity", "sample"] = "velocity"
    """What the expert's output is: the velocity itself, or the action, of which the velocity is made as (x - action) / level (levels
    below 0.05 counting as that). The loss is the velocity's either way. A sharp velocity hands the noise through, magnified, which
    a small expert learns slowly; an action knows nothing of it. Public checkpoints predict velocities."""
    num_draws: int = 1
    """Noise draws per encoded observation: the expectation is the same, the gradient less noisy, the backbone's cost
    shared."""
    solver: Solver = "euler"
    """How a step is made when acting: Euler calls the expert once a step, midpoint twice; Heun twice, but once in the last
    step, since no velocity at level 0 is trained."""
    num_sampling_steps: int = 10
    """Steps of the solver when acting, n: n calls of the expert with Euler, 2n with midpoint, 2n - 1 with Heun."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_draws < 1 or self.num_sampling_steps < 1:
            raise ValueError("objective.num_draws and objective.num_sampling_steps must be at least 1")

    @property
    def has_second_level(self) -> bool:
        return False

    def draw(self, actions_BHA: Tensor, keys: DrawKeys) -> Draw:
        uniform_B, noise_BHA = keys.draw(self.num_draws, tuple(actions_BHA.shape[1:]), actions_BHA.device)
        return Draw(noise_BHA=noise_BHA, noise_level_B=self.level(uniform_B))

    def loss(self, expert: BoundExpert, actions_BHA: Tensor, valid_BHA: Tensor, draw: Draw) -> Loss:
        expert, actions_BHA, valid_BHA = fanned_out(expert, actions_BHA, valid_BHA, draw)
        predicted_BHA = expert(mixed(actions_BHA, draw.noise_BHA, draw.noise_level_B), draw.noise_level_B)
        if self.prediction == "sample":
            # The noise cancels in the difference of velocities.
            error_BHA = (predicted_BHA - actions_BHA) / draw.noise_level_B[:, None, None].clamp(min=LEAST_LEVEL)
        else:
            error_BHA = predicted_BHA - (draw.noise_BHA - actions_BHA)
        return Loss(entries_BHA=error_BHA.square(), weight_BHA=valid_BHA.to(error_BHA.dtype), metrics={})

    def sample(self, expert: BoundExpert, noise_BHA: Tensor) -> Tensor:
        return integrated(self.velocity(expert), noise_BHA, num_steps=self.num_sampling_steps, solver=self.solver)

    def velocity(self, expert: BoundExpert) -> Velocity:
        """What is integrated, whichever of the two the expert predicts."""
        return _velocity_of_sample(expert) if self.prediction == "sample" else expert


def _velocity_of_sample(expert: BoundExpert) -> Velocity:
    def velocity(x_BHA: Tensor, level_B: Tensor) -> Tensor:
        return (x_BHA - expert(x_BHA, level_B)) / level_B[:, None, None].clamp(min=LEAST_LEVEL)

    return velocity


def mixed(actions_BHA: Tensor, noise_BHA: Tensor, noise_level_B: Tensor) -> Tensor:
    """The point between actions and noise at each row's level, (B, H, A)."""
    level_B11 = noise_level_B[:, None, None]
    return (1 - level_B11) * actions_BHA + level_B11 * noise_BHA


def integrated(
    expert: BoundExpert | Velocity, noise_BHA: Tensor, *, num_steps: int, solver: Solver = "euler"
) -> Tensor:
    """Where the expert's velocity carries noise: from level 1 to 0 in equal steps, (B, H, A)."""

    def velocity(x_BHA: Tensor, step: float) -> Tensor:
        # From the step's number: a running sum would drift off the levels that were trained.
        return expert(x_BHA, torch.full_like(noise_BHA[:, 0, 0], 1 - step / num_steps))

    x_BHA = noise_BHA
    for step in range(num_steps):
        velocity_BHA = velocity(x_BHA, step)
        if solver == "midpoint":
            velocity_BHA = velocity(x_BHA - velocity_BHA / (2 * num_steps), step + 0.5)
        elif solver == "heun" and step + 1 < num_steps:
            velocity_BHA = (velocity_BHA + velocity(x_BHA - velocity_BHA / num_steps, step + 1)) / 2
        x_BHA = x_BHA - velocity_BHA / num_steps
    return x_BHA
