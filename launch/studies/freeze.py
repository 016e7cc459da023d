"""``vlatune study freeze``: a pretrained policy learns held-out tasks; train its expert alone, adapters, or everything?

All runs begin with one flow policy that was trained on other tasks of pocket (`transfer.py`): freezing a random backbone would
show nothing. Beside them stands that policy itself, which has trained on none of the held-out tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from .figures import MUTED
from .pocket_report import Arm
from .pocket_run import PocketRun
from .transfer import Start, TransferConfig, run_transfer

ARMS = {
    "none": ("pretrained, as it is", MUTED),
    "statistics": ("pretrained, new statistics", MUTED),
    "expert": ("expert alone", "#d69e2e"),
    "lora": ("LoRA", "#2f9e63"),
    "full": ("everything", "#2b6cb0"),
}
"""What is trained -> label and colour, in the order of figures."""
UNTRAINED = ("none", "statistics")
"""Judged once: they have no training seed, and stand beside the others' seed 0."""


@dataclass(frozen=True, kw_only=True)
class FreezeConfig(TransferConfig):
    """Expert alone, LoRA (its default scopes: attention of backbone and expert) or everything, from one pretrained policy on held-out
    tasks, with paired tests. Stopped at any moment, the same command continues."""

    out: Path = Path("studies/freeze")
    """Folder for results.csv, summary.csv, pairs.csv, figure.png, findings.md, and the runs."""
    trained: tuple[Literal["expert", "lora", "full"], ...] = ("expert", "lora", "full")
    """What is trained, each in runs of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.trained:
            raise ValueError("--trained needs at least one of expert, lora, full")

    def runs(self, start: Start) -> list[PocketRun]:
        """The pretrained policy, then all runs, seed by seed: stopped early, the study has whole seeds."""
        untrained = [self.run_from(start, trained, trained=trained) for trained in UNTRAINED]
        return untrained + [
            self.run_from(start, f"{trained}_seed{seed}", trained=trained, seed=seed)
            for seed in self.seeds
            for trained in self.trained
        ]


def arm_of(record: Mapping[str, Any]) -> Arm:
    """Runs that train the same."""
    trained = record["trained"]
    return Arm((list(ARMS).index(trained),), trained, *ARMS[trained])


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(FreezeConfig, args=argv, prog="vlatune study freeze", config=(tyro.conf.OmitArgPrefixes,))
    print(f"figure and tables: {run(config)}")


def run(config: FreezeConfig, **replaced: Any) -> Path:
    """See `transfer.run_transfer`; `replaced` are its `train` and `evaluate`."""
    return run_transfer(
        config,
        config.runs,
        arm_of=arm_of,
        question="What to train of a pretrained policy on held-out tasks.",
        remarks=["That policy itself is judged once, as it is and with the held-out tasks' statistics."],
        **replaced,
    )
