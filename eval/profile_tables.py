"""What `vlatune profile` says on a terminal."""

from collections.abc import Mapping, Sequence

from .latency import PARTS
from .profile_rows import ProfileRow

EPISODE_CAUSES = (*PARTS, "physics", "render", "reset")
NOT_MEASURED = """not measured: several simulators that share a policy (a sweep's columns queue_ms and policy_ms_mean have that); the
first decision, which is slower"""


def latency_table(rows: Sequence[ProfileRow]) -> str:
    """A line a batch size and number of sampling steps."""
    head = ["batch", "steps", "median", "p95", "p99", *PARTS, "a call", "apart", "obs/s", "actions/s"]
    lines = [head]
    for row in rows:
        if row.num_executed_steps != rows[0].num_executed_steps:
            continue  # latency is the same
        times = (row.decision_ms, row.decision_ms_p95, row.decision_ms_p99, *(getattr(row, f"{p}_ms") for p in PARTS))
        lines.append(
            [
                str(row.batch_size),
                str(row.num_sampling_steps),
                *(f"{ms:.2f}" for ms in (*times, row.expert_call_ms)),
                f"{row.apart_ms / row.decision_ms - 1:+.1%}",
                f"{row.observations_per_s:.1f}",
                f"{row.actions_per_s:.0f}",
            ]
        )
    return (
        f"a decision, in milliseconds ({rows[0].repeats} of each setting; parts: means over its middle half)\n{_aligned(lines)}\n"
        "expert: all its calls; a call: one of them. rest: solver, un-normalising, back to the host.\n"
        "apart: how much longer a decision takes while its parts are timed, chance included. "
        f"actions/s: with {rows[0].num_executed_steps} executed of each chunk of {rows[0].horizon}."
    )


def episode_table(rows: Sequence[ProfileRow], seconds: Sequence[Mapping[str, float]]) -> str:
    """A line a sampling setting: an episode's seconds, and every cause's share; `seconds` as `episode_seconds` gives them, by row."""
    lines = [["steps", "executed", "seconds", *EPISODE_CAUSES]]
    for row, by_cause in zip(rows, seconds, strict=True):
        whole = sum(by_cause.values())
        shares = (f"{by_cause[cause] / whole:.1%}" for cause in EPISODE_CAUSES)
        lines.append([str(row.num_sampling_steps), str(row.num_executed_steps), f"{whole:.2f}", *shares])
    first = rows[0]
    return (
        f"an episode of {first.episode_steps} control steps, estimated (one process that waits for its policy, batch 1)\n"
        f"{_aligned(lines)}\n"
        f"{first.suite}, {first.renderer}: physics {first.physics_ms:.2f} ms a control step, render {first.render_ms:.2f} ms for the pictures "
        f"({first.image_px} px) of one, reset {first.reset_s:.2f} s."
    )


def remarks(row: ProfileRow) -> str:
    """What one must know to read the tables."""
    seen = "the simulator's pictures" if row.benchmark else f"pictures of noise, {row.image_px} px"
    lines = [
        (
            f"{row.checkpoint} of {row.run} ({row.num_parameters / 1e6:.1f} M parameters, {row.dtype}) on {row.device_name}, {row.device}, "
            f"{row.threads} thread{'' if row.threads == 1 else 's'}; {seen}"
        ),
        NOT_MEASURED,
    ]
    if row.load_average > row.cores / 2:
        lines.append(
            f"load average {row.load_average:.1f} on {row.cores} cores at the start: other programs ran, and times are longer than on a quiet "
            "machine"
        )
    return "\n".join(lines)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
