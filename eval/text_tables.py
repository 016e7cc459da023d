"""Tables as text: aligned for a terminal, and CSV of rows that are dataclasses."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right, as wide as their longest cell."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def csv_of(rows: Sequence[Any], kind: type) -> bytes:
    """CSV of dataclasses of this `kind`: its fields are the columns, None is an empty cell."""
    import pandas as pd

    columns = [field.name for field in fields(kind)]
    text: str = pd.DataFrame([asdict(row) for row in rows], columns=columns, dtype=object).to_csv(index=False)
    return text.encode()
