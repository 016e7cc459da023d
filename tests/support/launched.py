"""Training for real, as a person starts it: the deepspeed launcher, ranks over gloo."""

import csv
import os
import pathlib
import subprocess
import sys

from safetensors.torch import load_file

LAUNCHER = pathlib.Path(sys.executable).with_name("deepspeed")


def environment() -> dict[str, str]:
    here = str(pathlib.Path(__file__).parent)  # programs for the launcher lie here, too
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": here}


def free_port() -> str:
    """For a launcher's ranks to meet. Not one that the system gives, which it may give to another before they do: below those, and test
    processes side by side have different ones."""
    return str(20_000 + os.getpid() % 12_000)


def command(module: str, *arguments: str, num_ranks: int) -> list[str]:
    """The launcher's command line."""
    ranks = ["--num_accelerators", str(num_ranks), "--master_port", free_port()]
    return [str(LAUNCHER), *ranks, "--module", module, *arguments]


def run(module: str, *arguments: str, num_ranks: int = 2) -> str:
    """What it printed; fails if it fails."""
    finished = subprocess.run(
        command(module, *arguments, num_ranks=num_ranks),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    output = finished.stdout + finished.stderr
    assert finished.returncode == 0, output
    return output


def train(cache: pathlib.Path, out: pathlib.Path, *settings: str, num_ranks: int = 2) -> str:
    """The tiny recipe through the launcher; returns what it printed."""
    return run("vlatune.train.run", "tiny", "--cache", str(cache), "--out", str(out), *settings, num_ranks=num_ranks)


def weights(run: pathlib.Path, step: int = 4, name: str = "model.safetensors"):
    return load_file(run / "checkpoints" / f"step_{step:06d}" / name)


def rows(run: pathlib.Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "metrics.csv").open()))
