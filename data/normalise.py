"""Statistics of states and actions, and the pair forward / inverse that uses them.

The same numbers are written into the cache and into every checkpoint. Shape letters: N rows, D dimensions.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from .episodes import DataError
from .files import json_bytes, write_whole

NormaliserMode = Literal["mean_std", "quantile", "min_max", "identity"]

NEAR_CONSTANT = 1e-4
"""A dimension whose scale is smaller (in raw units) is centred and not scaled: dividing by it would blow up noise."""


@dataclass(frozen=True, kw_only=True)
class FieldStatistics:
    """Of every dimension of the state or of the action, in raw units. Those of our caches are whole; a public checkpoint has
    what its normalisation needs."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """Of the population (divided by the count)."""
    min: tuple[float, ...] | None = None
    max: tuple[float, ...] | None = None
    q01: tuple[float, ...] | None = None
    """1 % quantile, linearly interpolated."""
    q99: tuple[float, ...] | None = None
    """99 % quantile."""
    count: int
    """Rows; 0 where a public checkpoint does not say."""

    @property
    def num_dims(self) -> int:
        """Raises ValueError where nothing is known."""
        known = (self.mean, self.std, self.min, self.max, self.q01, self.q99)
        for values in known:
            if values is not None:
                return len(values)
        raise ValueError("these statistics are empty: give a normalisation.json or a cache's statistics.json")

    @classmethod
    def compute(cls, rows_ND: np.ndarray, row_index: np.ndarray | None = None) -> Self:
        """Exact, in float64, one column in memory at a time; `rows_ND` may be a memory map.

        `row_index` chooses the rows (indices or a mask). Raises `ValueError` when no row is left."""
        mean: list[float] = []
        std: list[float] = []
        low: list[float] = []
        high: list[float] = []
        quantiles: list[tuple[float, float]] = []
        count = len(rows_ND) if row_index is None else len(np.arange(len(rows_ND))[row_index])
        if count == 0:
            raise ValueError("statistics of no rows: there must be at least one frame")
        for d in range(rows_ND.shape[1]):
            column_N = np.asarray(rows_ND[:, d], dtype=np.float64)
            if row_index is not None:
                column_N = column_N[row_index]
            mean.append(float(column_N.mean()))
            std.append(float(column_N.std()))
            low.append(float(column_N.min()))
            high.append(float(column_N.max()))
            q01, q99 = np.quantile(column_N, (0.01, 0.99))
            quantiles.append((float(q01), float(q99)))
        return cls(
            mean=tuple(mean),
            std=tuple(std),
            min=tuple(low),
            max=tuple(high),
            q01=tuple(q01 for q01, _ in quantiles),
            q99=tuple(q99 for _, q99 in quantiles),
            count=count,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        columns = {
            name: None if item is None else tuple(map(float, item)) for name, item in value.items() if name != "count"
        }
        return cls(**columns, count=int(value["count"]))


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What the normalisers of a policy are made from."""

    state: FieldStatistics
    actions: FieldStatistics

    @classmethod
    def compute(cls, state_NS: np.ndarray, actions_NA: np.ndarray, row_index: np.ndarray | None = None) -> Self:
        return cls(
            state=FieldStatistics.compute(state_NS, row_index), actions=FieldStatistics.compute(actions_NA, row_index)
        )

    def save(self, path: Path) -> None:
        write_whole(path, json_bytes({"state": self.state.to_json(), "actions": self.actions.to_json()}))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises `DataError` when the file is missing or is something else."""
        try:
            value = json.loads(path.read_text())
            return cls(
                state=FieldStatistics.from_json(value["state"]), actions=FieldStatistics.from_json(value["actions"])
            )
        except FileNotFoundError:
            raise DataError(f"there are no statistics at {path}; `vlatune prepare` writes them") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} does not hold statistics ({error!r}); run `vlatune prepare` again") from error


class Normaliser(torch.nn.Module):
    """Raw units to about unit range and back, over the last axis; always in float32, whatever the rest of the model is.

    `mean_std`: (x - mean) / std. `quantile`: q01 .. q99 to -1 .. 1. `min_max`: min .. max to -1 .. 1. `identity`: x.
    Dimensions that hardly vary (scale under `NEAR_CONSTANT`) are centred but not scaled."""

    centre_D: Tensor
    scale_D: Tensor

    def __init__(self, statistics: FieldStatistics, mode: NormaliserMode, near_constant: float = NEAR_CONSTANT) -> None:
        """Raises `ValueError` for another mode, or if the statistics lack what the mode needs."""
        super().__init__()
        self.mode = mode
        match mode:
            case "mean_std":
                centre, scale = _needed(statistics, mode, "mean", "std")
            case "quantile":
                centre, scale = _middle_and_half_width(*_needed(statistics, mode, "q01", "q99"))
            case "min_max":
                centre, scale = _middle_and_half_width(*_needed(statistics, mode, "min", "max"))
            case "identity":
                centre, scale = (), ()  # whatever the width
            case _:
                raise ValueError(f"normalisation mode is {mode!r}; it can be {', '.join(get_args(NormaliserMode))}")
        self._centre = centre
        self._scale = tuple(value if value >= near_constant else 1.0 for value in scale)
        self._fill(torch.empty(0).device)  # torch's current default device: `meta` under init-empty contexts

    def _fill(self, device: torch.device) -> None:
        """(Re)make the buffers on `device` from the Python numbers: they are exact in any dtype history."""
        centre = torch.tensor(self._centre or (0.0,), dtype=torch.float32, device=device)
        scale = torch.tensor(self._scale or (1.0,), dtype=torch.float32, device=device)
        self.register_buffer("centre_D", centre, persistent=False)
        self.register_buffer("scale_D", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Raw units -> normalised, float32."""
        return (x.float() - self.centre_D) / self.scale_D

    def inverse(self, x: Tensor) -> Tensor:
        """Normalised -> raw units, float32."""
        return x.float() * self.scale_D + self.centre_D

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a move to another device and ignore a change of dtype (`model.to(torch.bfloat16)`)."""
        self._fill(fn(self.centre_D).device)
        return self

    def extra_repr(self) -> str:
        return f"{self.mode}, {len(self._centre)} dimensions"


def _needed(
    statistics: FieldStatistics, mode: str, first: str, second: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    values = getattr(statistics, first), getattr(statistics, second)
    if None in values:
        there = [name for name, value in asdict(statistics).items() if value is not None and name != "count"]
        raise ValueError(
            f"normalisation {mode!r} needs {first} and {second}, and the statistics have {', '.join(there) or 'nothing'}"
        )
    return values


def _middle_and_half_width(
    low: tuple[float, ...], high: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    pairs = list(zip(low, high, strict=True))
    return tuple((a + b) / 2 for a, b in pairs), tuple((b - a) / 2 for a, b in pairs)
