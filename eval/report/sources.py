"""The rows of several CSVs, and which of them are of the same run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from ...data.episodes import DataError
from ..results import EpisodeKey, locate, read

KEY = [field.name for field in fields(EpisodeKey)]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One run's rows in one CSV."""

    path: Path
    """As it was given."""
    run: str
    rows: pd.DataFrame
    """With the column `folder`: where the CSV lies, which its videos are relative to."""
    chosen: Mapping[str, Any] | None
    """`chosen.json` beside the CSV, if it is this run's."""

    @property
    def weights(self) -> set[str]:
        return set(self.rows.loc[self.rows["actor"] == "policy", "weights_hash"])


def read_runs(paths: Sequence[Path]) -> "dict[str, tuple[pd.DataFrame, Mapping[str, Any] | None]]":
    """Name -> (rows, choice) of every run in the CSVs that has episodes of a policy, in the order given.

    Shards of one sweep are one run: they name the same run and have a policy's weights in common. Other runs of the same name are
    told apart by the path that they came from. Raises `DataError` where there is no such file, no policy's episode, or where two rows
    of one episode say different things."""
    runs: list[list[Source]] = []
    for source in [source for path in dict.fromkeys(paths) for source in _sources(path)]:
        for parts in runs:
            if parts[0].run == source.run and any(part.weights & source.weights for part in parts):
                parts.append(source)
                break
        else:
            runs.append([source])
    if not runs:
        raise DataError(f"no row of a policy in {', '.join(map(str, paths))}; `vlatune sweep RUN` runs episodes of one")
    names = [parts[0].run for parts in runs]
    named = {}
    for parts in runs:
        name = parts[0].run if names.count(parts[0].run) == 1 else f"{parts[0].run} ({parts[0].path})"
        chosen = next((part.chosen for part in parts if part.chosen is not None), None)
        named[name] = _joined(name, parts), chosen
    return named


def _sources(path: Path) -> list[Source]:
    csv = locate(path)
    rows = read(csv).assign(folder=str(csv.parent))
    if rows.empty:
        raise DataError(f"{csv} has no episode yet; `vlatune sweep RUN` runs them, or leave it out")
    chosen_file = csv.parent / "chosen.json"
    chosen = json.loads(chosen_file.read_text()) if chosen_file.is_file() else None
    return [
        Source(path=path, run=str(run), rows=of_run, chosen=chosen if chosen and chosen["run"] == run else None)
        for run, of_run in rows.groupby("run", sort=False)
        if (of_run["actor"] == "policy").any()
    ]


def _joined(name: str, parts: Sequence[Source]) -> pd.DataFrame:
    """All rows, an episode once: where one part has an error and another the episode, the episode."""
    rows = pd.concat([part.rows for part in parts], ignore_index=True)
    ended = rows[rows["outcome"] != "error"].drop_duplicates([*KEY, "outcome"])
    twice = ended[ended.duplicated(KEY)]
    if len(twice):
        row = twice.iloc[0]
        raise DataError(
            f"run {name}: two rows of one episode say success and failure ({row['checkpoint']}, {row['suite']} task {row['task_id']}, init "
            f"state {row['init_state']}, seed {row['seed']}) in {', '.join(str(part.path) for part in parts)}; give only the file that is right"
        )
    ended_first = rows.sort_values("outcome", key=lambda outcome: outcome == "error", kind="stable")
    return ended_first.drop_duplicates(KEY).sort_index().reset_index(drop=True)
