"""Flow matching on the straight path between an action and noise (rectified flow), as π0 and SmolVLA train it.

`x = (1 - level) * action + level * noise`; the expert's output is the velocity `noise - action`, which points towards
noise. Sampling integrates it from level 1 to 0. Lipman et al. 2023; Liu et al. 2023; Black et al. 2024 (π0).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..experts.expert import BoundExpert
from .draws import DrawKeys
from .objective import Draw, Loss, fanned_out


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Flow matching with Euler sampling."""

    type: Literal["flow"] = "flow"
    noise_levels: Literal["uniform", "pi0"] = "pi0"
    """How training draws the noise level: uniform on [0, 1], or π0's Beta(1.5, 1) on [0.001, 1], which favours noise."""
    num_draws: int = 1
    """Noise draws per encoded observation: the expectation is the same, the gradient less noisy, the backbone's cost
    shared."""
    num_sampling_steps: int = 10
    """Euler steps when acting."""

    def __post_init__(self) -> None:
        if self.num_draws < 1 or self.num_sampling_steps < 1:
            raise ValueError("objective.num_draws and objective.num_sampling_steps must be at least 1")

    @property
    def has_second_level(self) -> bool:
        return False

    def draw(self, actions_BHA: Tensor, keys: DrawKeys) -> Draw:
        uniform_B, noise_BHA = keys.draw(self.num_draws, tuple(actions_BHA.shape[1:]), actions_BHA.device)
        level_B = uniform_B
        if self.noise_levels == "pi0":
            level_B = 0.001 + 0.999 * uniform_B ** (2 / 3)  # u^(2/3) is distributed as Beta(1.5, 1)
        return Draw(noise_BHA=noise_BHA, noise_level_B=level_B)

    def loss(self, expert: BoundExpert, actions_BHA: Tensor, valid_BHA: Tensor, draw: Draw) -> Loss:
        expert, actions_BHA, valid_BHA = fanned_out(expert, actions_BHA, valid_BHA, draw)
        level_B11 = draw.noise_level_B[:, None, None]
        x_BHA = (1 - level_B11) * actions_BHA + level_B11 * draw.noise_BHA
        velocity_BHA = expert(x_BHA, draw.noise_level_B)
        error_BHA = velocity_BHA - (draw.noise_BHA - actions_BHA)
        return Loss(entries_BHA=error_BHA.square(), weight_BHA=valid_BHA.to(error_BHA.dtype), metrics={})

    def sample(self, expert: BoundExpert, noise_BHA: Tensor) -> Tensor:
        x_BHA = noise_BHA
        for step in range(self.num_sampling_steps):
            level_B = torch.full_like(noise_BHA[:, 0, 0], 1 - step / self.num_sampling_steps)
            x_BHA = x_BHA - expert(x_BHA, level_B) / self.num_sampling_steps
        return x_BHA
