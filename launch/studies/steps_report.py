"""The steps study's summary, figure and findings, made from its rows alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...data.files import write_whole
from .figures import save_figure
from .intervals import Interval, mean_over_seeds, rate_over_seeds
from .prose import percent, rate
from .tables import write_csv

LOOKS = {
    "flow_euler": ("flow, Euler", "#2b6cb0", "o-"),
    "flow_midpoint": ("flow, midpoint", "#2b6cb0", "s--"),
    "flow_heun": ("flow, Heun", "#2b6cb0", "^:"),
    "diffusion_ddim": ("diffusion, DDIM", "#2f9e63", "o-"),
    "diffusion_dpm_solver": ("diffusion, DPM-Solver++", "#2f9e63", "s--"),
    "high_noise_euler": ("high-noise flow, Euler", "#d69e2e", "o-"),
    "shortcut": ("shortcut", "#1aa5a5", "o-"),
    "rs_imle": ("RS-IMLE", "#8a56ac", "*"),
}
"""Sampler -> label, colour and line."""
NEAR_BEST = 0.01
"""Findings name the fewest steps whose share of valid paths is this near to the sampler's best."""
LEAST_INVALID = 0.1
"""Percent at the bottom of the figure's logarithmic axis; fewer are drawn there."""

Group = tuple[str, int]
"""(sampler, sampling steps)."""
Summary = dict[Group, dict[str, Interval]]


def write_report(out: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """summary.csv, figure.png and findings.md."""
    summary = summarise(records)
    lines = []
    for (name, num_steps), metrics in summary.items():
        rows = _of(records, name, num_steps)
        line: dict[str, Any] = {"sampler": name, "num_sampling_steps": num_steps, "seeds": len(rows)}
        line["expert_calls"] = rows[0]["expert_calls"]
        for metric, interval in metrics.items():
            line |= {metric: interval.mean, f"{metric}_low": interval.low, f"{metric}_high": interval.high}
        lines.append(line)
    write_csv(out / "summary.csv", lines)
    calls = {group: _of(records, *group)[0]["expert_calls"] for group in summary}
    save_figure(out / "figure.png", (10.5, 6.4), lambda figure: _draw(figure, summary, calls))
    write_whole(out / "findings.md", (findings(records, summary) + "\n").encode())


def summarise(records: Sequence[Mapping[str, Any]]) -> Summary:
    """Columns of summary.csv: the sampler, its steps, how many seeds, calls of the expert; then each metric's mean over seeds with
    `_low` and `_high`, its 95 % interval: Student's t over seeds, for rates no narrower than Wilson's over all that was counted."""
    summary: Summary = {}
    for name in LOOKS:
        for num_steps in sorted({record["num_sampling_steps"] for record in records if record["sampler"] == name}):
            rows = _of(records, name, num_steps)
            summary[name, num_steps] = {
                "valid": rate_over_seeds([r["num_valid"] for r in rows], [r["num_paths"] for r in rows]),
                "right": rate_over_seeds([r["num_right"] for r in rows], [r["num_valid"] for r in rows]),
                "both_ways": rate_over_seeds([r["num_both_ways"] for r in rows], [r["num_starts"] for r in rows]),
                **{
                    metric: mean_over_seeds([r[metric] for r in rows])
                    for metric in ("distance", "spread", "energy_distance", "ms_per_path")
                },
            }
    return summary


def findings(records: Sequence[Mapping[str, Any]], summary: Summary) -> str:
    """One paragraph, every number from the rows."""
    seeds = len({record["seed"] for record in records})
    counted = f"{seeds} training seed{'s' if seeds > 1 else ''}, {records[0]['num_paths']:,} paths from each"
    sentences = [f"Valid paths against sampling steps: {counted}; means over seeds with 95 % intervals."]
    for name, (label, *_) in LOOKS.items():
        by_steps = {steps: metrics for (sampler, steps), metrics in summary.items() if sampler == name}
        if not by_steps:
            continue
        fewest = min(by_steps)
        first = by_steps[fewest]["valid"]
        best = max(metrics["valid"].mean for metrics in by_steps.values())
        enough = next(steps for steps, metrics in by_steps.items() if metrics["valid"].mean >= best - NEAR_BEST)
        sentence = f"{label[0].upper()}{label[1:]}: {rate(first)} in {_steps(fewest)}"
        if enough != fewest:
            sentence += f", {rate(by_steps[enough]['valid'])} in {_steps(enough)}"
            sentence += f" ({by_steps[enough]['ms_per_path'].mean:.1f} ms a path)"
        last = max(by_steps)
        if last != enough and by_steps[last]["valid"].mean < best - NEAR_BEST:
            sentence += f", down to {percent(by_steps[last]['valid'].mean)} in {_steps(last)}"
        sentences.append(f"{sentence}.")
    return " ".join(sentences)


def _steps(number: int) -> str:
    return f"{number} step{'s' if number > 1 else ''}"


def _of(records: Sequence[Mapping[str, Any]], name: str, num_steps: int) -> list[Mapping[str, Any]]:
    return [r for r in records if r["sampler"] == name and r["num_sampling_steps"] == num_steps]


def _draw(figure: Figure, summary: Summary, calls: Mapping[Group, int]) -> None:
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    costs = [
        ("calls of the expert", {group: float(number) for group, number in calls.items()}),
        ("milliseconds a path (batch of one, small expert)", {g: m["ms_per_path"].mean for g, m in summary.items()}),
    ]
    for column, (words, cost) in enumerate(costs):
        for row, metric in enumerate(("valid", "energy_distance")):
            _draw_panel(panels[row, column], summary, cost, metric)
        panels[1, column].set(xlabel=words, xscale="log")
        low, high = min(cost.values()), max(cost.values())
        ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if 0.8 * low <= tick <= 1.25 * high]
        panels[1, column].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panels[1, column].xaxis.set_minor_formatter("")
    panels[0, 0].set(ylabel="invalid paths, %", yscale="log", ylim=(LEAST_INVALID, 130))
    panels[0, 0].yaxis.set_major_formatter("{x:g}")
    panels[1, 0].set(ylabel="energy distance to demonstrations")
    panels[1, 0].set_yscale("symlog", linthresh=0.002)
    panels[1, 0].set_ylim(-0.0025, 0.5)
    panels[1, 0].set_yticks([-0.002, 0, 0.002, 0.01, 0.1], ["-0.002", "0", "0.002", "0.01", "0.1"])
    handles, labels = panels[0, 0].get_legend_handles_labels()
    title = "means over training seeds; bands: 95 % intervals"
    figure.legend(handles, labels, title=title, loc="outside lower center", ncols=4, fontsize=9, frameon=False)


def _draw_panel(axes: Axes, summary: Summary, cost: Mapping[Group, float], metric: str) -> None:
    for name, (label, colour, line) in LOOKS.items():
        groups = [group for group in summary if group[0] == name]
        if groups:
            x = [cost[group] for group in groups]
            mean, low, high = ([summary[group][metric][k] for group in groups] for k in range(3))
            if metric == "valid":
                mean, low, high = ([max(LEAST_INVALID, 100 - 100 * y) for y in values] for values in (mean, low, high))
            axes.plot(x, mean, line, color=colour, ms=10 if line == "*" else 4, lw=1.3, label=label)
            if len(groups) > 1:
                axes.fill_between(x, low, high, color=colour, alpha=0.08, lw=0)
