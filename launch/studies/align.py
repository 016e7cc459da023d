"""``vlatune study align``: regression and RS-IMLE, begun with a pretrained flow policy; should they read its output as it was trained?

A flow expert's output is a velocity. Read as the action (`output` = action), it says something else than it was trained to say; read
as `x - v(x, 1)` (aligned), training begins at that expert's own one-step answer. With enough training on enough data both learn the
task, so training is short here, and on tasks that the pretrained policy has not seen (`transfer.py`): what of its
pretraining a run keeps then shows in how far it comes. Flow itself, trained on for as many steps, stands beside them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from .figures import MUTED
from .methods import METHODS
from .pocket_report import Arm
from .pocket_run import PocketRun
from .transfer import Start, TransferConfig, TransferSettings, run_transfer

OUTPUTS: dict[str, tuple[str, ...]] = {
    "flow": ("action",),
    "l1": ("aligned", "action"),
    "mse": ("aligned", "action"),
    "rs_imle": ("aligned", "action"),
}
"""Objective -> the ways to read its output that are compared; flow has one."""


@dataclass(frozen=True, kw_only=True)
class AlignConfig(TransferConfig):
    """Objectives that read a pretrained flow expert's output as a velocity or as the action, with paired tests. Stopped at any moment,
    the same command continues."""

    out: Path = Path("studies/align")
    """Folder for results.csv, summary.csv, pairs.csv, figure.png, findings.md, and the runs."""
    objectives: tuple[Literal["flow", "l1", "mse", "rs_imle"], ...] = ("flow", "l1", "rs_imle")
    """Which objectives."""
    trained: Literal["full", "expert"] = "full"
    """What is trained. All of it: an output that is read wrongly then also sends its gradient into the backbone."""
    settings: TransferSettings = field(default_factory=lambda: TransferSettings(num_steps=150))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.objectives:
            raise ValueError(f"--objectives needs at least one of {', '.join(OUTPUTS)}")

    def runs(self, start: Start) -> list[PocketRun]:
        """All runs, seed by seed: stopped early, the study has whole seeds."""
        scope = "" if self.trained == "full" else f"_{self.trained}"
        return [
            self.run_from(
                start,
                f"{name}_{output}{scope}_seed{seed}",
                objective=name,
                output=output,
                trained=self.trained,
                seed=seed,
            )
            for seed in self.seeds
            for name in self.objectives
            for output in OUTPUTS[name]
        ]


def arm_of(record: Mapping[str, Any]) -> Arm:
    """Runs of one objective whose output is read in one way, and that train the same."""
    name, is_aligned, trained = record["objective"], record["output"] == "aligned", record["trained"]
    parts = [("aligned" if is_aligned else "action")] if len(OUTPUTS[name]) > 1 else []
    parts += [] if trained == "full" else [trained]
    return Arm(
        (list(METHODS).index(name), not is_aligned, trained != "full"),
        "_".join([name, *parts]),
        ", ".join([METHODS[name].label, *parts]),
        METHODS[name].colour if is_aligned or len(OUTPUTS[name]) == 1 else MUTED,
    )


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(AlignConfig, args=argv, prog="vlatune study align", config=(tyro.conf.OmitArgPrefixes,))
    print(f"figure and tables: {run(config)}")


def run(config: AlignConfig, **replaced: Any) -> Path:
    """See `transfer.run_transfer`; `replaced` are its `train` and `evaluate`."""
    return run_transfer(
        config,
        config.runs,
        arm_of=arm_of,
        question="A pretrained flow policy trained on with other objectives, on held-out tasks.",
        **replaced,
    )
