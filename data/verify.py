"""``vlatune verify CACHE``: is a cache still what `prepare` made, and does it say what the demonstrations say?

Torch and pandas are imported where the work begins: `--help` answers at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .episodes import DataError


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check a cache: every file's checksum, what it says about itself and, with --demos, random frames against their source."""

    cache: Annotated[Path, tyro.conf.Positional]
    """The cache that `vlatune prepare` made."""
    demos: Path | None = None
    """What it was made from, as it was given to `prepare`: then frames are read from there again and compared."""
    samples: int = 64
    """Frames to compare with the demonstrations."""
    seed: int = 0
    """Which frames those are."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A check that passed."""

    check: str
    about: str
    """What was looked at, in words; begins with "not checked" where that could not be done, and says why."""


def verify(config: VerifyConfig) -> list[Finding]:
    """Every check in turn; raises `DataError` with one sentence at the first that fails."""
    return list(verification(config))


def verification(config: VerifyConfig) -> Iterator[Finding]:
    """`verify`, each finding as it comes."""
    from .cache import Cache, verify_cache
    from .cache_checks import CHECKS
    from .source_checks import check_frames, check_source

    cache = Cache.open(config.cache)
    verify_cache(config.cache)
    size = sum(record.size for record in cache.manifest.files.values())
    yield Finding(check="files", about=f"{len(cache.manifest.files)} files, {size / 2**20:,.1f} MiB: every checksum")
    for name, check in CHECKS.items():
        yield Finding(check=name, about=check(cache))
    if config.demos is not None:
        yield Finding(check="source", about=check_source(cache, config.demos))
        yield Finding(check="frames", about=check_frames(cache, config.demos, config.samples, config.seed))


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(VerifyConfig, args=argv, prog="vlatune verify")
    try:
        for finding in verification(config):
            print(f"{finding.check:10} {finding.about}", flush=True)
    except (DataError, ValueError) as error:
        raise SystemExit(f"vlatune verify: {error}") from None
    if config.demos is None:
        print("frames     not compared with the demonstrations: --demos PATH does that")


if __name__ == "__main__":
    main()
