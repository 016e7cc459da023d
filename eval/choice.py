"""What a sweep chose: `chosen.json`, and the table for the terminal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..data.files import write_whole
from .candidates import Candidate
from .results import EpisodeRow
from .statistics import wilson

SelectionRows = Mapping[Candidate, Sequence[EpisodeRow]]
"""Every candidate's episodes on the selection half."""


def write_choice(path: Path, run: str, chosen: Candidate, selection: SelectionRows, rule: str) -> None:
    """Which candidate, out of how many, by which rule and under which settings."""
    first = selection[chosen][0]
    choice = {
        "run": run,
        "checkpoint": chosen.checkpoint.name,
        "step": chosen.checkpoint.step,
        "weights_hash": first.weights_hash,
        "rule": rule,
        "settings": {
            "protocol": first.protocol,
            "seed": first.seed,
            "sampling": first.sampling,
            "num_executed_steps": first.num_executed_steps,
        },
        "protocols": {
            row.suite: {name: getattr(row, name) for name in ("max_steps", "num_settle_steps", "image_px")}
            for row in selection[chosen]
        },
        "num_candidates": len(selection),
        "candidates": [
            {
                "checkpoint": candidate.checkpoint.name,
                "step": candidate.checkpoint.step,
                "sampling": rows[0].sampling,
                "num_executed_steps": rows[0].num_executed_steps,
                "successes": count(rows)[0],
                "episodes": count(rows)[1],
            }
            for candidate, rows in selection.items()
        ],
    }
    write_whole(path, (json.dumps(choice, indent=2) + "\n").encode())


def count(rows: Sequence[EpisodeRow]) -> tuple[int, int]:
    """(successes, episodes that ended)."""
    return sum(row.outcome == "success" for row in rows), sum(row.outcome != "error" for row in rows)


def line(name: str, rows: Sequence[EpisodeRow], mark: str = "") -> str:
    """A line of the table that a sweep ends with."""
    successes, ended = count(rows)
    low, high = wilson(successes, ended)
    share = f"{100 * successes / ended:5.1f} %" if ended else "    –  "
    errors = f", {len(rows) - ended} errors" if ended < len(rows) else ""
    return f"  {name:<32} {share}  [{100 * low:5.1f}, {100 * high:5.1f}]  {successes}/{ended}{errors}{mark}"
