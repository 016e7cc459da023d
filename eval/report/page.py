"""``vlatune report PATH…``: a run's own page beside its rows, or one page that compares the runs of several CSVs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Turn the sweep's rows into tables and a page that opens without a server.

    One run: RUN/evaluation/summary.csv and RUN/evaluation/report/index.html. Several paths, a CSV file, or --out: a page that compares
    the runs in them, with variants.csv, comparisons.csv, candidates.csv and table.md (Markdown for a paper)."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Runs that were swept, evaluation folders, or CSVs as `vlatune sweep` and `vlatune merge` write them."""
    out: Path | None = None
    """The folder for a comparison; by default report/ in the working folder. Its files are replaced."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; raises what `report` raises."""
    print(report(tyro.cli(ReportConfig, args=None if argv is None else list(argv), prog="vlatune report")))


def report(config: ReportConfig) -> str:
    """Write the page that fits what was given; returns the table to print. Raises `DataError` where there is no run or no sweep,
    `ValueError` where nothing was given."""
    from .run_page import num_runs, write_run_report
    from .variants_page import write_variants_report

    if not config.paths:
        raise ValueError("no run was given; type for instance: vlatune report runs/pocket")
    if len(config.paths) == 1 and config.out is None and config.paths[0].suffix != ".csv":
        path = config.paths[0]
        if num_runs(path) == 1:
            return write_run_report(path)
    return write_variants_report(config.paths, config.out or Path("report"))


if __name__ == "__main__":
    main()
