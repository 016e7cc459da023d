"""A training run on disk, as evaluation sees it: its complete checkpoints, and where results go."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ..data.episodes import DataError
from ..policy.checkpoints.layout import COMPLETE, EMA, complete_checkpoints, planned_steps


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights to act with."""

    path: Path
    step: int | None
    """Optimizer step; None for a converted one, which knows of none."""
    averaged: bool = False
    """Whether the average over training (EMA) acts in place of the weights themselves."""

    @property
    def name(self) -> str:
        """As the column `checkpoint` has it: `step_000400`, `step_000400-ema`."""
        return f"{self.path.name}-ema" if self.averaged else self.path.name


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """`runs/<name>`: `config.json`, `metrics.csv`, `checkpoints/step_000400/…`; or one checkpoint that belongs to no run."""

    path: Path
    named: tuple[int, ...] = ()
    """Steps of the checkpoints that were given by their own folders in place of the run; empty: all."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    def checkpoints(self, steps: Sequence[int | str] = (), *, waiting: bool = False) -> list[Checkpoint]:
        """The complete checkpoints of trained policies, by step; of these `steps`, if any are given: numbers, `last`, or patterns for a
        number such as `*000`. Raises `DataError` if there is none, or for a step or pattern that none has; not of a run that is still
        `waiting` for some, whose last one is not there either."""
        if _is_checkpoint(self.path):
            if steps:
                raise DataError(
                    f"{self.path} is one checkpoint and no run; leave out --steps {' '.join(map(str, steps))}"
                )
            return [Checkpoint(path=self.path, step=None)]
        complete = [found for found in self._complete() if found.step]
        if not complete and not waiting:
            raise DataError(
                f"no complete checkpoint in {self.path / 'checkpoints'} (step_…/COMPLETE, beyond step 0); "
                f"train it first: `vlatune train` writes them there"
            )
        there = [str(found.step) for found in complete]
        wanted: set[str] = set()
        lacking = []
        for step in (*self.named, *steps):
            matching = {name for name in there if fnmatchcase(name, str(step))}
            if step == "last" and not waiting:
                matching = {there[-1]}
            wanted |= matching
            lacking += [] if matching else [str(step)]
        if lacking and not waiting:
            raise DataError(
                f"{self.path} has no complete checkpoint of step {', '.join(lacking)}; it has {', '.join(there)}; give these, `last` or a "
                "pattern such as '*000'"
            )
        return [found for found in complete if str(found.step) in wanted or not (self.named or steps)]

    def untrained(self) -> Checkpoint:
        """The policy before its first step. Raises `DataError` if the run has not kept it."""
        for found in self._complete():
            if found.step == 0:
                return found
        raise DataError(
            f"{self.path} has no complete checkpoints/step_000000, the untrained policy that the controls need; "
            f"train again, or sweep with --no-controls"
        )

    def awaited_step(self, steps: Sequence[int | str] = ()) -> int | None:
        """The step with which training ends, while it has not come to that; None afterwards, or if all `steps` are numbers and are there.
        Raises `DataError` where nothing tells."""
        there = {found.step for found in self._complete()}
        if steps and there.issuperset(steps):
            return None
        try:
            last = planned_steps(self.path)
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(
                f"{self.path} has no config.json of a training run, so that nothing tells when it ends; sweep without --watch"
            ) from None
        return None if last in there else last

    def _complete(self) -> list[Checkpoint]:
        return [Checkpoint(path=path, step=step) for step, path in complete_checkpoints(self.path).items()]


def find_run(path: Path) -> RunFolder:
    """The run at `path`, or the one whose checkpoint lies at `path`; raises `DataError` with a suggestion if there is no such folder."""
    if path.is_dir():
        step = re.fullmatch(r"step_(\d+)", path.name)
        if step and path.resolve().parent.name == "checkpoints" and _is_checkpoint(path):
            run = path.parent.parent if len(path.parts) > 2 else path.resolve().parent.parent
            return RunFolder(path=run, named=(int(step[1]),))
        return RunFolder(path=path)
    siblings = [folder.name for folder in path.parent.glob("*") if folder.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"did you mean {path.parent / close[0]}?" if close else "`vlatune train` writes runs under runs/"
    raise DataError(f"there is no run folder {path}; {hint}")


def find_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """The runs at `paths`, each once; several checkpoints of a run are one run of which those are compared."""
    found: dict[Path, RunFolder] = {}
    for run in map(find_run, paths):
        other = found.get(run.path.resolve())
        everything = other is not None and not (other.named and run.named)
        named = () if everything else (*(other.named if other else ()), *run.named)
        found[run.path.resolve()] = RunFolder(path=run.path, named=named)
    return list(found.values())


def checkpoint_at(path: Path, run: RunFolder, *, averaged: bool) -> Checkpoint:
    """That in this folder, the untrained one too, or else the run's last. Raises `DataError` if there is none, or no average."""
    if _is_checkpoint(path):
        step = re.fullmatch(r"step_(\d+)", path.name)
        found = Checkpoint(path=path, step=int(step[1]) if step else None)
    else:
        found = run.checkpoints()[-1]
    found = replace(found, averaged=averaged)
    check_average(found)
    return found


def check_average(checkpoint: Checkpoint) -> None:
    """Raises `DataError` where the average over training is wanted and the run kept none."""
    if checkpoint.averaged and not (checkpoint.path / EMA).is_file():
        raise DataError(f"{checkpoint.path} has no {EMA}: its run kept no average (ema.decay 0); give --weights raw")


def _is_checkpoint(path: Path) -> bool:
    return (path / COMPLETE).is_file()
