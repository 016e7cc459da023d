"""The report's figures, each an SVG as a data URI: the page needs no other file and no network."""

import base64
import io
from collections.abc import Callable, Mapping

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, GREY, GREEN, RED, AMBER, INK = "#2b6cb0", "#a3acb9", "#2f9e63", "#c8483f", "#d69e2e", "#2d3440"
PARTS = {"policy": BLUE, "waiting for it": "#9cc0e7", "physics": "#6b8f71", "rendering": AMBER, "other": GREY}
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#c5ccd6",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8ecf1",
    "axes.axisbelow": True,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "svg.hashsalt": "vlatune",  # equal numbers give equal bytes
}


def success_curve(checkpoints: pd.DataFrame, chosen_step: int | None, judged: pd.DataFrame) -> str:
    """Success on the selection half over training, with 95 % intervals; the chosen checkpoint's report half beside it."""

    def draw(axes: Axes) -> None:
        steps, rates = checkpoints["step"].astype(int), 100 * checkpoints["success_rate"].astype(float)
        axes.fill_between(steps, 100 * checkpoints["low"], 100 * checkpoints["high"], color=BLUE, alpha=0.13, lw=0)
        axes.plot(steps, rates, color=BLUE, marker="o", ms=4.5, label="selection half")
        policy = judged[judged["actor"] == "policy"]
        if chosen_step is not None and len(policy):
            rate, low, high = (100 * float(policy[name].iloc[0]) for name in ("success_rate", "low", "high"))
            span = max(steps) - min(steps) or 1
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


def _figure(draw: Callable[[Axes], None], size_in: tuple[float, float]) -> str:
    with rc_context(STYLE):
        figure = Figure(figsize=size_in, layout="constrained")
        draw(figure.add_subplot())
        text = io.BytesIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(text.getvalue()).decode()
