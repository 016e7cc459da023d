"""``vlatune study chunk``: how long should an action chunk be? One policy on pocket with chunks of several lengths.

Length and how soon the policy looks again are two things: every length is judged with the same numbers of executed steps.
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

COLOURS = {4: "#9cc0e7", 8: "#2b6cb0"}
OTHER_COLOUR = "#6b8f71"


@dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """Chunk lengths on one pocket recipe, same steps and seeds, with paired tests. Stopped at any moment, the same command
    continues."""

    out: Path = Path("studies/chunk")
    """Folder for results.csv, summary.csv, pairs.csv, figure.png, findings.md, and the runs."""
    cache: Path | None = None
    """A cache of pocket that is there, for instance runs/quickstart/cache; made in OUT if not given."""
    horizons: tuple[int, ...] = (4, 16, 50)
    """Chunk lengths, in control steps (20 a second)."""
    num_executed_steps: tuple[int, ...] = (4, 8)
    """Actions executed before the next decision; each run is judged with those that its chunks are long enough for."""
    objective: str = "flow"
    """The objective of all runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds."""
    settings: PocketSettings = field(default_factory=PocketSettings)

    def __post_init__(self) -> None:
        check_methods([self.objective], "--objective")
        if not (self.seeds and self.horizons and self.num_executed_steps):
            raise ValueError("--seeds, --horizons and --num-executed-steps need at least one value each")
        if min(self.num_executed_steps) < 1 or min(self.num_executed_steps) > min(self.horizons):
            raise ValueError(
                f"--num-executed-steps is {self.num_executed_steps} and the shortest of --horizons {min(self.horizons)}; one of the "
                f"first must be from 1 to {min(self.horizons)}, or that chunk length is never judged"
            )

    def runs(self) -> list[PocketRun]:
        """All runs, seed by seed: stopped early, the study has whole seeds."""
        return [
            PocketRun(
                out=self.out / "runs" / f"{self.objective}_chunk{horizon}_seed{seed}",
                cache=self.cache or self.out / "cache",
                objective=self.objective,
                horizon=horizon,
                seed=seed,
                num_steps=self.settings.num_steps,
            )
            for seed in self.seeds
            for horizon in self.horizons
        ]


def arm_of(record: Mapping[str, Any]) -> Arm:
    """Runs of one objective, chunk length and number of executed steps."""
    objective, horizon, executed = record["objective"], record["horizon"], record["num_executed_steps"]
    order = (list(METHODS).index(objective), executed, horizon)
    of_others = "" if objective == "flow" else f"{METHODS[objective].label}, "
    return Arm(
        order,
        f"{objective}_chunk{horizon}_executed{executed}",
        f"{of_others}chunk {horizon}, {executed} executed",
        COLOURS.get(executed, OTHER_COLOUR),
    )


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(ChunkConfig, args=argv, prog="vlatune study chunk", config=(tyro.conf.OmitArgPrefixes,))
    print(f"figure and tables: {run(config)}")


def run(config: ChunkConfig, **replaced: Any) -> Path:
    """See `pocket.run_study`; `replaced` are its `train` and `evaluate`."""
    return run_study(
        config.out,
        config.cache,
        config.settings,
        config.runs(),
        executed=config.num_executed_steps,
        arm_of=arm_of,
        question="Chunk lengths on one pocket recipe.",
        **replaced,
    )
