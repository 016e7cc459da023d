"""What a cache must say about itself, whatever it was made from.

Shape letters: N frames, D dimensions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from .cache import EPISODE_COLUMNS, Cache
from .episodes import DataError
from .files import json_bytes
from .normalise import FieldStatistics, Statistics
from .prepare import PrepareConfig, split_episodes
from .tokenizer import load_tokenizer

STATISTICS_TOLERANCE = 1e-9
"""Relative to a dimension's largest value: another version of numpy may add up in another order."""
BLOCK_FRAMES = 65536
"""Rows of numbers in memory at once."""


def settings_of(cache: Cache, demos: Path) -> PrepareConfig:
    """What `prepare` was asked for. Raises `DataError` if this version does not know those settings."""
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in cache.manifest.settings.items()
    }
    try:
        return PrepareConfig(demos=demos, out=cache.path, **settings)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the cache {cache.path} was prepared with settings that this vlatune does not know ({error}); verify it with the "
            "version that made it, or prepare it again"
        ) from error


def damaged(cache: Cache, what: str) -> DataError:
    return DataError(f"the cache {cache.path} {what}; delete it (rm -r {cache.path}) and run `vlatune prepare` again")


def _check_settings(cache: Cache) -> str:
    """The manifest agrees with itself."""
    manifest, settings = cache.manifest, settings_of(cache, Path())
    if manifest.image_rule != settings.image_rule:
        raise damaged(cache, f"says image rule {manifest.image_rule} and was prepared with {settings.image_rule}")
    if manifest.cameras != manifest.robot.cameras:
        raise damaged(cache, f"has cameras {manifest.cameras}, and its robot has {manifest.robot.cameras}")
    rule = f"{settings.orientation}, {settings.image_px} px, {settings.resize}"
    return f"pictures of {', '.join(manifest.cameras)} as prepare was asked for: {rule}"


def _check_rows(cache: Cache) -> str:
    manifest, px = cache.manifest, cache.image_rule.size_px
    row_bytes = {f"images_{camera}.u8": px * px * 3 for camera in manifest.cameras}
    row_bytes |= {"state.f32": 4 * len(cache.robot.state_names), "actions.f32": 4 * len(cache.robot.action_names)}
    for name, row in row_bytes.items():
        size = manifest.files[name].size if name in manifest.files else 0
        if size != row * manifest.num_frames:
            raise damaged(
                cache, f"has {size} bytes of {name}; {manifest.num_frames} frames are {row * manifest.num_frames}"
            )
    for name, rows in (("state.f32", cache.state_NS), ("actions.f32", cache.actions_NA)):
        for first in range(0, len(rows), BLOCK_FRAMES):
            finite_N = np.isfinite(rows[first : first + BLOCK_FRAMES]).all(axis=1)
            if not finite_N.all():
                raise damaged(
                    cache, f"has NaN or infinity in {name}, first in frame {first + int((~finite_N).argmax())}"
                )
    return f"{manifest.num_frames} frames in each of {len(row_bytes)} files; states and actions finite"


def _check_episodes(cache: Cache) -> str:
    manifest, episodes = cache.manifest, cache.episodes
    if tuple(episodes.columns) != EPISODE_COLUMNS:
        raise damaged(
            cache, f"has episode columns {', '.join(episodes.columns)} instead of {', '.join(EPISODE_COLUMNS)}"
        )
    expected = 0
    for k, (start, length) in enumerate(zip(episodes["start"], episodes["length"], strict=True)):
        if start != expected or length < 1:
            raise damaged(
                cache,
                f"has episode {k} at frames {start} to {start + length}; it must begin at {expected} and not be empty",
            )
        expected = start + length
    counts = {
        "num_frames": expected,
        "num_episodes": len(episodes),
        "num_validation_episodes": int((episodes["split"] == "validation").sum()),
        "num_tasks": int(episodes["task"].nunique()),
    }
    for name, counted in counts.items():
        if getattr(manifest, name) != counted:
            raise damaged(cache, f"says {name} {getattr(manifest, name)}, and episodes.parquet has {counted}")
    if not episodes["source"].is_unique:
        twice = episodes["source"][episodes["source"].duplicated()].iloc[0]
        raise damaged(cache, f"has episode {twice} twice")
    return (
        f"{len(episodes)} episodes of {counts['num_tasks']} tasks follow each other without a gap and cover every frame"
    )


