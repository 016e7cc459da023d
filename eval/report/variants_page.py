"""Several runs beside one another: a page, its tables as CSVs, and table.md."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ...data.files import write_whole
from ..results import success_by
from . import figures, variant_figures
from . import variant_tables as tables
from .candidates import by_candidate
from .gallery import gallery, num_missing
from .markdown import p_value, table_md
from .rendering import render
from .run_page import heat_maps
from .tables import NAMES
from .variants import BASES, Variant, read_variants

ALL_SUITES = "all"


def write_variants_report(paths: Sequence[Path], out: Path) -> str:
    """Write the comparison's files into `out`; returns the table to print. Raises `DataError` for CSVs that are missing, empty or
    contradict one another, `ValueError` where `out` is a file."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder, which index.html and its tables are written to")
    variants = read_variants(paths)
    table, compared = tables.variants_table(variants), tables.comparisons(variants)
    candidates = tables.candidates_table(variants)
    out.mkdir(parents=True, exist_ok=True)
    page = _html(variants, table, compared, candidates, out)
    for name, frame in (("variants", table), ("comparisons", compared), ("candidates", candidates)):
        write_whole(out / f"{name}.csv", frame.to_csv(index=False).encode())
    write_whole(out / "table.md", table_md(table, compared).encode())
    write_whole(out / "index.html", page)
    return f"{_text(table, compared)}\n\ntables: {out / 'variants.csv'}, comparisons.csv, candidates.csv, table.md\nreport: {out / 'index.html'}"


def _html(
    variants: Sequence[Variant], table: pd.DataFrame, compared: pd.DataFrame, candidates: pd.DataFrame, out: Path
) -> bytes:
    judged = tables.judged_rows(variants)
    objectives = {variant.name: tables.objective_of(variant) for variant in variants}
    controls = tables.controls_table(variants)
    modes, time = tables.failure_modes(variants), tables.time_by_variant(variants)
    training = {each.name: by_candidate(each.over_training).dropna(subset=["step"]) for each in variants}
    training = {name: steps for name, steps in training.items() if len(steps) > 1}
    suites = sorted(set(judged["suite"]))
    return render(
        "variants.html",
        rows=tables.records(table),
        bases=BASES,
        suites=suites if len(suites) > 1 else [],
        by_suite=_cells(tables.by_suite(variants), "suite", "variant"),
        compared=compared.to_dict("records"),
        unpaired=tables.unpaired(variants, compared),
        mixed=_mixed(judged),
        num_other_rows=sum(variant.num_other_rows for variant in variants),
        objectives=tables.by_objective(table).to_dict("records"),
        candidates=_by_variant(candidates[candidates["suite"].isna()]),
        candidates_by_suite=_cells(candidates[candidates["suite"].notna()], "variant", "candidate", "suite"),
        by_task=_by_task(tables.by_task(variants)),
        controls=[(name, of_run.to_dict("records")) for name, of_run in controls.groupby("variant", sort=False)],
        actors=NAMES,
        control_names=[actor for actor in NAMES if actor in set(controls["actor"])],
        modes=[name for name in modes if name not in ("variant", "episodes")],
        modes_rows=modes.to_dict("records"),
        videos=gallery(judged, out, by="variant"),
        num_missing_videos=num_missing(judged),
        num_errors=int(table["errors"].sum()),
        figure={
            "success": variant_figures.success_bars(_with_all(variants)),
            "training": variant_figures.success_over_training(training) if training else "",
            "heat": [map_ for each in variants for map_ in heat_maps(each.selection, each.candidate, each.name)],
            "latency": variant_figures.latency_and_smoothness(
                judged[judged["outcome"] != "error"].assign(objective=judged["variant"].map(objectives))
            ),
            "time": variant_figures.time_bars(time) if len(time) else "",
            "over_time": figures.success_over_time({variant.name: variant.judged for variant in variants}),
            "modes": variant_figures.failure_bars(modes) if len(modes.columns) > 2 else "",
        },
    )


def _with_all(variants: Sequence[Variant]) -> pd.DataFrame:
    """Success by suite, and over all suites where there are several."""
    table = tables.by_suite(variants)
    if table["suite"].nunique() == 1:
        return table
    overall = tables.in_order(success_by(tables.judged_rows(variants), "variant"), variants)
    return pd.concat([overall.assign(suite=ALL_SUITES), table], ignore_index=True)


def _mixed(judged: pd.DataFrame) -> list[str]:
    """Settings in which the variants were not judged alike, in words."""
    words = {"protocol": "protocol", "seed": "seed", "image_px": "picture size"}
    found = []
    for column, word in words.items():
        if judged[column].nunique() > 1:
            found.append(f"{word} ({', '.join(map(str, sorted(set(judged[column]))))})")
    if (judged.groupby(["suite", "task_id"])["max_steps"].nunique() > 1).any():
        found.append("step limit")
    return found


def _cells(table: pd.DataFrame, *by: str) -> dict[tuple, dict[Any, Any]]:
    return {tuple(row[name] for name in by): row for row in table.to_dict("records")}


def _by_variant(table: pd.DataFrame) -> list[tuple[str, list[dict[Any, Any]]]]:
    return [(str(name), rows.to_dict("records")) for name, rows in table.groupby("variant", sort=False)]


def _by_task(table: pd.DataFrame) -> list[tuple[str, str, dict[str, dict[Any, Any]]]]:
    """(suite, instruction, variant -> cell) of each task."""
    return [
        (str(suite), str(language), {row["variant"]: row for row in rows.to_dict("records")})
        for (suite, _, language), rows in table.groupby(["suite", "task_id", "task_language"], sort=True)
    ]


def _text(table: pd.DataFrame, compared: pd.DataFrame) -> str:
    """The table for the terminal."""
    width = max(map(len, table["variant"]))
    lines = ["success, 95 % Wilson interval, episodes"]
    for row in tables.records(table):
        share = f"{100 * row['success_rate']:5.1f} %  [{100 * row['low']:5.1f}, {100 * row['high']:5.1f}]"
        among = f", of {row['num_candidates']}" if (row["num_candidates"] or 1) > 1 else ""
        lines.append(
            f"  {row['variant']:<{width}}  {share}  {row['successes']:>4}/{row['episodes']:<4}  {row['checkpoint']}{among}: {BASES[row['basis']]}"
        )
    if len(compared):
        lines.append("first − second on the same episodes: points with Tango's 95 % interval, McNemar's p by Holm")
    for row in compared.to_dict("records"):
        points = f"{100 * row['difference']:+6.1f}  [{100 * row['low']:+6.1f}, {100 * row['high']:+6.1f}]"
        lines.append(
            f"  {row['first']} − {row['second']}: {points}  p {p_value(row['p_holm'])}  ({row['pairs']} episodes)"
        )
    return "\n".join(lines)
