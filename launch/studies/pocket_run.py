"""One training run of a study on pocket: the quickstart's recipe with another objective, chunk length or seed.

Started by the studies, in as many processes as the machine is good for: `deepspeed --module vlatune.launch.studies.pocket_run …`
"""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from ...data.episodes import DataError
from ...policy.checkpoints.layout import complete_checkpoints
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

    def __post_init__(self) -> None:
        check_methods([self.objective], "--objective")

    @property
    def train_config(self) -> TrainConfig:
        """The recipe's, with the last checkpoint alone: nothing is chosen among checkpoints here."""
        recipe = load_recipe("pocket")
        policy = replace(recipe.policy, objective=METHODS[self.objective].make(NUM_DRAWS), horizon=self.horizon)
        return replace(
            recipe,
            policy=policy,
            cache=self.cache,
            out=self.out,
            seed=self.seed,
            num_steps=self.num_steps,
            checkpoint_every=self.num_steps,
        )

    @property
    def is_trained(self) -> bool:
        """Whether its last checkpoint is there."""
        return self.num_steps in complete_checkpoints(self.out)


def train_with_launcher(run: PocketRun) -> None:
    """Train the run, or go on with it. Raises `DataError` if it did not come to its end."""
    arguments = ["--out", run.out, "--cache", run.cache, "--objective", run.objective, "--horizon", run.horizon]
    arguments += ["--seed", run.seed, "--num-steps", run.num_steps]
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
