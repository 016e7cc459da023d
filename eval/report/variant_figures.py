"""Figures over the variants of several runs, each an SVG as a data URI; a run has the same colour in every line plot."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...data.plotting import AMBER, BLUE, GREY, INK, RED
from .candidates import averages
from .figures import LINES, PARTS, legend, legend_height_in, line_looks, shortened, svg, whole_steps

MODES = (RED, AMBER, "#7b5ea7", BLUE, "#8c6d46", GREY)
"""Of failure modes, the most frequent first."""


def success_bars(table: pd.DataFrame) -> str:
    """Success with 95 % intervals: a row a variant, a panel a suite; `table` has suite, variant and `success_by`'s columns."""
    suites, names = list(dict.fromkeys(table["suite"])), list(dict.fromkeys(table["variant"]))
    width_in = max(6.4, _margin_in(names) + 1.75 * len(suites))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(suites), sharey=True, squeeze=False)[0]
        for axes, suite in zip(panels, suites, strict=True):
            shown = table[table["suite"] == suite]
            places = [names.index(name) for name in shown["variant"]]
            rates = 100 * shown["success_rate"].astype(float)
            axes.barh(places, rates, color=[LINES[place % len(LINES)] for place in places], height=0.58, alpha=0.85)
            arms = [rates - 100 * shown["low"], 100 * shown["high"] - rates]
            axes.errorbar(rates, places, xerr=arms, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
            axes.set(xlim=(0, 107), xticks=[0, 50, 100], xlabel="success, %")
            axes.set_title(suite.replace("_", " "), loc="left", fontsize=10)
        _rows_named(panels[0], names)

    return svg(draw, (width_in, 0.95 + 0.34 * len(names)))


def success_over_training(tables: Mapping[str, pd.DataFrame]) -> str:
    """Success on the selection half over training steps, a line a run, with 95 % intervals; raw and averaged weights apart."""
    num_lines = sum(averages(table).nunique() for table in tables.values())

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for look, (name, table) in zip(line_looks(), tables.items(), strict=False):
            for fill, (kind, line) in zip(("full", "none"), table.groupby(averages(table)), strict=False):
                rates = 100 * line["success_rate"].astype(float)
                arms = [rates - 100 * line["low"], 100 * line["high"] - rates]
                label = shortened(name) + (f", {kind}" if kind else "")
                axes.errorbar(
                    line["step"].astype(int),
                    rates,
                    yerr=arms,
                    marker="o",
                    fillstyle=fill,
                    ms=5,
                    capsize=2,
                    elinewidth=0.8,
                    label=label,
                    **look,
                )
        axes.set(xlabel="training step", ylabel="success on the selection half, %", ylim=(-3, 103))
        whole_steps(axes)
        legend(axes, num_lines)

    return svg(draw, (6.4, 3.4 + legend_height_in(num_lines)))


def latency_and_smoothness(rows: pd.DataFrame) -> str:
    """How the episodes of each variant spread: forward of a decision, and mean change of successive actions; grouped and coloured by
    objective. `rows` has variant and objective; boxes hold the middle half of the episodes, whiskers 5 % to 95 %."""
    pairs = rows[["objective", "variant"]].drop_duplicates().sort_values("objective", kind="stable")
    objectives = sorted(set(pairs["objective"]))
    names = [f"{shortened(variant, 22)} · {objective}" for objective, variant in pairs.itertuples(index=False)]
    measures = {
        "policy_ms_mean": "forward of a decision, ms",
        "smoothness": "mean change of successive actions",
    }

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (column, label) in zip(panels, measures.items(), strict=True):
            for place, (objective, variant) in enumerate(pairs.itertuples(index=False)):
                values = rows.loc[(rows["variant"] == variant), column].dropna()
                if len(values):
                    colour = LINES[objectives.index(objective) % len(LINES)]
                    axes.boxplot(
                        [values],
                        positions=[place],
                        orientation="horizontal",
                        widths=0.5,
                        whis=(5, 95),
                        showfliers=False,
                        patch_artist=True,
                        boxprops={"facecolor": colour, "alpha": 0.45, "edgecolor": colour},
                        medianprops={"color": INK},
                        manage_ticks=False,
                    )
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
        _rows_named(panels[0], names)

    return svg(draw, (max(8.4, _margin_in(names) + 6), 0.8 + 0.36 * len(names)))


def time_bars(table: pd.DataFrame) -> str:
    """Seconds of a mean episode by what they were spent on, a row a variant: `variant_tables.time_by_variant`."""
    parts = {name: table[name] for name in PARTS}
    return _stacked(table["variant"].tolist(), parts, list(PARTS.values()), "seconds per episode (mean)")


def failure_bars(table: pd.DataFrame) -> str:
    """Failed episodes by mode as a share of all, a row a variant: `variant_tables.failure_modes`."""
    modes = [str(name) for name in table if name not in ("variant", "episodes")]
    parts = {mode: 100 * table[mode] / table["episodes"] for mode in modes}
    return _stacked(table["variant"].tolist(), parts, MODES, "failed episodes, % of all")


def _stacked(names: Sequence[str], parts: Mapping[str, pd.Series], colours: Sequence[str], label: str) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        left = pd.Series(0.0, index=range(len(names)))
        for k, (part, values) in enumerate(parts.items()):
            widths = values.astype(float).reset_index(drop=True)
            axes.barh(range(len(names)), widths, left=left, height=0.58, color=colours[k % len(colours)], label=part)
            left = left + widths
        axes.set(xlabel=label, xlim=(0, max(left.max() * 1.02, 1e-9)))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, columnspacing=1.2, handlelength=1)
        _rows_named(axes, names)

    return svg(draw, (6.4, 1.35 + 0.34 * len(names)))


def _rows_named(axes: Axes, names: Sequence[str]) -> None:
    """The rows' names on the left, the first on top."""
    axes.set_yticks(range(len(names)), [shortened(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    for panel in axes.figure.axes:
        panel.grid(axis="y", visible=False)
        panel.tick_params(axis="y", length=0)


def _margin_in(names: Sequence[str]) -> float:
    return 0.078 * max(len(shortened(name)) for name in names) + 0.3