def _check_splits(cache: Cache) -> str:
    episodes, share = cache.episodes, settings_of(cache, Path()).validation_share
    expected = split_episodes(list(episodes["task"]), list(episodes["source"]), share)
    for source, split, right in zip(episodes["source"], episodes["split"], expected, strict=True):
        if split != right:
            raise damaged(cache, f"has {source} in {split!r}, and a validation share of {share} puts it into {right!r}")
    counts = f"{expected.count('train')} training and {expected.count('validation')} validation episodes"
    return f"{counts}, as a validation share of {share:g} gives them"


def _check_statistics(cache: Cache) -> str:
    train_N = np.repeat((cache.episodes["split"] == "train").to_numpy(), cache.episodes["length"])
    right = Statistics.compute(cache.state_NS, cache.actions_NA, train_N)
    for field, names in (("state", cache.robot.state_names), ("actions", cache.robot.action_names)):
        _compare_statistics(cache, getattr(cache.statistics, field), getattr(right, field), field, names)
    return f"statistics.json is what {int(train_N.sum())} training frames give, computed again"


def _compare_statistics(
    cache: Cache, said: FieldStatistics, right: FieldStatistics, field: str, names: Sequence[str]
) -> None:
    if said.count != right.count:
        raise damaged(
            cache, f"has statistics of {said.count} {field} rows, and there are {right.count} training frames"
        )
    largest_D = np.maximum(np.abs(np.array(right.min)), np.abs(np.array(right.max)))
    for name in (field.name for field in fields(right) if field.name != "count"):
        said_D, right_D = np.array(getattr(said, name) or ()), np.array(getattr(right, name))
        if said_D.shape != right_D.shape:
            raise damaged(
                cache,
                f"has {said_D.size} numbers of {name} in its {field} statistics; there are {right_D.size} dimensions",
            )
        wrong_D = ~(np.abs(said_D - right_D) <= STATISTICS_TOLERANCE * largest_D)
        if wrong_D.any():
            d = int(wrong_D.argmax())
            raise damaged(
                cache, f"says {name} of {field} {names[d]} is {said_D[d]:.6g}, and its frames give {right_D[d]:.6g}"
            )


def _check_language(cache: Cache) -> str:
    texts = sorted(set(cache.episodes["instruction"]))
    for text in texts:
        if text not in cache.language.known_texts:
            raise damaged(cache, f"has an episode with the instruction {text!r}, which its language does not know")
    if json_bytes(cache.language.identity) != json_bytes(cache.manifest.language):
        raise damaged(cache, "has another language than its manifest says")
    if cache.language.embedding_width is None:
        return f"every one of {len(texts)} instructions is in its table; no text encoder"
    for text in texts:
        embedding_BLE = cache.language.prompts([text], embeddings=True).embedding_BLE
        if embedding_BLE is None or not embedding_BLE.isfinite().all():
            raise damaged(cache, f"has NaN or infinity in the embedding of {text!r}")
    width = cache.language.embedding_width
    return f"every one of {len(texts)} instructions is in its table; embeddings finite, {width} wide"


def _check_tokens(cache: Cache) -> str:
    """Only a public tokenizer that was not saved with the cache can be out of reach, which is no damage."""
    tokenizer = load_tokenizer(cache.manifest.language["tokenizer"], cache.path / "language")
    texts = sorted(set(cache.episodes["instruction"]))
    try:
        fresh = [tokenizer.encode(text) for text in texts]
    except DataError as error:
        return f"not checked: {error}"
    for text, right in zip(texts, fresh, strict=True):
        prompts = cache.language.prompts([text])
        said = prompts.ids_BL[0][prompts.mask_BL[0]].tolist()
        if said != right:
            raise damaged(cache, f"has token ids {said} for {text!r}, and its tokenizer gives {right}")
    return f"its tokenizer gives the stored ids again, {sum(map(len, fresh))} tokens"


CHECKS: Mapping[str, Callable[[Cache], str]] = {
    "settings": _check_settings,
    "rows": _check_rows,
    "episodes": _check_episodes,
    "splits": _check_splits,
    "statistics": _check_statistics,
    "language": _check_language,
    "tokens": _check_tokens,
}
"""What needs the cache alone: each says what it looked at or raises `DataError`."""
