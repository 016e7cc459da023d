"""One training run of a study on pocket: the quickstart's recipe with another objective, chunk length, seed or beginning.

Started by the studies, in as many processes as the machine is good for: `deepspeed --module vlatune.launch.studies.pocket_run …`
"""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from ...data.episodes import DataError
from ...policy.checkpoints.layout import checkpoint_name, complete_checkpoints
from ...policy.objectives import ObjectiveConfig
from ...policy.objectives.regression import Regression
from ...policy.objectives.rs_imle import RSIMLE
from ...train.config import TrainConfig
from ...train.recipes import load_recipe
from ...train.run import train
from .methods import METHODS, check_methods

NUM_DRAWS = 4
"""Noise draws per observation, as the recipe has; for the objectives that draw one noise at a time."""


@dataclass(frozen=True, kw_only=True)
class PocketRun:
    """What sets one run apart from the recipe `pocket`."""

    out: Path
    """The run's folder."""
    cache: Path
    """What `vlatune prepare` wrote."""
    objective: str = "flow"
    """Short name, as in methods.py."""
    horizon: int = 16
    """Steps of an action chunk."""
    seed: int = 0
    """Of first weights, order and noise."""
    num_steps: int = 600
    """Optimizer steps."""
    output: Literal["action", "aligned"] = "action"
    """What the expert's output means, where the objective is a regression or RS-IMLE."""
    pretrained: Path | None = None
    """The checkpoint (RUN/checkpoints/step_X) that the first weights come from; random ones if not given."""
    trained: Literal["full", "expert", "lora", "none", "statistics"] = "full"
    """What is trained, as in `vlatune train`; or nothing: 'none' is the pretrained policy as it is, 'statistics' its weights with
    the statistics of this cache."""
    learning_rate: float | None = None
    """Peak, after a warm-up over a tenth of the steps; the recipe's schedule if not given."""

    def __post_init__(self) -> None:
        check_methods([self.objective], "--objective")
        if self.output == "aligned" and not isinstance(self.objective_config, Regression | RSIMLE):
            raise ValueError(
                f"--output aligned: {self.objective} has no such switch; choose a regression or rs_imle, or --output action"
            )
        if self.trained in ("none", "statistics") and self.pretrained is None:
            raise ValueError(
                f"--trained {self.trained} is about a pretrained policy; add --pretrained RUN/checkpoints/step_X"
            )

    @property
    def objective_config(self) -> ObjectiveConfig:
        """With the settings that all studies share."""
        objective = METHODS[self.objective].make(NUM_DRAWS)
        if self.output == "aligned" and isinstance(objective, Regression | RSIMLE):
            return replace(objective, output="aligned")
        return objective

    @property
    def train_config(self) -> TrainConfig:
        """The recipe's, with the last checkpoint alone: nothing is chosen among checkpoints here."""
        recipe = load_recipe("pocket")
        optimizer, num_steps = recipe.optimizer, self.num_steps
        if self.learning_rate is not None:
            optimizer = replace(optimizer, learning_rate=self.learning_rate, num_warmup_steps=num_steps // 10)
        if self.trained == "statistics":
            # Statistics are the cache's from the start of training on: one step that moves nothing writes them beside the weights.
            optimizer, num_steps = replace(optimizer, learning_rate=0.0, num_warmup_steps=0), 1
        return replace(
            recipe,
            policy=replace(recipe.policy, objective=self.objective_config, horizon=self.horizon),
            pretrained=() if self.pretrained is None else (str(self.pretrained),),
            trained=self.trained if self.trained in ("expert", "lora") else "full",
            optimizer=optimizer,
            cache=self.cache,
            out=self.out,
            seed=self.seed,
            num_steps=num_steps,
            checkpoint_every=num_steps,
        )

    @property
    def judged(self) -> Path:
        """The checkpoint that its row is about."""
        if self.trained == "none":
            assert self.pretrained is not None  # __post_init__ saw to it
            return self.pretrained
        return self.out / "checkpoints" / checkpoint_name(self.train_config.num_steps)

    @property
    def is_trained(self) -> bool:
        """Whether that checkpoint is there."""
        return step_of(self.judged) in complete_checkpoints(self.judged.parents[1])


def step_of(checkpoint: Path) -> int:
    """400 of RUN/checkpoints/step_000400."""
    return int(checkpoint.name.removeprefix("step_"))


def train_with_launcher(run: PocketRun) -> None:
    """Train the run, or go on with it. Raises `DataError` if it did not come to its end."""
    given = {name: value for name, value in asdict(run).items() if value is not None}
    arguments = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    launcher = [Path(sys.executable).with_name("deepspeed"), "--log_level", "warning", "--master_port", port]
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        launcher += ["--num_accelerators", min(2, len(os.sched_getaffinity(0)))]
        # One thread a rank: left to itself each would take every core.
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    words = [*launcher, "--module", __name__, *arguments]
    code = subprocess.run([str(word) for word in words], env=environment, check=False).returncode
    if code or not run.is_trained:
        raise DataError(
            f"training {run.out} ended early, with exit code {code}; mend what is said above and type the same again: it continues"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """What every process of the launcher runs."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    train(tyro.cli(PocketRun, args=arguments, prog="pocket_run").train_config)


if __name__ == "__main__":
    main()
