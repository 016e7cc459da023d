"""`profile.png`: where a decision's time goes, and an episode's. Equal numbers give equal bytes."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..data.plotting import AMBER, BLUE, GREY, png
from .latency import Latency

COLOURS = {
    "prepare": "#7b5ea7",
    "transfer": "#c2609a",
    "prefix": BLUE,
    "expert": "#7fb0e2",
    "rest": GREY,
    "physics": "#6b8f71",
    "render": AMBER,
    "reset": "#d9dde3",
}
SMALL: dict[str, Any] = {"frameon": False, "handlelength": 1, "handletextpad": 0.5}


def figure_of(
    latencies: Sequence[Latency], episodes: Mapping[str, Mapping[str, float]], *, title: str, episode_title: str
) -> bytes:
    """A PNG. One panel for each batch size, since their milliseconds lie far apart; then the episodes (label -> seconds by cause), if
    there are any."""
    by_batch = [list(group) for _, group in groupby(latencies, key=lambda latency: latency.batch_size)]
    heights = [len(group) for group in by_batch] + ([len(episodes)] if episodes else [])

    def draw(figure: Figure) -> None:
        axes_P = figure.subplots(len(heights), 1, squeeze=False, height_ratios=[2 + height for height in heights])[:, 0]
        for axes, group in zip(axes_P, by_batch, strict=False):
            _decisions(axes, group)
        if episodes:
            bars = {label: (parts, f"{sum(parts.values()):.2f} s") for label, parts in episodes.items()}
            _bars(axes_P[-1], bars)
            axes_P[-1].set_title(episode_title, loc="left", fontsize=10)
            axes_P[-1].set_xlabel("seconds")
        handles = {
            label: handle for axes in axes_P for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=8, columnspacing=1.1, **SMALL)

    return png(draw, (7.6, 0.9 + sum(0.85 + 0.34 * height for height in heights)))


def _decisions(axes: Axes, latencies: Sequence[Latency]) -> None:
    bars = {
        counted(latency.num_sampling_steps, "sampling step"): (
            latency.undisturbed_parts_ms,
            f"{latency.median_ms:.1f} ms (p95 {latency.percentile_ms(95):.1f})",
        )
        for latency in latencies
    }
    _bars(axes, bars)
    axes.set_title(f"one decision, {counted(latencies[0].batch_size, 'observation')}", loc="left", fontsize=10)
    axes.set_xlabel("milliseconds")


def _bars(axes: Axes, bars: Mapping[str, tuple[Mapping[str, float], str]]) -> None:
    """label -> (length of each part, what stands at the bar's end)."""
    ends = [0.0] * len(bars)
    for part in next(iter(bars.values()))[0]:
        lengths = [parts[part] for parts, _ in bars.values()]
        axes.barh(range(len(bars)), lengths, left=list(ends), color=COLOURS[part], height=0.62, label=part)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    for place, (_, text) in enumerate(bars.values()):
        axes.annotate(text, (ends[place], place), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set(xlim=(0, 1.36 * max(ends)), ylim=(len(bars) - 0.4, -0.6))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def counted(number: int, thing: str) -> str:
    """`1 step`, `5 steps`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
