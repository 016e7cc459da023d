"""The inspection's figures, each as the bytes of a PNG; equal numbers give equal bytes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plotting import AMBER, BLUE, GREY, INK, RED, png
from .dimensions import NUM_BINS, Dimension
from .survey import PROFILE_POINTS, Survey

LOOK: dict[str, Any] = {"dpi": 110, "font_size": 9}
ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "handlelength": 1.5, "borderaxespad": 0.2}
"""Where a legend hides no line."""
COLUMNS = 4
MOST_TASK_LINES = 20
"""Tasks beyond which their lines would only be a smear."""


def histograms(dimensions: Sequence[Dimension]) -> bytes:
    """One small histogram a dimension: the range that becomes -1 to 1 shaded, mean and std as a dot with arms."""
    rows = -(-len(dimensions) // COLUMNS)

    def draw(figure: Figure) -> None:
        axes_RC = figure.subplots(rows, COLUMNS, squeeze=False)
        for axes, dimension in zip(axes_RC.flat, dimensions, strict=False):
            _histogram(axes, dimension)
        for axes in list(axes_RC.flat)[len(dimensions) :]:
            axes.set_axis_off()

    return png(draw, (11.2, 0.2 + 2.05 * rows), **LOOK)


def over_time(survey: Survey, control_hz: float) -> bytes:
    """The action's norm over an episode's time; when grippers are asked to close, and what fingers do; how long episodes are."""
    time_K = np.linspace(0, 1, PROFILE_POINTS)

    def draw(figure: Figure) -> None:
        left, middle, right = figure.subplots(1, 3)
        groups = list(survey.episodes.reset_index(drop=True).groupby(["suite", "task"]))
        if 1 < len(groups) <= MOST_TASK_LINES:
            for k, (_, of_task) in enumerate(groups):
                label = "each task's median" if k == 0 else None
                left.plot(
                    time_K, np.median(survey.magnitude_EK[of_task.index], axis=0), color=GREY, lw=0.8, label=label
                )
        low_K, middle_K, high_K = np.quantile(survey.magnitude_EK, (0.1, 0.5, 0.9), axis=0)
        left.fill_between(time_K, low_K, high_K, color=BLUE, alpha=0.13, lw=0, label="10 % to 90 % of episodes")
        left.plot(time_K, middle_K, color=BLUE, label="median episode")
        left.set(xlabel="time in the episode", ylabel="norm of the action without gripper")
        left.set_ylim(bottom=0)
        left.legend(**ABOVE)
        middle.plot(time_K, 100 * survey.closed_EK.mean(axis=0), color=RED, label="episodes asking to close, %")
        if survey.opening_EK is not None and survey.opening_EK.max() > 0:
            opening_K = 100 * survey.opening_EK.mean(axis=0) / survey.opening_EK.max()
            middle.plot(time_K, opening_K, color=BLUE, label="fingers' opening, % of the widest (mean)")
        middle.set(xlabel="time in the episode", ylim=(-3, 103))
        middle.legend(**ABOVE)
        length_E = survey.episodes["length"]
        right.hist(length_E, bins=min(40, max(5, length_E.nunique())), color=BLUE, alpha=0.75)
        right.set(xlabel=f"frames of an episode ({control_hz:g} a second)", ylabel="episodes")

    return png(draw, (11.2, 3.3), **LOOK)


def _histogram(axes: Axes, dimension: Dimension) -> None:
    low, high = dimension.edges
    if dimension.is_constant:
        low, high = low - 0.5, high + 0.5
    edges_G = np.linspace(low, high, NUM_BINS + 1)
    axes.axvspan(dimension.q01, dimension.q99, color=BLUE, alpha=0.10, lw=0)
    axes.stairs(dimension.bins_G, edges_G, fill=True, color=BLUE, alpha=0.75)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_ylim(bottom=0.7, top=max(10.0, 6.0 * dimension.bins_G.max()))
    for edge in (dimension.min, dimension.max):
        axes.axvline(edge, color=AMBER, lw=1)
    height = 3.0 * max(1.0, float(dimension.bins_G.max()))
    axes.errorbar([dimension.mean], [height], xerr=[dimension.std], fmt="o", color=INK, ms=3, lw=1, capsize=2)
    colour = RED if dimension.is_constant or dimension.is_nearly_constant else INK
    axes.set_title(
        f"{dimension.name}   clipped {100 * dimension.clipped_share:.1f} %", fontsize=9, loc="left", color=colour
    )
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=5)
