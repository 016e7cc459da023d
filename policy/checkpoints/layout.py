"""How checkpoints lie in a run's folder. Light to import: a report needs it and no torch."""

import json
import re
from pathlib import Path

COMPLETE = "COMPLETE"
"""A checkpoint's last file."""
EMA = "ema.safetensors"
"""The weights' average over training, where the run keeps one."""


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


def complete_checkpoints(run: Path) -> dict[int, Path]:
    """step -> folder, in order; a checkpoint that was not written to its end is not one."""
    markers = (run / "checkpoints").glob(f"step_*/{COMPLETE}")
    matches = ((re.fullmatch(r"step_(\d+)", marker.parent.name), marker.parent) for marker in markers)
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def planned_steps(run: Path) -> int:
    """Optimizer steps of all stages together. Raises ValueError, KeyError or TypeError if its config.json is not that of a run, and
    OSError where there is none."""
    config = json.loads((run / "config.json").read_text())
    return sum(int(stage["num_steps"]) for stage in (config, *config["then"]))
