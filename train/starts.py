"""How and with what a run was started: a line of RUN/starts.jsonl every time, so that one knows which code computed which steps."""

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("vlatune", "torch", "deepspeed", "accelerate", "transformers", "peft", "diffusers", "numpy")
"""Those that change what training computes."""


def record_start(run: Path, *, first_step: int, num_ranks: int) -> None:
    """The main rank's, once a start."""
    on_gpu = torch.cuda.is_available()
    start: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "first_step": first_step,
        "command": shlex.join(sys.argv),
        "num_ranks": num_ranks,
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "git": git_state(),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES}
        | ({"cuda": str(torch.version.cuda)} if on_gpu else {}),
    }
    with (run / "starts.jsonl").open("a") as stream:
        stream.write(json.dumps(start) + "\n")


def git_state() -> str | None:
    """The commit of this checkout, with `+changes` where files differ from it; None where the package was installed without one."""
    here = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str | None:
        try:
            finished = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return finished.stdout.strip() if finished.returncode == 0 else None

    # An installed copy may lie inside somebody else's repository.
    if git("rev-parse", "--show-toplevel") != str(here):
        return None
    return f"{git('rev-parse', 'HEAD')}{'+changes' if git('status', '--porcelain', '--untracked-files=no') else ''}"
