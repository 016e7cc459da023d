"""The bimodal study's summary, figure and findings, made from its rows and, for the figure, from the paths of the first seed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from ...data.files import write_whole
from ...data.plotting import INK
from .figures import INVALID, MUTED, SHADE, VALID, save_figure
from .intervals import Interval, mean_over_seeds, rate_over_seeds
from .methods import METHODS
from .prose import listed, percent, rates
from .tables import write_csv
from .two_ways import GOAL, GOAL_RADIUS, OBSTACLE, OBSTACLE_RADIUS, is_clear, reaches_goal

LABELS = {"demonstrations": "demonstrations", **{name: method.label for name, method in METHODS.items()}}
"""In the order of the figure."""
NUM_DRAWN = 60
"""Paths a panel."""
FEW_VALID = 0.05
"""With fewer valid paths than this share a panel does not say which side they take."""
COUNTS = {
    "valid": ("num_valid", "num_paths"),
    "right": ("num_right", "num_valid"),
    "both_ways": ("num_both_ways", "num_starts"),
}
"""Rates of the summary -> the columns that they are made from."""
MEANS = ("distance", "spread", "energy_distance")

Group = tuple[str, float]
"""(objective, demonstrated share)."""
Summary = dict[Group, dict[str, Interval]]
"""Metric -> mean over seeds with its interval."""
LoadPaths = Callable[[str, float, int], np.ndarray]
"""(objective, demonstrated share, seed) -> (N, 1 + H, 2)."""


def write_report(out: Path, records: Sequence[Mapping[str, Any]], load_paths: LoadPaths) -> None:
    """summary.csv, figure.png and findings.md."""
    summary = summarise(records)
    lines = []
    for (name, share), metrics in summary.items():
        line: dict[str, Any] = {"objective": name, "share_right": share, "seeds": len(_of(records, name, share))}
        for metric, interval in metrics.items():
            line |= {metric: interval.mean, f"{metric}_low": interval.low, f"{metric}_high": interval.high}
        lines.append(line)
    write_csv(out / "summary.csv", lines)
    shares = sorted({share for _, share in summary})
    names = [name for name in LABELS if any((name, share) in summary for share in shares)]
    first_seed = {group: min(record["seed"] for record in _of(records, *group)) for group in summary}
    paths = {group: load_paths(*group, first_seed[group]) for group in summary}
    size_in = (1.5 * len(names) + 0.3, 2.0 * len(shares) + 0.5)
    save_figure(out / "figure.png", size_in, lambda figure: _draw(figure, names, shares, summary, paths))
    write_whole(out / "findings.md", (findings(records, summary) + "\n").encode())


def summarise(records: Sequence[Mapping[str, Any]]) -> Summary:
    """Columns of summary.csv: the objective, the demonstrated share, how many seeds; then each metric's mean over seeds with
    `_low` and `_high`, its 95 % interval: Student's t over seeds, for rates no narrower than Wilson's over all that was counted."""
    summary: Summary = {}
    for share in sorted({record["share_right"] for record in records}):
        for name in LABELS:
            if rows := _of(records, name, share):
                counted = {
                    metric: rate_over_seeds([row[part] for row in rows], [row[whole] for row in rows])
                    for metric, (part, whole) in COUNTS.items()
                }
                summary[name, share] = counted | {
                    metric: mean_over_seeds([row[metric] for row in rows]) for metric in MEANS
                }
    return summary


def findings(records: Sequence[Mapping[str, Any]], summary: Summary) -> str:
    """One paragraph, every number from the rows."""
    seeds = len({record["seed"] for record in records})
    counted = f"{seeds} training seed{'s' if seeds > 1 else ''}, {records[0]['num_paths']:,} paths from each"
    sentences = [f"Left or right: {counted}; means over seeds with 95 % intervals."]
    for share in sorted({share for _, share in summary}):
        groups = {name: metrics for (name, s), metrics in summary.items() if s == share and name != "demonstrations"}
        valid = {LABELS[name]: metrics["valid"] for name, metrics in groups.items()}
        both = {LABELS[name]: metrics["both_ways"] for name, metrics in groups.items()}
        right = {LABELS[name]: m["right"] for name, m in groups.items() if m["both_ways"].mean >= 0.5}
        one_way = [LABELS[name] for name, metrics in groups.items() if metrics["both_ways"].mean < 0.5]
        sentences.append(f"With {percent(share)} of the demonstrations on the right, valid paths are {rates(valid)}.")
        sentences.append(f"Starts from which valid paths lead both ways: {rates(both)}.")
        if right:
            sentences.append(f"Of the valid paths, {rates(right)} go right.")
        if one_way:
            sentences.append(f"From most starts one side at most is left with {listed(one_way)}.")
    return " ".join(sentences)


def _of(records: Sequence[Mapping[str, Any]], name: str, share: float) -> list[Mapping[str, Any]]:
    return [record for record in records if record["objective"] == name and record["share_right"] == share]


def _draw(
    figure: Figure,
    names: Sequence[str],
    shares: Sequence[float],
    summary: Summary,
    paths: Mapping[Group, np.ndarray],
) -> None:
    panels = figure.subplots(len(shares), len(names), squeeze=False)
    for row, share in enumerate(shares):
        for column, name in enumerate(names):
            axes = panels[row, column]
            _draw_panel(axes, paths.get((name, share)))
            if row == 0:
                axes.set_title(LABELS[name], fontsize=10, fontweight="bold", color=INK)
            if (name, share) in summary:
                metrics = summary[name, share]
                words = f"valid {percent(metrics['valid'].mean)}"
                if metrics["valid"].mean >= FEW_VALID:
                    words += f", right {percent(metrics['right'].mean)}"
                axes.set_xlabel(words, fontsize=8, labelpad=2)
        panels[row, 0].set_ylabel(f"{percent(share)} of demos go right", fontsize=9)
    handles = [
        Line2D([], [], color=VALID, lw=1.5, label="valid path"),
        Line2D([], [], color=INVALID, lw=1.5, label="crosses the obstacle or misses the goal"),
        Line2D([], [], color=MUTED, marker="o", lw=0, ms=3, label="start"),
        Line2D([], [], color=INK, marker="o", lw=0, ms=7, mfc="none", label="goal"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)


def _draw_panel(axes: Axes, points_NP2: np.ndarray | None) -> None:
    axes.set(xlim=(-1.12, 1.12), ylim=(-1.25, 1.3), xticks=[], yticks=[], aspect="equal")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.add_patch(Circle(tuple(OBSTACLE), OBSTACLE_RADIUS, color=SHADE, lw=0))
    if points_NP2 is not None:
        some = points_NP2[np.linspace(0, len(points_NP2) - 1, min(NUM_DRAWN, len(points_NP2))).astype(int)]
        valid = is_clear(some[:, 0], some[:, 1:]) & reaches_goal(some[:, 1:])
        for colour, chosen in ((VALID, valid), (INVALID, ~valid)):
            axes.add_collection(LineCollection(list(some[chosen]), colors=colour, linewidths=0.7, alpha=0.5))
        axes.plot(*some[:, 0].T, ls="", marker="o", ms=1.6, color=MUTED)
    axes.add_patch(Circle(tuple(GOAL), GOAL_RADIUS, fill=False, ec=INK, lw=1, zorder=3))
