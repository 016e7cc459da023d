"""Regression: one deterministic call of the expert, compared with the demonstrated chunk.

The best answer to a squared error is the mean of the actions seen in a situation, to an absolute error their median, entry by
entry: where demonstrations go left or right, neither need be an action that anyone showed.

The expert's input is constant, zeros at one noise level, so the weights that multiply it (the action tokens' input
projection) get a gradient of zero and keep the values they had, apart from weight decay; the biases beside them are trained.

B batch, H horizon, A action dimensions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..experts.expert import BoundExpert
from .draws import DrawKeys
from .objective import Draw, Loss


@dataclass(frozen=True, kw_only=True)
class Regression:
    """The chunk from one call of the expert; no noise in training or in acting."""

    type: Literal["regression"] = "regression"
    error: Literal["l1", "mse", "huber"] = "l1"
    """What is averaged: the absolute error, the squared error, or Huber's, half the square below `huber_delta` and linear
    above."""
    huber_delta: float = 1.0
    """Where 'huber' turns linear, normalised units."""
    output: Literal["action", "aligned"] = "action"
    """What the expert's output means. 'action': the chunk itself, from a zero query at noise level 0. 'aligned': a velocity v,
    the chunk being `x - v(x, 1)` at the zero query x = 0, noise level 1, where noise has its centre: from an expert pretrained by
    flow matching, training then starts at that expert's own one-step answer. An expert that predicts clean actions (RDT's
    diffusion) has nothing to be aligned by 'aligned'."""

    def __post_init__(self) -> None:
        if self.huber_delta <= 0:
            raise ValueError(f"objective.huber_delta is {self.huber_delta}; it must be more than 0")

    @property
    def has_second_level(self) -> bool:
        return False

    @property
    def num_sampling_steps(self) -> int:
        return 1

    def draw(self, actions_BHA: Tensor, keys: DrawKeys) -> Draw:
        """Nothing is random: the query and its level."""
        return self._query(actions_BHA)

    def loss(self, expert: BoundExpert, actions_BHA: Tensor, valid_BHA: Tensor, draw: Draw) -> Loss:
        """`draw` is not read: training asks what acting asks."""
        predicted_BHA = self._predicted(expert, actions_BHA)
        if self.error == "l1":
            entries_BHA = (predicted_BHA - actions_BHA).abs()
        elif self.error == "mse":
            entries_BHA = (predicted_BHA - actions_BHA).square()
        else:
            entries_BHA = functional.huber_loss(predicted_BHA, actions_BHA, reduction="none", delta=self.huber_delta)
        return Loss(entries_BHA=entries_BHA, weight_BHA=valid_BHA.to(entries_BHA.dtype), metrics={})

    def sample(self, expert: BoundExpert, noise_BHA: Tensor) -> Tensor:
        """Only the shape, dtype and device of `noise` are read."""
        return self._predicted(expert, noise_BHA)

    def _query(self, like_BHA: Tensor) -> Draw:
        level = 1.0 if self.output == "aligned" else 0.0
        return Draw(
            noise_BHA=torch.zeros_like(like_BHA),
            noise_level_B=torch.full_like(like_BHA[:, 0, 0], level),
        )

    def _predicted(self, expert: BoundExpert, like_BHA: Tensor) -> Tensor:
        query = self._query(like_BHA)
        output_BHA = expert(query.noise_BHA, query.noise_level_B)
        return query.noise_BHA - output_BHA if self.output == "aligned" else output_BHA
