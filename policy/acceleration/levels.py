"""The levels at which an objective calls the expert when it samples, and what the expert computes from them, once and for all.

An objective asks for the same levels at every decision, whatever it is shown. Everything an expert computes from a level alone (its
embedding, the modulations of all adaptive norms: for π0.5 a quarter of the weights that a step reads) is therefore a constant."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..experts.expert import LevelFeatures, SplitExpert
from ..objectives.objective import Objective

Evaluate = Callable[[SplitExpert, Tensor, LevelFeatures], Tensor]
"""`SplitExpert.evaluate`, perhaps compiled."""
Level = tuple[Tensor, Tensor | None]
"""Noise level and second level of one call, of one row: (1,) each."""


def levels_of(objective: Objective, noise_shape: tuple[int, ...], device: torch.device) -> list[Level]:
    """Of every call that `objective.sample` makes for noise of (B, *noise_shape), in order.

    Raises ValueError for an objective whose levels differ from row to row or with what it is shown."""
    noise_BHA = torch.zeros(2, *noise_shape, device=device)
    asked = []
    for answer in (0.0, 1.0):
        listener = _Listener(answer)
        objective.sample(listener, noise_BHA)
        asked.append(listener.levels)
    if len(asked[0]) != len(asked[1]) or not all(map(_are_equal, *asked)):
        raise ValueError("this objective's noise levels depend on what it is shown")
    return [(level_B[:1], None if second_B is None else second_B[:1]) for level_B, second_B in asked[0]]


def _are_equal(one: Level, other: Level) -> bool:
    """Whether both calls, in both of their rows, had the same levels."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return all(bool((torch.cat([a, b]) == a[0]).all()) for a, b in pairs)


class _Listener:
    """Stands in for a bound expert; see `BoundExpert`."""

    def __init__(self, answer: float) -> None:
        self.answer = answer
        self.levels: list[Level] = []

    def fan_out(self, num_candidates: int) -> "_Listener":
        return self

    def __call__(self, x_BHA: Tensor, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> Tensor:
        self.levels.append((noise_level_B, second_level_B))
        return torch.full_like(x_BHA, self.answer)


class AtKnownLevels:
    """A bound expert whose every call takes the next of the `features`; see `BoundExpert`. Good for one sampling."""

    def __init__(self, bound: SplitExpert, features: Iterable[LevelFeatures], evaluate: Evaluate) -> None:
        self.bound = bound
        self.evaluate = evaluate
        self.remaining: Iterator[LevelFeatures] = iter(features)

    def fan_out(self, num_candidates: int) -> "AtKnownLevels":
        return AtKnownLevels(self.bound.fan_out(num_candidates), self.remaining, self.evaluate)

    def __call__(self, x_BHA: Tensor, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> Tensor:
        return self.evaluate(self.bound, x_BHA, next(self.remaining))
