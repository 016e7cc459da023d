"""What competes in a sweep: weights, and how they act."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .results import EpisodeRow
from .run_folder import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One of those that are compared on the selection half."""

    checkpoint: Checkpoint
    num_sampling_steps: int | None = None
    """Integration (or denoising) steps a chunk; None: as the policy was trained to."""
    num_executed_steps: int | None = None
    """Actions executed of each chunk; None: 8, or the whole chunk where it is shorter."""

    @property
    def label(self) -> str:
        """For people: `step_000400-ema, 5 sampling steps, 8 executed`."""
        return ", ".join(
            (
                self.checkpoint.name,
                *([] if self.num_sampling_steps is None else [f"{self.num_sampling_steps} sampling steps"]),
                *([] if self.num_executed_steps is None else [f"{self.num_executed_steps} executed"]),
            )
        )


def candidates_of(
    checkpoints: Sequence[Checkpoint], num_sampling_steps: Sequence[int], num_executed_steps: Sequence[int]
) -> list[Candidate]:
    """Every checkpoint under every pair of settings, in the order in which equals are preferred: the last one first."""
    grid: list[tuple[int | None, int | None]] = [
        (sampling, executed) for sampling in num_sampling_steps or (None,) for executed in num_executed_steps or (None,)
    ]
    # Of equals the later checkpoint, then the cheaper setting: fewer sampling steps, more actions of a chunk.
    grid.sort(key=lambda pair: (-(pair[0] or 0), pair[1] or 0))
    return [
        Candidate(checkpoint=checkpoint, num_sampling_steps=sampling, num_executed_steps=executed)
        for checkpoint in checkpoints
        for sampling, executed in grid
    ]


def mean_over_tasks(rows: Sequence[EpisodeRow]) -> float:
    """Mean of the tasks' success rates, errors left out; NaN if a task has no episode that ended."""
    outcomes: dict[tuple[str, int], list[bool]] = defaultdict(list)
    for row in rows:
        outcomes[row.suite, row.task_id] += [] if row.success is None else [row.success]
    return float(np.mean([np.mean(task) if task else np.nan for task in outcomes.values()]))


def best_of(rows: Mapping[Candidate, Sequence[EpisodeRow]]) -> Candidate | None:
    """The best candidate: highest success rate over tasks, the last one of equals. `None` if there is none whose tasks all have an
    episode that ended."""
    rates = [(mean_over_tasks(of_candidate), place, c) for place, (c, of_candidate) in enumerate(rows.items())]
    known = [entry for entry in rates if not np.isnan(entry[0])]
    return max(known, key=lambda entry: entry[:2])[2] if known else None
