"""table.md: the variants and their paired comparison as Markdown, for a paper or an issue."""

import math
from collections.abc import Sequence

import pandas as pd

from .variants import BASES


def table_md(variants: pd.DataFrame, compared: pd.DataFrame) -> str:
    """The text, from `variant_tables.variants_table` and `comparisons`. Success is in per cent, with Wilson's 95 % interval; p is of
    the paired comparison with the variant of the highest rate."""
    best = str(variants["variant"].iloc[int(variants["success_rate"].fillna(-1).argmax())])
    suites = [str(name).removeprefix("success_rate_") for name in variants if str(name).startswith("success_rate_")]
    several = len(variants) > 1
    header = ["variant", "training steps", "objective", "N", "H", "success, % (95 % interval)", "episodes"]
    header += [f"{suite}, %" for suite in suites] if len(suites) > 1 else []
    header += ["inference, ms", "evaluation, min"] + ([f"p against {best}"] if several else [])
    lines = []
    for row in variants.to_dict("records"):
        cells = [row["variant"] + ("*" if row["basis"] == "selected_on" else ""), whole(row["step"]), row["objective"]]
        cells += [whole(row["num_sampling_steps"]), whole(row["num_executed_steps"])]
        cells += [interval(row["success_rate"], row["low"], row["high"]), whole(row["episodes"])]
        if len(suites) > 1:
            cells += [
                interval(*(row[f"{part}_{suite}"] for part in ("success_rate", "low", "high"))) for suite in suites
            ]
        cells += [number(row["policy_ms"]), number(row["episode_s"] / 60)]
        cells += [p_against(best, row["variant"], compared)] if several else []
        lines.append(cells)
    text = markdown(header, lines) + "\n" + notes(variants, several)
    if len(compared):
        text += "\n" + markdown(
            [
                "first",
                "second",
                "common episodes",
                "only first / only second",
                "difference, points",
                "p",
                "mid-p",
                "p, Holm",
            ],
            [
                [
                    row["first"],
                    row["second"],
                    whole(row["pairs"]),
                    f"{row['only_first']} / {row['only_second']}",
                    interval(row["difference"], row["low"], row["high"], sign="+"),
                    *(p_value(row[name]) for name in ("p_exact", "p_mid", "p_holm")),
                ]
                for row in compared.to_dict("records")
            ],
        )
    return text


def notes(variants: pd.DataFrame, several: bool) -> str:
    """What the columns mean: one paragraph below the table."""
    sentences = [
        "N: denoising steps. H: actions executed of a chunk. Success with Wilson's 95 % interval; episodes count as exchangeable.",
        "Inference is the mean forward of a decision"
        + (", of the whole batch where the sweep batched." if (variants["batch_size"].fillna(1) > 1).any() else "."),
        "Evaluation adds up the seconds of the variant's episodes, as one worker would take.",
    ]
    if several:
        sentences.append(
            "p: McNemar's exact test on the common episodes, adjusted by Holm over all pairs; it is about these weights, not about "
            "other training seeds."
        )
    if (variants["basis"] == "selected_on").any():
        sentences.append(f"\\* {BASES['selected_on']}.")
    return " ".join(sentences) + "\n"


def p_against(best: str, name: str, compared: pd.DataFrame) -> str:
    if name == best:
        return "–"
    pair = compared[compared.apply(lambda row: {row["first"], row["second"]} == {best, name}, axis=1).astype(bool)]
    return p_value(pair["p_holm"].iloc[0]) if len(pair) else "no common episode"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose columns are aligned in the text, too."""
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in (header, *lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([rows[0], rule, *rows[1:]]) + "\n"


def interval(rate: float, low: float, high: float, sign: str = "") -> str:
    """`84.0 (75.1–90.3)`; shares in, per cent out."""
    if math.isnan(rate):
        return "–"
    joint = " to " if sign else "–"
    return f"{100 * rate:{sign}.1f} ({100 * low:{sign}.1f}{joint}{100 * high:{sign}.1f})"


def p_value(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def whole(value: float | None) -> str:
    return "–" if pd.isna(value) else f"{int(value):,}"


def number(value: float | None) -> str:
    """Three digits that count, never in powers of ten."""
    if value is None or pd.isna(value):
        return "–"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 4)}f}"
