"""The cache on disk: prepared demonstrations that training reads by memory map.

    manifest.json           what it was built from and how, and a checksum of every other file; no clock time
    images_<camera>.u8      (N, px, px, 3) uint8: turned upright, padded to a square, resized
    state.f32               (N, S) float32, raw units
    actions.f32             (N, A) float32, raw units
    episodes.parquet        start, length, suite, task, instruction, source, split ("train" or "validation")
    language/               tokenizer, token ids and embeddings of every instruction
    statistics.json         of the training episodes' states and actions

`prepare.py` makes it under a temporary name and renames it, so a folder with a manifest is whole. Equal inputs give equal
bytes. Shape letters: N frames, S state dims, A action dims.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from tqdm import tqdm

from .episodes import DataError
from .files import file_sha256, json_bytes
from .images import ImageRule
from .language import Language
from .normalise import Statistics
from .robots.card import RobotCard

FORMAT = "vlatune cache"
FORMAT_VERSION = 2
EPISODE_COLUMNS = ("start", "length", "suite", "task", "instruction", "source", "split")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file of the cache must be."""

    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The cache's one source of truth."""

    source: Mapping[str, str]
    """The source's fingerprint: file -> size and digest."""
    settings: Mapping[str, Any]
    """What `prepare` was asked for: two caches of equal source and settings are equal."""
    robot: RobotCard
    image_rule: ImageRule
    cameras: tuple[str, ...]
    language: Mapping[str, Any]
    """Identity of tokenizer and encoder."""
    num_frames: int
    num_episodes: int
    num_validation_episodes: int
    num_tasks: int
    files: Mapping[str, FileRecord]
    """Path within the cache -> size and checksum."""

    def to_bytes(self) -> bytes:
        value = {**asdict(self), "image_rule": self.image_rule.to_json()}
        return json_bytes({"format": FORMAT, "format_version": FORMAT_VERSION, **value})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Raises `KeyError` or `TypeError` where a field is missing or unknown."""
        fields = {name: item for name, item in value.items() if name not in ("format", "format_version")}
        robot: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in value["robot"].items()}
        fields["robot"] = RobotCard(**robot)
        fields["image_rule"] = ImageRule.from_json(value["image_rule"])
        fields["cameras"] = tuple(value["cameras"])
        fields["files"] = {name: FileRecord(**record) for name, record in value["files"].items()}
        return cls(**fields)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the cache at `path`; raises `DataError` if that is no cache, unfinished, or of another format."""
    file = path / "manifest.json"
    if not file.is_file():
        if unfinished_path(path).exists():
            raise DataError(
                f"the cache {path} is unfinished (see {unfinished_path(path)}); run the same `vlatune prepare` again: it continues"
            )
        missing = "there is nothing at" if not path.exists() else "no manifest.json is in"
        raise DataError(f"{missing} {path}: it is not a cache; make one with `vlatune prepare DEMOS --out {path}`")
    try:
        value = json.loads(file.read_bytes())
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise DataError(f"{file} is not the manifest of a vlatune cache; make one with `vlatune prepare`")
        if value.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"the cache {path} has format version {value.get('format_version')}, this vlatune reads {FORMAT_VERSION}; "
                "delete it and run `vlatune prepare` again"
            )
        return Manifest.from_json(value)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, or JSON of another shape
        raise DataError(f"{file} is damaged ({error!r}); delete the cache and run `vlatune prepare` again") from error


def unfinished_path(path: Path) -> Path:
    """Where `prepare` works until the cache at `path` is whole."""
    return path.with_name(f"{path.name}.unfinished")


@dataclass(frozen=True, eq=False)
class Cache:
    """A whole cache, opened for reading."""

    path: Path
    manifest: Manifest
    language_path: Path
    """The folder of its language: its own, or one that `vlatune embed` made of its instructions."""

    @classmethod
    def open(cls, path: Path | str, language: Path | None = None) -> Self:
        """Checks the manifest and every file's size (`verify_cache` also reads them); raises `DataError`.

        `language` stands in for the cache's own."""
        path = Path(path)
        manifest = read_manifest(path)
        for name, record in manifest.files.items():
            file = path / name
            if not file.is_file():
                raise DataError(
                    f"the cache {path} lacks {name}; copy it whole, or delete it and run `vlatune prepare` again"
                )
            if file.stat().st_size != record.size:
                raise DataError(
                    f"{file} has {file.stat().st_size} bytes instead of {record.size}: it was altered or cut; copy the cache "
                    "again, or delete it and run `vlatune prepare` again"
                )
        return cls(path, manifest, path / "language" if language is None else language)

    @property
    def robot(self) -> RobotCard:
        return self.manifest.robot

    @property
    def image_rule(self) -> ImageRule:
        return self.manifest.image_rule

    @property
    def num_frames(self) -> int:
        return self.manifest.num_frames

    @cached_property
    def statistics(self) -> Statistics:
        return Statistics.load(self.path / "statistics.json")

    @cached_property
    def language(self) -> Language:
        return Language.load(self.language_path)

    @cached_property
    def episodes(self) -> pd.DataFrame:
        """One row an episode, in the order of its frames; columns as in `EPISODE_COLUMNS`."""
        return pd.read_parquet(self.path / "episodes.parquet")

    @cached_property
    def images(self) -> Mapping[str, np.ndarray]:
        """camera -> (N, px, px, 3) uint8, read-only memory map."""
        px = self.image_rule.size_px
        return {camera: self._mapped(f"images_{camera}.u8", np.uint8, (px, px, 3)) for camera in self.manifest.cameras}

    @cached_property
    def state_NS(self) -> np.ndarray:
        """float32, read-only memory map."""
        return self._mapped("state.f32", np.float32, (len(self.robot.state_names),))

    @cached_property
    def actions_NA(self) -> np.ndarray:
        """float32, read-only memory map."""
        return self._mapped("actions.f32", np.float32, (len(self.robot.action_names),))

    @cached_property
    def digest(self) -> str:
        """sha256 of the manifest, and through its checksums of everything in the cache."""
        return hashlib.sha256((self.path / "manifest.json").read_bytes()).hexdigest()

    @cached_property
    def language_digest(self) -> str:
        """sha256 over the files of its language."""
        digest = hashlib.sha256()
        for file in sorted(file for file in self.language_path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(self.language_path).as_posix()} {file_sha256(file)}\n".encode())
        return digest.hexdigest()

    def _mapped(self, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
        mapped = np.memmap(self.path / name, dtype, mode="r", shape=(self.num_frames, *shape))
        return mapped.view(np.ndarray)  # same memory, without memmap's cost per indexing


def verify_cache(path: Path | str) -> None:
    """Read and hash every file; raises `DataError` naming the first one that was altered."""
    cache = Cache.open(path)
    for name, record in tqdm(cache.manifest.files.items(), desc="checksums", unit="file", disable=None):
        if file_sha256(cache.path / name) != record.sha256:
            raise DataError(
                f"{cache.path / name} was altered: its checksum is not the manifest's; copy the cache again, or delete it and "
                "run `vlatune prepare` again"
            )
