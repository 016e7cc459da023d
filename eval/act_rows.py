"""`predictions.csv` and `errors.csv`: what policies predicted beside what was demonstrated, and how far apart they are.

Of actions that lie beyond an episode's end there is nothing to compare with; they are in neither file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

PREDICTIONS_NAME = "predictions.csv"
ERRORS_NAME = "errors.csv"
SMALLEST_DEVIATION = 1e-6
"""As in training's `action_error`: a dimension that never changed would make every error infinite."""


@dataclass(frozen=True, kw_only=True)
class PredictionRow:
    """One step of one chunk. Fields are the first columns, in their order; after them, in raw units and for each of the robot's action
    dimensions, `predicted_<dimension>`, `demonstrated_<dimension>` and `spread_<dimension>`: the standard deviation of the chunks that
    were drawn, empty where only one was."""

    policy: str
    """`RUN/CHECKPOINT`."""
    task: str
    episode: int
    """As `--episode` has it."""
    key: str
    """The source's own name of the episode: `<file>/<demo>`."""
    frame: int
    """Of the decision, from the episode's start."""
    horizon_step: int
    """Of the chunk, from 0; the demonstrated action is that of frame + horizon_step."""
    decision_ms: float
    """Of the whole chunk, the same in all its rows."""


@dataclass(frozen=True, kw_only=True)
class ErrorRow:
    """One action dimension at one step of the chunk, over all decisions of one policy. Fields are the columns, in their order."""

    policy: str
    """`RUN/CHECKPOINT`."""
    weights_hash: str
    objective: str
    num_sampling_steps: int
    sampling: str
    """The policy's sampling settings, as JSON with sorted keys, as in `episodes.csv`."""
    num_candidates: int
    """Chunks drawn at every frame."""
    seed: int
    dimension: str
    horizon_step: int
    """Of the chunk, from 0."""
    num_compared: int
    """Decisions whose demonstration goes on for so long."""
    error: float
    """Mean absolute difference from the demonstrated action, raw units."""
    error_in_deviations: float
    """The same over `deviation`."""
    predicted_size: float
    """Mean absolute predicted action, raw units."""
    demonstrated_size: float
    """Mean absolute demonstrated action, raw units."""
    spread: float | None
    """Mean standard deviation of the chunks drawn at one frame, raw units; None where only one was."""
    deviation: float
    """Standard deviation of the dimension: the same for all policies of the file."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Over all steps of all chunks; of one dimension or of all."""

    error: float
    """Mean absolute difference, raw units; of several dimensions a mixture of units that says nothing."""
    error_in_deviations: float
    spread_in_deviations: float | None
    """None where one chunk was drawn for a decision."""
    magnitude: float
    """Predicted mean size over demonstrated: below 1 for a timid policy; NaN where no motion was demonstrated."""


def prediction_rows(
    of_chunk: Mapping[str, Any], candidates_KHA: np.ndarray, demonstrated_HA: np.ndarray
) -> "pd.DataFrame":
    """Rows of one decision, one for each demonstrated step; the first candidate is what was predicted, and `of_chunk` has the columns that
    the rows share. Actions stand in columns 0 to 3A - 1, until `predictions_of` names them."""
    import pandas as pd

    num_steps = len(demonstrated_HA)
    spread_HA = candidates_KHA.std(axis=0) if len(candidates_KHA) > 1 else np.full_like(candidates_KHA[0], np.nan)
    values = np.concatenate([candidates_KHA[0, :num_steps], demonstrated_HA, spread_HA[:num_steps]], axis=1)
    shared = pd.DataFrame({**of_chunk, "horizon_step": range(num_steps)})
    return pd.concat([shared, pd.DataFrame(values)], axis=1)


def predictions_of(chunks: "Sequence[pd.DataFrame]", names: Sequence[str]) -> "pd.DataFrame":
    """All rows, with the columns of `predictions.csv`."""
    import pandas as pd

    columns = {k: f"predicted_{name}" for k, name in enumerate(names)}
    columns |= {len(names) + k: f"demonstrated_{name}" for k, name in enumerate(names)}
    columns |= {2 * len(names) + k: f"spread_{name}" for k, name in enumerate(names)}
    order = [field.name for field in fields(PredictionRow)] + list(columns.values())
    return pd.concat(chunks, ignore_index=True).rename(columns=columns)[order]


def errors_of(
    predictions: "pd.DataFrame",
    names: Sequence[str],
    deviation_A: np.ndarray,
    of_policies: Mapping[str, Mapping[str, Any]],
) -> list[ErrorRow]:
    """A row for every policy, dimension and step of a chunk; `of_policies`: the columns that say what a policy is."""
    rows = []
    for policy, columns in of_policies.items():
        of_policy = predictions[predictions["policy"] == policy]
        for name, deviation in zip(names, deviation_A, strict=True):
            for _, group in of_policy.groupby("horizon_step"):
                predicted = group[f"predicted_{name}"].to_numpy(np.float64)
                demonstrated = group[f"demonstrated_{name}"].to_numpy(np.float64)
                error = float(np.abs(predicted - demonstrated).mean())
                spread = float(group[f"spread_{name}"].to_numpy(np.float64).mean())
                rows.append(
                    ErrorRow(
                        policy=policy,
                        **columns,
                        dimension=name,
                        horizon_step=int(group["horizon_step"].iloc[0]),
                        num_compared=len(group),
                        error=error,
                        error_in_deviations=error / max(float(deviation), SMALLEST_DEVIATION),
                        predicted_size=float(np.abs(predicted).mean()),
                        demonstrated_size=float(np.abs(demonstrated).mean()),
                        spread=None if np.isnan(spread) else spread,
                        deviation=float(deviation),
                    )
                )
    return rows


def score(rows: Sequence[ErrorRow]) -> Score:
    """Of one policy's rows: of one dimension, or of all. Then every size counts over its deviation and dimensions count alike, which is
    `action_error` and `action_magnitude` as training measures them."""
    counts = np.array([row.num_compared for row in rows], np.float64)
    scale = np.array([max(row.deviation, SMALLEST_DEVIATION) for row in rows])
    predicted = float((counts * [row.predicted_size for row in rows] / scale).sum())
    demonstrated = float((counts * [row.demonstrated_size for row in rows] / scale).sum())
    in_deviations = float((counts * [row.error_in_deviations for row in rows]).sum() / counts.sum())
    spreads = [row.spread for row in rows if row.spread is not None]
    return Score(
        error=float((counts * [row.error for row in rows]).sum() / counts.sum()),
        error_in_deviations=in_deviations,
        spread_in_deviations=float((counts * spreads / scale).sum() / counts.sum()) if spreads else None,
        magnitude=predicted / demonstrated if demonstrated > 0 else float("nan"),
    )


def csv_of(table: "pd.DataFrame") -> bytes:
    text: str = table.to_csv(index=False)
    return text.encode()


def errors_table(rows: Sequence[ErrorRow]) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame([asdict(row) for row in rows], columns=[field.name for field in fields(ErrorRow)])
