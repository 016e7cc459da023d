"""`vlatune act`'s pictures: predicted chunks over the demonstration, and errors by dimension and step. Equal numbers give equal bytes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from ..data.plotting import AMBER, BLUE, INK, png
from .act_rows import ErrorRow
from .report.figures import HEAT, shortened, whole_steps

if TYPE_CHECKING:
    import pandas as pd

NUM_COLUMNS = 2
MOST_NUMBERED_STEPS = 12
"""Cells of longer chunks are too narrow for their numbers."""


def actions_figure(
    predictions: "pd.DataFrame",
    demonstrated_NA: np.ndarray,
    names: Sequence[str],
    policies: Sequence[str],
    *,
    title: str,
) -> bytes:
    """A PNG of one episode: a panel for each action dimension over time, with what was demonstrated and, from every decision, the chunk
    that a policy predicted, begun by a dot; where several chunks were drawn, as broad as they lie apart."""
    num_rows = -(-len(names) // NUM_COLUMNS)

    def draw(figure: Figure) -> None:
        axes_P = figure.subplots(num_rows, NUM_COLUMNS, squeeze=False, sharex=True).ravel()
        for a, (axes, name) in enumerate(zip(axes_P, names, strict=False)):
            axes.plot(demonstrated_NA[:, a], color=INK, lw=0.9, zorder=3, label="demonstrated")
            for policy, colour in zip(policies, (BLUE, AMBER), strict=False):
                rows = predictions[predictions["policy"] == policy]
                starts = rows[rows["horizon_step"] == 0]
                axes.plot(*_segments(rows, f"predicted_{name}"), color=colour, lw=1.4, alpha=0.8, label=policy)
                if rows[f"spread_{name}"].notna().any():
                    frames, middle = _segments(rows, f"predicted_{name}")
                    _, spread = _segments(rows, f"spread_{name}")
                    axes.fill_between(frames, middle - spread, middle + spread, color=colour, alpha=0.2, lw=0)
                axes.plot(starts["frame"], starts[f"predicted_{name}"], color=colour, ls="", marker="o", ms=3)
            axes.set_title(name, loc="left", fontsize=10)
            if a + NUM_COLUMNS >= len(names):  # nothing below it
                axes.tick_params(labelbottom=True)
                axes.set_xlabel("frame of the demonstration")
            whole_steps(axes)
        for axes in axes_P[len(names) :]:
            axes.set_axis_off()
        figure.suptitle(shortened(title, 110), x=0.01, ha="left", fontsize=11)
        figure.legend(*axes_P[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False)

    return png(draw, (11, 1.3 + 1.6 * num_rows))


def errors_figure(rows: Sequence[ErrorRow], names: Sequence[str], policies: Sequence[str]) -> bytes:
    """A PNG: a heat map for each policy, dimensions by steps of the chunk, all in one scale."""
    largest = max(row.error_in_deviations for row in rows) or 1.0
    num_steps = 1 + max(row.horizon_step for row in rows)

    def draw(figure: Figure) -> None:
        axes_P = figure.subplots(1, len(policies), squeeze=False, sharey=True)[0]
        for axes, policy in zip(axes_P, policies, strict=True):
            error_AH = np.full((len(names), num_steps), np.nan)
            for row in rows:
                if row.policy == policy:
                    error_AH[names.index(row.dimension), row.horizon_step] = row.error_in_deviations
            image = axes.imshow(error_AH, cmap=HEAT, vmin=0, vmax=largest, aspect="auto")
            for (a, h), error in np.ndenumerate(error_AH):
                if num_steps <= MOST_NUMBERED_STEPS and np.isfinite(error):
                    colour = "white" if error > 0.6 * largest else INK
                    axes.text(h, a, f"{error:.2f}", ha="center", va="center", fontsize=8, color=colour)
            axes.set_title(shortened(policy, 48), loc="left", fontsize=10)
            axes.set_yticks(range(len(names)), names)
            whole_steps(axes)
            axes.set_xlabel("step of the chunk")
            axes.grid(visible=False)
        figure.colorbar(image, ax=axes_P, label="mean absolute error, deviations", pad=0.01)

    return png(draw, (2 + 4.6 * len(policies), 1.3 + 0.36 * len(names)))


def _segments(rows: "pd.DataFrame", column: str) -> tuple[np.ndarray, np.ndarray]:
    """Frames and values of every chunk, with a gap after each."""
    frames: list[float] = []
    values: list[float] = []
    for _, chunk in rows.groupby("frame"):
        frames += [*(chunk["frame"] + chunk["horizon_step"]), np.nan]
        values += [*chunk[column], np.nan]
    return np.array(frames), np.array(values)
