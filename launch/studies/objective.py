"""``vlatune study objective``: one policy on pocket, every objective in turn; which succeeds more often?

The recipe is the quickstart's; backbone, expert, data, steps and seeds are the same in every run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from .methods import METHODS, check_methods
from .pocket import PocketSettings, run_study
from .pocket_report import Arm
from .pocket_run import PocketRun

NUM_EXECUTED_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Objectives on one pocket recipe, same steps and seeds, with paired tests. Stopped at any moment, the same command
    continues."""

    out: Path = Path("studies/objective")
    """Folder for results.csv, summary.csv, pairs.csv, figure.png, findings.md, and the runs."""
    cache: Path | None = None
    """A cache of pocket that is there, for instance runs/quickstart/cache; made in OUT if not given."""
    objectives: tuple[str, ...] = ("flow", "l1", "diffusion", "rs_imle")
    """Which objectives."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds."""
    settings: PocketSettings = field(default_factory=PocketSettings)

    def __post_init__(self) -> None:
        check_methods(self.objectives)
        if not self.seeds:
            raise ValueError("--seeds needs at least one value")

    def runs(self) -> list[PocketRun]:
        """All runs, seed by seed: stopped early, the study has whole seeds."""
        return [
            PocketRun(
                out=self.out / "runs" / f"{name}_seed{seed}",
                cache=self.cache or self.out / "cache",
                objective=name,
                seed=seed,
                num_steps=self.settings.num_steps,
            )
            for seed in self.seeds
            for name in self.objectives
        ]


def arm_of(record: Mapping[str, Any]) -> Arm:
    """Runs of one objective."""
    name = record["objective"]
    return Arm((list(METHODS).index(name),), name, METHODS[name].label, METHODS[name].colour)


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(ObjectiveConfig, args=argv, prog="vlatune study objective", config=(tyro.conf.OmitArgPrefixes,))
    print(f"figure and tables: {run(config)}")


def run(config: ObjectiveConfig, **replaced: Any) -> Path:
    """See `pocket.run_study`; `replaced` are its `train` and `evaluate`."""
    return run_study(
        config.out,
        config.cache,
        config.settings,
        config.runs(),
        executed=(NUM_EXECUTED_STEPS,),
        arm_of=arm_of,
        question="Objectives on one pocket recipe.",
        **replaced,
    )
