"""What a frozen vision tower makes of a cache's pictures, kept on disk, so that training need not run the tower again at every step.

    manifest.json             which cache, which tower, and the size of every file
    features_<camera>.bin     (frames, N, D) bfloat16 or float32, in the order of the cache's frames

`FeatureWriter` makes it under a temporary name and renames it, so a folder with a manifest is whole.

Shape letters: N image tokens of a picture, D width.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch

from .cache import Cache, unfinished_path
from .cache_writer import differences
from .episodes import DataError

FORMAT = "vlatune vision features"
FORMAT_VERSION = 1
DTYPES: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class FeaturesPlan:
    """What a store is made from, and its sizes: two stores of one plan are the same store."""

    cache_digest: str
    num_frames: int
    cameras: tuple[str, ...]
    tower: Mapping[str, Any]
    """Its kind and sizes, and a digest of its weights."""
    dtype: Literal["bfloat16", "float32"]
    """Of the tower's weights, and so of its features."""
    shape: tuple[int, int]
    """(N, D) of one picture."""

    @property
    def row_bytes(self) -> int:
        """Of one picture's features."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def size_bytes(self) -> int:
        return size_bytes(self.num_frames, len(self.cameras), *self.shape, DTYPES[self.dtype].itemsize)

    @property
    def size_text(self) -> str:
        """How the size comes about, for a person."""
        tokens, width = self.shape
        return f"{self.num_frames:,} frames x {len(self.cameras)} cameras x {tokens} x {width} {self.dtype} = {in_gb(self.size_bytes)}"

    def differences(self, new: "FeaturesPlan") -> str:
        """For a person; empty if there are none."""
        return differences({}, _flat(self), {}, _flat(new))

    def to_json(self) -> dict[str, Any]:
        plan: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plan

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Raises `KeyError` or `TypeError` where a field is missing or unknown."""
        return cls(**{**value, "cameras": tuple(value["cameras"]), "shape": tuple(value["shape"])})


def size_bytes(num_frames: int, num_cameras: int, num_tokens: int, width: int, itemsize: int) -> int:
    """Of a store's files, the manifest aside."""
    return num_frames * num_cameras * num_tokens * width * itemsize


def in_gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 5e7 else f"{num_bytes / 1e9:.2g} GB"


def _flat(plan: FeaturesPlan) -> dict[str, Any]:
    """{"tower": {"type": …}} -> {"tower.type": …}."""
    flat = plan.to_json()
    return flat | {f"tower.{name}": value for name, value in flat.pop("tower").items()}


@dataclass(frozen=True, eq=False)
class FeatureStore:
    """A whole store, opened for reading."""

    path: Path
    plan: FeaturesPlan

    @classmethod
    def open(cls, path: Path, cache: Cache) -> Self:
        """Raises `DataError` if that is no whole store, or one of another cache's pictures."""
        plan, files = _read_manifest(path)
        for name, size in files.items():
            file = path / name
            if not file.is_file() or file.stat().st_size != size:
                there = f"{file.stat().st_size} bytes instead of {size}" if file.is_file() else "gone"
                raise DataError(
                    f"{file} is {there}: it was altered or cut; copy the features again, or delete them and run `vlatune features` again"
                )
        store = cls(path, plan)
        store.check_cache(cache)
        return store

    def check_cache(self, cache: Cache) -> None:
        """Raises `DataError` unless the features are of that cache's pictures."""
        if self.plan.cache_digest != cache.digest:
            raise DataError(
                f"the vision features {self.path} were made from another cache than {cache.path} (sha256 {self.plan.cache_digest[:8]}, not "
                f"{cache.digest[:8]}); make its own with `vlatune features {cache.path} …`"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D) of one picture."""
        return self.plan.shape

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.plan.dtype]

    def file(self, camera: str) -> Path:
        return self.path / file_name(camera)

    @cached_property
    def rows(self) -> Mapping[str, np.ndarray]:
        """camera -> (frames, bytes of a row) uint8, read-only memory map; bytes, since numpy has no bfloat16."""
        shape = (self.plan.num_frames, self.plan.row_bytes)
        return {
            camera: np.memmap(self.file(camera), np.uint8, mode="r", shape=shape).view(np.ndarray)
            for camera in self.plan.cameras
        }


def file_name(camera: str) -> str:
    return f"features_{camera}.bin"


def _read_manifest(path: Path) -> tuple[FeaturesPlan, Mapping[str, int]]:
    file = path / "manifest.json"
    if not file.is_file():
        if unfinished_path(path).exists():
            raise DataError(
                f"the vision features {path} are unfinished (see {unfinished_path(path)}); run the same `vlatune features` again: it continues"
            )
        missing = "there is nothing at" if not path.exists() else "no manifest.json is in"
        raise DataError(
            f"{missing} {path}: these are no vision features; make them with `vlatune features CACHE --out {path} …`"
        )
    try:
        value = json.loads(file.read_bytes())
        if not isinstance(value, dict) or (value.get("format"), value.get("format_version")) != (
            FORMAT,
            FORMAT_VERSION,
        ):
            raise DataError(
                f"{file} is not the manifest of vision features in format {FORMAT_VERSION}; make them with `vlatune features`"
            )
        return FeaturesPlan.from_json(value["plan"]), dict(value["files"])
    except (ValueError, KeyError, TypeError) as error:  # not JSON, or JSON of another shape
        raise DataError(
            f"{file} is damaged ({error!r}); delete the features and run `vlatune features` again"
        ) from error
