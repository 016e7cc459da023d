"""A study's folder: its settings, `results.csv` that grows row by row and survives a kill, and the CSVs made from it."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from ...data.episodes import DataError
from ...data.files import json_bytes, write_whole

Row = TypeVar("Row")
Cell = str | int | float | None


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Remember in `settings.json` what every row depends on; raises `DataError` where rows of other settings lie."""
    path = folder / "settings.json"
    wanted = json.loads(json.dumps(settings))
    if path.exists() and (found := json.loads(path.read_text())) != wanted:
        names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        changes = ", ".join(f"{name} was {found.get(name)}, now {wanted.get(name)}" for name in names)
        raise DataError(f"{folder} has results of other settings: {changes}. Type --out with another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json_bytes(wanted))


class ResultsTable(Generic[Row]):
    """`results.csv`: rows of one dataclass, told apart by the values of `key`, which are its first columns.

    The file is written whole for every row, sorted by key: there is never half a row, and stopped and continued it is the file
    that an undisturbed run would have written."""

    def __init__(self, folder: Path, row_type: type[Row], key: Sequence[str]) -> None:
        self.path = folder / "results.csv"
        self.key = tuple(key)
        self.row_type = row_type
        self.types: dict[str, Any] = {field.name: field.type for field in fields(row_type)}  # type: ignore[arg-type]
        self.columns = (*self.key, *(name for name in self.types if name not in self.key))
        self.rows: dict[tuple[Any, ...], Row] = {}
        if self.path.exists():
            self._read()

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self.rows

    def add(self, row: Row) -> None:
        """Keep the row (instead of an older one with its key), on disk when this returns; rounded as the file has it, so that
        what is made from rows does not depend on which of them were read back."""
        row = self._row({name: _cell(getattr(row, name)) for name in self.columns})
        self.rows[self._key_of(row)] = row
        ordered = [self.rows[key] for key in sorted(self.rows)]
        write_csv(self.path, [{name: getattr(row, name) for name in self.columns} for row in ordered])

    def records(self) -> list[dict[str, Any]]:
        """The rows as dictionaries, sorted by key."""
        return [asdict(self.rows[key]) for key in sorted(self.rows)]  # type: ignore[call-overload]

    def _key_of(self, row: Row) -> tuple[Any, ...]:
        return tuple(getattr(row, name) for name in self.key)

    def _row(self, cells: Mapping[str, str]) -> Row:
        return self.row_type(**{name: _value(cells[name], self.types[name]) for name in self.columns})

    def _read(self) -> None:
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != self.columns:
                raise DataError(
                    f"{self.path} has other columns than this version writes; move it away or type --out with another folder"
                )
            for cells in reader:
                row = self._row(cells)
                self.rows[self._key_of(row)] = row


def write_csv(path: Path, rows: Sequence[Mapping[str, Cell]]) -> None:
    """Write the file whole; the columns are the first row's keys. Floats have six significant digits; None, NaN and infinite
    bounds are empty cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if rows:
        writer.writerow(rows[0])
        writer.writerows([_cell(value) for value in row.values()] for row in rows)
    write_whole(path, text.getvalue().encode())


def _cell(value: Cell) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(cell: str, kind: Any) -> Cell:
    if kind is str:
        return cell
    if cell == "":
        return None
    return int(cell) if kind in (int, int | None) else float(cell)
