"""openpi's norm_stats.json: where its checkpoints leave it, and what is in it."""

import json
from pathlib import Path

from ...data.episodes import DataError
from ...data.normalise import FieldStatistics, Statistics

FILE = "norm_stats.json"
COLUMNS = ("mean", "std", "q01", "q99")


def find_norm_stats(checkpoint: Path, asset_id: str | None) -> Path:
    """In the checkpoint's `assets/<asset id>/`, or in that of the folder above, where a conversion leaves them.

    An asset id may itself be a path, as physical-intelligence/libero. Raises DataError if there is none, or several and no
    `asset_id` to choose."""
    for assets in (checkpoint / "assets", checkpoint.parent / "assets"):
        found = {str(file.parent.relative_to(assets)): file for file in sorted(assets.rglob(FILE))}
        if asset_id is not None and asset_id in found:
            return found[asset_id]
        if found and (asset_id is not None or len(found) > 1):
            raise DataError(f"{assets} has the asset ids {', '.join(found)}; choose one with --asset-id")
        if found:
            return next(iter(found.values()))
    raise DataError(
        f"there is no assets/…/{FILE} in {checkpoint} or above it; copy openpi's assets folder there, or add --statistics FILE (a "
        "normalisation.json, or a cache's statistics.json)"
    )


def read_norm_stats(file: Path) -> Statistics:
    """Raises DataError if it holds something else. Old files have no quantiles."""
    try:
        fields = json.loads(file.read_text())["norm_stats"]
        return Statistics(state=_field(fields["state"]), actions=_field(fields["actions"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} does not hold openpi's statistics ({error!r}); copy it again") from error


def _field(columns: dict[str, list[float] | None]) -> FieldStatistics:
    known = {name: columns.get(name) for name in COLUMNS}
    return FieldStatistics(
        **{name: None if column is None else tuple(map(float, column)) for name, column in known.items()}, count=0
    )
