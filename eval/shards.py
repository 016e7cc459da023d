"""Splitting a sweep over machines: ``--shard 0/4`` … ``--shard 3/4``, each with its part of the episodes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The `index`-th of `count` parts, counted from 0 as SLURM counts an array's tasks."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """`2/8`. Raises `ValueError` for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise ValueError(
                f"--shard {text}: give the part and the number of parts, counted from 0, as 0/4, 1/4, 2/4 and 3/4; in a SLURM array: "
                "--shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
            )
        return cls(index=int(match[1]), count=int(match[2]))

    def folder(self, evaluation: Path) -> Path:
        """Where the part's rows are written."""
        return evaluation / f"shard-{self.index}-of-{self.count}"

    def part(self, items: Sequence[Item]) -> Sequence[Item]:
        """Neighbours stay together, so that a machine builds the simulators of few tasks; parts differ by one item at most."""
        return items[self.index * len(items) // self.count : (self.index + 1) * len(items) // self.count]


def shard_folders(evaluation: Path) -> list[Path]:
    """Those that lie in a folder, by number."""
    found = [(re.fullmatch(r"shard-(\d+)-of-(\d+)", path.name), path) for path in evaluation.glob("shard-*-of-*")]
    return [path for _, _, path in sorted((int(name[2]), int(name[1]), path) for name, path in found if name)]
