"""The report's figures, each an SVG as a data URI: the page needs no other file and no network."""

import base64
import io
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ...data.plotting import AMBER, BLUE, GREEN, GREY, INK, RED, STYLE
from .candidates import averages

LINES = (BLUE, AMBER, GREEN, RED, "#7b5ea7", "#2a9d9d", "#c2609a", "#8c6d46")
"""Of several runs, in their order."""
HEAT = LinearSegmentedColormap.from_list("success", ["#f3f6fa", "#d3e3f5", "#7fb0e2", "#1c4676"])
MOST_LINES_OVER_THE_PLOT = 5
PARTS = {"policy": BLUE, "waiting for it": "#9cc0e7", "physics": "#6b8f71", "rendering": AMBER, "other": GREY}


def success_curve(checkpoints: pd.DataFrame, chosen_step: int | None, judged: pd.DataFrame) -> str:
    """Success on the selection half over training, with 95 % intervals, a line for raw and one for averaged weights; the chosen
    checkpoint's report half beside them."""

    def draw(axes: Axes) -> None:
        kinds = averages(checkpoints)
        for colour, (kind, line) in zip(cycle((BLUE, AMBER, GREY)), checkpoints.groupby(kinds), strict=False):
            steps, rates = line["step"].astype(int), 100 * line["success_rate"].astype(float)
            label = f"selection half, {kind or 'raw'}" if kinds.nunique() > 1 else "selection half"
            axes.fill_between(steps, 100 * line["low"], 100 * line["high"], color=colour, alpha=0.13, lw=0)
            axes.plot(steps, rates, color=colour, marker="o", ms=4.5, label=label)
        policy = judged[judged["actor"] == "policy"]
        if chosen_step is not None and len(policy):
            rate, low, high = (100 * float(policy[name].iloc[0]) for name in ("success_rate", "low", "high"))
            span = checkpoints["step"].max() - checkpoints["step"].min() or 1
            axes.errorbar(
                [chosen_step + 0.012 * span],
                [rate],
                yerr=[[rate - low], [high - rate]],
                fmt="D",
                color=GREEN,
                ms=6,
                capsize=4,
                label="chosen, report half",
            )
        axes.set(xlabel="training step", ylabel="success, %", ylim=(-3, 103))
        whole_steps(axes)
        axes.legend(loc="best")

    return _figure(draw, (6.4, 3.4))


def loss_curve(metrics: pd.DataFrame, chosen_step: int | None) -> str:
    """Training loss (and validation loss where it was measured) over steps, on a logarithmic axis."""

    def draw(axes: Axes) -> None:
        smooth = metrics["loss"].ewm(span=max(2, len(metrics) // 40)).mean()
        axes.plot(metrics["step"], metrics["loss"], color=BLUE, alpha=0.25, lw=0.8)
        axes.plot(metrics["step"], smooth, color=BLUE, label="training, smoothed")
        validation = metrics.dropna(subset=["validation_loss"]) if "validation_loss" in metrics else metrics.iloc[:0]
        if len(validation):
            axes.plot(
                validation["step"], validation["validation_loss"], color=AMBER, marker="o", ms=3.5, label="validation"
            )
        if chosen_step is not None:
            axes.axvline(chosen_step, color=GREEN, lw=1, ls="--", label="chosen")
        if (metrics["loss"] > 0).all():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}" if metrics["loss"].max() < 8 * metrics["loss"].min() else "")
        whole_steps(axes)
        axes.set(xlabel="training step", ylabel="loss")
        axes.legend(loc="upper right")

    return _figure(draw, (6.4, 3.4))


def actors_chart(table: pd.DataFrame, names: Mapping[str, str]) -> str:
    """Success of the policy and its controls on the report half, with 95 % intervals."""

    def draw(axes: Axes) -> None:
        shown = table.iloc[::-1]
        places = range(len(shown))
        rates = 100 * shown["success_rate"].astype(float)
        colours = [BLUE if actor == "policy" else GREY for actor in shown["actor"]]
        axes.barh(places, rates, color=colours, height=0.55)
        errors = [rates - 100 * shown["low"], 100 * shown["high"] - rates]
        axes.errorbar(rates, places, xerr=errors, fmt="none", ecolor=INK, elinewidth=1.2, capsize=4)
        axes.set_yticks(places, [names[actor] for actor in shown["actor"]])
        axes.set(xlabel="success on the report half, %", xlim=(0, 102))
        axes.grid(axis="y", visible=False)

    return _figure(draw, (6.4, 0.9 + 0.48 * len(table)))


def time_chart(seconds: Mapping[str, float]) -> str:
    """One bar: the mean episode's seconds by what they were spent on."""

    def draw(axes: Axes) -> None:
        left = 0.0
        for name, part in seconds.items():
            axes.barh([0], [part], left=left, color=PARTS[name], height=0.6, label=f"{name} {part:.2f} s")
            left += part
        axes.set(xlabel="seconds per episode (mean)", yticks=[], ylim=(-0.4, 0.4), xlim=(0, left * 1.001))
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, columnspacing=1.2, handlelength=1)

    return _figure(draw, (6.4, 1.9))


