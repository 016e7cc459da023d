"""Every dimension of a cache's states and actions: how its values are spread, and what normalising does to them.

Shape letters: N frames of the cache, D dimensions, G = `NUM_BINS`.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..cache import Cache
from ..normalise import NEAR_CONSTANT, FieldStatistics, Normaliser

NUM_BINS = 60
CLIP_TOLERANCE = 1e-5
"""Normalised units: a value that is q01 or q99 itself is not outside."""


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One number of the state or of the action, over all frames of the cache, in raw units."""

    name: str
    mean: float
    """This and the next five are the cache's statistics: of its training episodes."""
    std: float
    min: float
    q01: float
    q99: float
    max: float
    bins_G: np.ndarray
    """Frames (of training and validation) in each of equally wide bins."""
    edges: tuple[float, float]
    """Where the first bin begins and the last one ends: the least and the largest value of all frames."""
    clipped_share: float
    """Of all frames, those outside [-1, 1] after quantile normalisation."""
    farthest: float
    """The largest absolute value after quantile normalisation."""

    @property
    def is_constant(self) -> bool:
        return self.edges[0] == self.edges[1]

    @property
    def is_nearly_constant(self) -> bool:
        """Its q01 to q99 is too narrow to be scaled: the quantile normaliser passes it through."""
        return (self.q99 - self.q01) / 2 < NEAR_CONSTANT


def state_dimensions(cache: Cache) -> list[Dimension]:
    return _dimensions(cache.state_NS, cache.robot.state_names, cache.statistics.state)


def action_dimensions(cache: Cache) -> list[Dimension]:
    return _dimensions(cache.actions_NA, cache.robot.action_names, cache.statistics.actions)


def _dimensions(rows_ND: np.ndarray, names: tuple[str, ...], statistics: FieldStatistics) -> list[Dimension]:
    """One column in memory at a time. `statistics` are a cache's, so whole."""
    columns = {name: getattr(statistics, name) for name in ("mean", "std", "min", "q01", "q99", "max")}
    return [
        _dimension(names[d], np.array(rows_ND[:, d]), {name: values[d] for name, values in columns.items()})
        for d in range(rows_ND.shape[1])
    ]


def _dimension(name: str, values_N: np.ndarray, numbers: dict[str, float]) -> Dimension:
    low, high = float(values_N.min()), float(values_N.max())
    quantiles = FieldStatistics(q01=(numbers["q01"],), q99=(numbers["q99"],), count=0)
    normalised_N = Normaliser(quantiles, "quantile")(torch.from_numpy(values_N)).abs().numpy()
    bins_G, _ = np.histogram(values_N, bins=NUM_BINS, range=(low, high))
    return Dimension(
        name=name,
        **numbers,
        bins_G=bins_G,
        edges=(low, high),
        clipped_share=float((normalised_N > 1 + CLIP_TOLERANCE).mean()),
        farthest=float(normalised_N.max()),
    )
