"""The delay study's summary, comparisons, figure and findings, made from its rows alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...data.files import write_whole
from ...eval.statistics import holm, mcnemar_exact
from .figures import MUTED, save_figure
from .intervals import Interval, mean_over_seeds, rate_over_seeds
from .prose import listed, rates
from .tables import write_csv


class Look(NamedTuple):
    label: str
    colour: str


LOOKS = {
    "hold": Look("standing still", MUTED),
    "previous": Look("previous chunk", "#c8483f"),
    "ensemble": Look("temporal ensembling", "#2f9e63"),
    "real_time": Look("real-time chunking", "#2b6cb0"),
}
NAIVE = "previous"
"""What the others are compared with."""

Group = tuple[str, int]
"""(way, delay)."""
Records = Sequence[Mapping[str, Any]]
METRICS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "steps_to_success": lambda row: row["num_steps"] if row["outcome"] == "success" else None,
    "seam_jump": lambda row: row["seam_jump"],
    "smoothness": lambda row: row["smoothness"],
    "action_saturation": lambda row: row["action_saturation"],
    "policy_ms": lambda row: row["policy_ms"],
}
"""Column of summary.csv -> an episode's value of it."""


def write_report(out: Path, records: Records) -> None:
    """summary.csv, pairs.csv, figure.png and findings.md."""
    groups = grouped(records)
    summary = {group: summarise(rows) for group, rows in groups.items()}
    lines = []
    for (way, delay), metrics in summary.items():
        rows = groups[way, delay]
        line: dict[str, Any] = {"way": way, "inference_delay": delay, "seeds": len({row["seed"] for row in rows})}
        line |= {"episodes": len(_ended(rows)), "errors": len(rows) - len(_ended(rows))}
        for name, interval in metrics.items():
            line |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        lines.append(line)
    write_csv(out / "summary.csv", lines)
    pairs = compare(groups)
    if pairs:
        write_csv(out / "pairs.csv", pairs)
    save_figure(out / "figure.png", (10.5, 6.4), lambda figure: _draw(figure, summary))
    write_whole(out / "findings.md", (findings(groups, summary, pairs) + "\n").encode())


def grouped(records: Records) -> dict[Group, Records]:
    """The rows of each way at each delay. Without a delay, standing still and going on with the previous chunk are the same, run once."""
    delays = sorted({row["inference_delay"] for row in records})
    groups: dict[Group, Records] = {}
    for way in LOOKS:
        for delay in delays:
            same = {"hold", NAIVE} if way in ("hold", NAIVE) and delay == 0 else {way}
            rows = [row for row in records if row["way"] in same and row["inference_delay"] == delay]
            if rows and any(row["way"] == way for row in records):
                groups[way, delay] = rows
    return groups


def summarise(rows: Records) -> dict[str, Interval]:
    """`success` with its interval over training seeds and episodes; of the others the mean over all episodes that ended (of
    `steps_to_success`: that succeeded), with Student's t interval over episodes: about these weights, not another training seed."""
    ended = _ended(rows)
    seeds = sorted({row["seed"] for row in ended})
    of_seed = [[row["outcome"] == "success" for row in ended if row["seed"] == seed] for seed in seeds]
    summary = {"success": rate_over_seeds([sum(won) for won in of_seed], [len(won) for won in of_seed])}
    for name, value_of in METRICS.items():
        values = [value for value in map(value_of, ended) if value is not None]
        if values:
            summary[name] = mean_over_seeds(values)
    return summary


def compare(groups: Mapping[Group, Records]) -> list[dict[str, Any]]:
    """Columns of pairs.csv: at each delay every way against going on with the previous chunk, on the same init states and training
    seeds: episodes that both have, how many succeeded under one alone, the difference of the rates (the way's minus the other's),
    the exact paired test's p-value, and it adjusted for all lines."""
    lines: list[dict[str, Any]] = []
    for (way, delay), rows in groups.items():
        if way == NAIVE or (way == "hold" and delay == 0) or (NAIVE, delay) not in groups:
            continue
        own, other = (
            {_episode(row): row["outcome"] == "success" for row in _ended(of)} for of in (rows, groups[NAIVE, delay])
        )
        both = own.keys() & other.keys()
        only_way, only_other = sum(own[k] > other[k] for k in both), sum(own[k] < other[k] for k in both)
        if both:
            line = {
                "way": way,
                "inference_delay": delay,
                "episodes": len(both),
                "only_way": only_way,
                f"only_{NAIVE}": only_other,
            }
            lines.append({**line, "difference": (only_way - only_other) / len(both)})
    p_values = [mcnemar_exact(line["only_way"], line[f"only_{NAIVE}"]) for line in lines]
    for line, p_value, adjusted in zip(lines, p_values, holm(p_values), strict=True):
        line |= {"mcnemar_p": p_value, "holm_p": adjusted}
    return lines


