"""A training run on disk, as evaluation sees it: its complete checkpoints, and where results go."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.episodes import DataError
from ..policy.checkpoints.layout import complete_checkpoints


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    path: Path
    step: int

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """`runs/<name>`: `config.json`, `metrics.csv`, `checkpoints/step_000400/…`."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    def checkpoints(self, steps: Sequence[int] = ()) -> list[Checkpoint]:
        """The complete checkpoints of trained policies (`steps` of them, if any are named), by step. Raises `DataError` if there
        is none, or not one of those named."""
        complete = [found for found in self._complete() if found.step > 0]
        if not complete:
            raise DataError(
                f"no complete checkpoint in {self.path / 'checkpoints'} (step_…/COMPLETE, beyond step 0); "
                f"train it first: `vlatune train` writes them there"
            )
        lacking = sorted(set(steps) - {found.step for found in complete})
        if lacking:
            raise DataError(
                f"{self.path} has no complete checkpoint of step {', '.join(map(str, lacking))}; "
                f"it has {', '.join(str(found.step) for found in complete)}"
            )
        return [found for found in complete if not steps or found.step in steps]

    def untrained(self) -> Checkpoint:
        """The policy before its first step. Raises `DataError` if the run has not kept it."""
        for found in self._complete():
            if found.step == 0:
                return found
        raise DataError(
            f"{self.path} has no complete checkpoints/step_000000, the untrained policy that the controls need; "
            f"train again, or sweep with --no-controls"
        )

    def _complete(self) -> list[Checkpoint]:
        return [Checkpoint(path=path, step=step) for step, path in complete_checkpoints(self.path).items()]


def find_run(path: Path) -> RunFolder:
    """The run at `path`; raises `DataError` with a suggestion if there is no such folder."""
    if path.is_dir():
        return RunFolder(path=path)
    siblings = [folder.name for folder in path.parent.glob("*") if folder.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"did you mean {path.parent / close[0]}?" if close else "`vlatune train` writes runs under runs/"
    raise DataError(f"there is no run folder {path}; {hint}")