def success_over_time(rows_by_name: Mapping[str, pd.DataFrame]) -> str:
    """Share of each name's episodes that have succeeded by a control step; failures never do, so that a curve ends at its rate."""

    def draw(axes: Axes) -> None:
        last = max(int(rows["num_steps"].max()) for rows in rows_by_name.values())
        for look, (name, rows) in zip(line_looks(), rows_by_name.items(), strict=False):
            ended = rows[rows["outcome"] != "error"]
            steps = ended["steps_to_success"].dropna().astype(int).sort_values()
            shares = 100 * np.arange(len(steps) + 1) / len(ended)
            axes.step([0, *steps, last], [*shares, shares[-1]], where="post", label=shortened(name), **look)
        axes.set(xlabel="control step", ylabel="episodes solved by then, %", xlim=(0, last), ylim=(-1, 103))
        if len(rows_by_name) > 1:
            legend(axes, len(rows_by_name))

    return _figure(draw, (6.4, 3.4 + legend_height_in(len(rows_by_name))))


def heat_map(table: pd.DataFrame, chosen: tuple[int, int] | None) -> str:
    """Success over N (denoising steps of a chunk) and H (actions executed of it); `chosen` is the (N, H) to be outlined. Cells say the
    rate and the episodes, and are empty where nothing was run."""
    rates_HN = table.pivot(index="num_executed_steps", columns="num_sampling_steps", values="success_rate").astype(
        float
    )
    places: dict[Any, tuple[int, int]] = {
        (n, h): (x, y) for x, n in enumerate(rates_HN.columns) for y, h in enumerate(rates_HN.index)
    }

    def draw(axes: Axes) -> None:
        axes.imshow(100 * rates_HN.to_numpy(), cmap=HEAT, vmin=0, vmax=100, aspect="auto", origin="lower")
        for cell in table[table["episodes"] > 0].to_dict("records"):
            x, y = places[cell["num_sampling_steps"], cell["num_executed_steps"]]
            colour = "white" if cell["success_rate"] > 0.75 else INK
            axes.text(
                x,
                y + 0.04,
                f"{100 * cell['success_rate']:.0f} %",
                ha="center",
                va="bottom",
                color=colour,
                weight="bold",
            )
            axes.text(x, y - 0.06, f"of {cell['episodes']}", ha="center", va="top", color=colour, fontsize=8)
        if chosen in places:
            x, y = places[chosen]
            axes.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, edgecolor=AMBER, lw=2.2))
        axes.set_xticks(range(rates_HN.shape[1]), [str(n) for n in rates_HN.columns])
        axes.set_yticks(range(rates_HN.shape[0]), [str(h) for h in rates_HN.index])
        axes.set(xlabel="N: denoising steps", ylabel="H: executed")
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)

    return _figure(draw, (max(1.9, 0.85 * rates_HN.shape[1]) + 0.6, 0.52 * rates_HN.shape[0] + 0.65))


def legend(axes: Axes, num_lines: int) -> None:
    """In the plot where it is short; else below, in two columns, where it hides no line."""
    if legend_height_in(num_lines):
        axes.legend(loc="upper left", bbox_to_anchor=(-0.08, -0.17), ncols=2, fontsize=8.5, columnspacing=1.2)
    else:
        axes.legend(loc="best")


def legend_height_in(num_lines: int) -> float:
    """What a figure grows by for `legend`."""
    return 0.0 if num_lines <= MOST_LINES_OVER_THE_PLOT else 0.19 * -(-num_lines // 2)


def shortened(name: str, most: int = 34) -> str:
    """Long names lose their middle: both ends tell runs apart."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most - most // 2 - 1) :]}"


def whole_steps(axes: Axes) -> None:
    """Ticks at whole training steps, `10,000`."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def line_looks() -> Iterator[dict[str, Any]]:
    """Colours one after the other; dashed, then dotted, when they have been used up."""
    for dashes in cycle(("-", "--", ":")):
        for colour in LINES:
            yield {"color": colour, "ls": dashes}


def _figure(draw: Callable[[Axes], None], size_in: tuple[float, float]) -> str:
    return svg(lambda figure: draw(figure.add_subplot()), size_in)


def svg(draw: Callable[[Figure], None], size_in: tuple[float, float]) -> str:
    """The figure as a data URI; equal numbers give equal bytes."""
    with rc_context(STYLE):
        figure = Figure(figsize=size_in, layout="constrained")
        draw(figure)
        text = io.BytesIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(text.getvalue()).decode()
