"""openpi's norm_stats.json: where its checkpoints leave it, and what is in it."""

import json
from pathlib import Path

from ...data.episodes import DataError
from ...data.normalise import FieldStatistics, Statistics
from .lerobot_processors import hardly_any_room, unit_room, with_room

FILE = "norm_stats.json"
COLUMNS = ("mean", "std", "q01", "q99")
EPSILON = 1e-6
"""openpi's, added to what it divides by; dimensions of a smaller scale are constant to it."""


def find_norm_stats(checkpoint: Path, asset_id: str | None) -> Path:
    """In the checkpoint's `assets/<asset id>/`, or in that of the folder above, where a conversion leaves them.

    An asset id may itself be a path, as physical-intelligence/libero. Raises DataError if there is none, or several and no
    `asset_id` to choose."""
    places = (checkpoint / "assets", checkpoint.resolve().parent / "assets")
    found = [{str(file.parent.relative_to(place)): file for file in sorted(place.rglob(FILE))} for place in places]
    for files in found:
        if asset_id is None and len(files) == 1:
            return next(iter(files.values()))
        if asset_id in files:
            return files[asset_id]
        if asset_id is None and files:
            raise DataError(f"{checkpoint} has the asset ids {', '.join(files)}; choose one with --asset-id")
    if any(found):
        ids = ", ".join(sorted({name for files in found for name in files}))
        raise DataError(f"{checkpoint} has no asset id {asset_id!r}; it has {ids}: choose one with --asset-id")
    raise DataError(
        f"there is no assets/…/{FILE} in {checkpoint} or above it; copy openpi's assets folder there, or add --statistics FILE (a "
        "normalisation.json, or a cache's statistics.json)"
    )


def read_norm_stats(file: Path) -> Statistics:
    """Raises DataError if it holds something else. Old files have no quantiles."""
    try:
        fields = json.loads(file.read_text())["norm_stats"]
        # As LeRobot, openpi has the one value of a constant dimension at -1 (its quantiles), and a constant action is constant.
        state = with_room(_field(fields["state"]), EPSILON, unit_room, constant_at=-1.0)
        actions = with_room(
            _field(fields["actions"]), EPSILON, lambda value: max(2 * EPSILON, hardly_any_room(value)), constant_at=-1.0
        )
        return Statistics(state=state, actions=actions)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} does not hold openpi's statistics ({error!r}); copy it again") from error


def _field(columns: dict[str, list[float] | None]) -> FieldStatistics:
    known = {name: columns.get(name) for name in COLUMNS}
    return FieldStatistics(
        **{name: None if column is None else tuple(map(float, column)) for name, column in known.items()}, count=0
    )
