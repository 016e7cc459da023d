"""`replay.csv`: one row a demonstration; and the table of files that a person reads."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path

from .replay_episode import Replayed, Run
from .statistics import wilson
from .text_tables import aligned

DRIFT_TOLERANCE = 0.01
"""Metres or radians: a position further than this from the recorded one has left it."""


@dataclass(frozen=True, kw_only=True)
class ReplayRow:
    """One replayed demonstration. Fields are the columns, in their order; `None` is an empty cell."""

    file: str
    demo: str
    """Its group in the file: `demo_0`."""
    benchmark: str
    suite: str
    task: str
    num_actions: int
    executed: str
    """The dataset that was executed: `executed_actions` where there is one (noise included), else `actions`."""
    success: bool
    """From the recorded state, with the recorded actions."""
    steps_to_success: int | None
    drift: float
    """Largest difference of a position (metres or radians) between replayed and recorded states; 0: bit for bit."""
    drifted_from: int | None
    """The first row that is further off than 0.01."""
    gripper_command: float
    """Where the gripper's command stood at the start, -1 open to 1 closed: no file has it, it is found by trying."""
    open_loop_success: bool
    """The same actions from a fresh reset. Reported only."""
    open_loop_init_state: int
    """Its init state and seed: the recorded one's where the file names it, else the demonstration's number."""
    open_loop_start: float
    """Largest difference of a position from the recorded first state."""
    observed: str
    """What the file says: `before_action` or `after_action`."""
    lag_steps: float | None
    """Control steps from the row's state to the moment its proprioception shows, measured; empty where nothing tells."""
    state_error: float
    """Of the worst part of the stored proprioception, in units of its tolerance (0.02 rad of a joint, 0.01 m and 0.05 rad of
    the gripper's pose, 0.003 m of a finger)."""
    agentview_difference: float
    """Mean absolute difference of stored and rendered pictures, in grey levels of 255."""
    agentview_better: str
    """How the stored pictures must be understood to differ far less: `turned by 180 degrees`; empty where they are right."""
    agentview_better_difference: float
    eye_in_hand_difference: float
    eye_in_hand_better: str
    eye_in_hand_better_difference: float
    gripper_agreement: float | None
    """From 1 (fingers go where the actions ask) to -1 (the reverse); empty where they hardly move."""
    findings: str
    """What does not agree, one sentence after another; empty where everything does."""


COLUMNS = [field.name for field in fields(ReplayRow)]


def row_of(replayed: Replayed) -> ReplayRow:
    job, run, looks = replayed.job, replayed.from_state, replayed.looks
    return ReplayRow(
        file=str(job.path),
        demo=job.key.rpartition("/")[2],
        benchmark=job.task.benchmark,
        suite=job.task.suite,
        task=job.task.name,
        num_actions=len(replayed.recording.actions_TA),
        executed=replayed.recording.executed,
        success=run.success,
        steps_to_success=run.num_steps if run.success else None,
        drift=float(run.deviations.max()),
        drifted_from=_first_beyond(run),
        gripper_command=replayed.gripper_command,
        open_loop_success=replayed.open_loop.success,
        open_loop_init_state=replayed.open_loop_init_state,
        open_loop_start=float(replayed.open_loop.deviations[0]),
        observed="before_action" if replayed.recording.observed_before else "after_action",
        lag_steps=replayed.lag,
        state_error=replayed.state_error,
        agentview_difference=looks["agentview"].difference,
        agentview_better=looks["agentview"].better,
        agentview_better_difference=looks["agentview"].better_difference,
        eye_in_hand_difference=looks["eye_in_hand"].difference,
        eye_in_hand_better=looks["eye_in_hand"].better,
        eye_in_hand_better_difference=looks["eye_in_hand"].better_difference,
        gripper_agreement=replayed.gripper,
        findings="; ".join(finding.sentence for finding in replayed.findings),
    )


def table_of(rows: Sequence[ReplayRow]) -> str:
    """One line a file: success with its interval, and the worst of every comparison."""
    lines = [["file", "demos", "success", "95 % interval", "open loop", "drift", "pictures", "state", "lag"]]
    for file, of_file in groupby(rows, key=lambda row: row.file):
        demos = list(of_file)
        successes = sum(row.success for row in demos)
        low, high = wilson(successes, len(demos))
        lags = [row.lag_steps for row in demos if row.lag_steps is not None]
        lines.append(
            [
                Path(file).name,
                str(len(demos)),
                f"{successes / len(demos):.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{sum(row.open_loop_success for row in demos) / len(demos):.1%}",
                f"{max(row.drift for row in demos):.2g}",
                f"{max(max(row.agentview_difference, row.eye_in_hand_difference) for row in demos):.2f}",
                f"{max(row.state_error for row in demos):.2f}",
                f"{lags[0]:+.2f}" if lags else "",
            ]
        )
    if len(lines) > 2:
        successes = sum(row.success for row in rows)
        low, high = wilson(successes, len(rows))
        together = ["together", str(len(rows)), f"{successes / len(rows):.1%}", f"{low:.1%} to {high:.1%}"]
        lines.append(together + [""] * (len(lines[0]) - len(together)))
    table = aligned(lines)
    return (
        f"{table}\n\n"
        "success: the recorded actions from the recorded state. open loop: the same actions from a fresh reset, reported only.\n"
        "drift: farthest from the recorded states, m or rad (0: bit for bit). pictures: grey levels between stored and rendered.\n"
        "state: stored proprioception against measured, 1 is the tolerance. lag: control steps from a row's state to what it shows."
    )


def _first_beyond(run: Run) -> int | None:
    beyond_T = run.deviations > DRIFT_TOLERANCE
    return int(beyond_T.argmax()) if beyond_T.any() else None