def findings(
    groups: Mapping[Group, Records], summary: Mapping[Group, Mapping[str, Interval]], pairs: Sequence[Mapping[str, Any]]
) -> str:
    """One paragraph, every number from the rows."""
    seeds = len({row["seed"] for rows in groups.values() for row in rows})
    episodes = max(len(_ended(rows)) for rows in groups.values())
    counted = f"{seeds} training seed{'s' if seeds > 1 else ''}, {episodes} episodes a point"
    sentences = [f"A policy on pocket whose decisions come late; {counted}, means with their 95 % interval."]
    for delay in sorted({delay for _, delay in groups}):
        there = {LOOKS[way].label: summary[way, at] for way, at in groups if at == delay}
        jumps = ", ".join(f"{label} {m['seam_jump'].mean:.2f}" for label, m in there.items() if "seam_jump" in m)
        success = rates({label: metrics["success"] for label, metrics in there.items()})
        sentences.append(
            f"Delay {delay}: success {success}; mean jump of the arm's action where what is carried out changes: {jumps}."
        )
    told_apart = [
        f"{LOOKS[pair['way']].label} at delay {pair['inference_delay']} ({100 * pair['difference']:+.0f} points, p = {pair['holm_p']:.2g})"
        for pair in pairs
        if pair["holm_p"] < 0.05
    ]
    if told_apart:
        sentences.append(
            f"Told apart from going on with the previous chunk on the same episodes (McNemar's test, Holm's adjustment): {listed(told_apart)}."
        )
    elif pairs:
        sentences.append("In success no way is told apart from going on with the previous chunk at 5 %.")
    return " ".join(sentences)


def _ended(rows: Records) -> Records:
    return [row for row in rows if row["outcome"] != "error"]


def _episode(row: Mapping[str, Any]) -> tuple[int, int, int]:
    return row["seed"], row["task_id"], row["init_state"]


def _draw(figure: Figure, summary: Mapping[Group, Mapping[str, Interval]]) -> None:
    panels = figure.subplots(2, 2, sharex=True)
    _draw_panel(panels[0, 0], summary, "success", "success, %", scale=100)
    _draw_panel(panels[0, 1], summary, "steps_to_success", "control steps to success")
    _draw_panel(panels[1, 0], summary, "seam_jump", "jump where chunks change")
    _draw_panel(panels[1, 1], summary, "action_saturation", "clipped action entries, %", scale=100)
    panels[0, 0].set_ylim(0, 103)
    panels[1, 0].set_ylim(bottom=0)
    for axes in panels[1]:
        axes.set_xlabel("delay of a decision, control steps")
        axes.set_xticks(sorted({delay for _, delay in summary}))
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title="while a decision is awaited; 95 % intervals",
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )


def _draw_panel(
    axes: Axes, summary: Mapping[Group, Mapping[str, Interval]], metric: str, label: str, *, scale: float = 1.0
) -> None:
    axes.set_ylabel(label)
    for place, (way, look) in enumerate(LOOKS.items()):
        points = [
            (delay, summary[name, delay][metric])
            for name, delay in summary
            if name == way and metric in summary[name, delay]
        ]
        if not points:
            continue
        x = [delay + 0.08 * (place - 1.5) for delay, _ in points]
        mean, low, high = ([scale * interval[k] for _, interval in points] for k in range(3))
        below, above = ([abs(a - b) for a, b in zip(mean, ends, strict=True)] for ends in (low, high))
        axes.plot(x, mean, "o-", color=look.colour, ms=4, lw=1.3, label=look.label)
        bounded = [k for k, (a, b) in enumerate(zip(below, above, strict=True)) if max(a, b) < float("inf")]
        axes.errorbar(
            [x[k] for k in bounded],
            [mean[k] for k in bounded],
            yerr=[[below[k] for k in bounded], [above[k] for k in bounded]],
            fmt="none",
            ecolor=look.colour,
            elinewidth=1,
            capsize=2,
            alpha=0.7,
        )
