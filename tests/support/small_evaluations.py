"""Evaluation folders as sweeps leave them, without a simulator: rows drawn from a seed, with the failures, times and grids of real ones."""

import json
import zlib
from pathlib import Path

import numpy as np
from small_episodes import row

from vlatune.eval.results import EpisodeRow, header

MODES = ("missed_grasp", "never_reached", "dropped", "wrong_object", "timeout")
MAX_STEPS = 220


def episodes(
    run: str,
    checkpoint: str,
    rate: float,
    *,
    split: str = "report",
    objective: str = "flow",
    num_sampling_steps: int = 10,
    num_executed_steps: int = 8,
    suites: tuple[str, ...] = ("libero_spatial",),
    num_tasks: int = 3,
    num_episodes: int = 10,
    actor: str = "policy",
    policy_ms: float = 20.0,
    **changes,
) -> list[EpisodeRow]:
    """Rows of one candidate. How hard an init state is, is the same for every candidate, as in a simulator: pairs agree often."""
    first = 0 if split == "selection" else 25
    digest = f"{zlib.crc32(f'{run} {checkpoint}'.encode()):08x}"
    random = np.random.default_rng(
        zlib.crc32(f"{digest} {num_sampling_steps} {num_executed_steps} {actor} {split}".encode())
    )
    rows = []
    for suite in suites:
        for task_id in range(num_tasks):
            for init_state in range(first, first + num_episodes):
                hard = np.random.default_rng([zlib.crc32(suite.encode()), task_id, init_state]).random()
                success = bool(0.6 * hard + 0.4 * random.random() < 0.2 + 0.6 * rate) if 0 < rate < 1 else bool(rate)
                steps = int(random.integers(60, 160)) if success else MAX_STEPS
                decisions = -(-steps // num_executed_steps)
                forward_ms = policy_ms * num_sampling_steps / 10 * random.uniform(0.9, 1.15)
                sim_s, render_s = 0.012 * steps, 0.03 * decisions
                rows.append(
                    row(
                        run=run,
                        checkpoint=checkpoint,
                        step=int(checkpoint.split("_")[1].split("-")[0]),
                        weights_hash=digest,
                        actor=actor,
                        benchmark="libero",
                        suite=suite,
                        task_id=task_id,
                        task=f"{suite}_task_{task_id}",
                        task_language=f"put the {('bowl', 'mug', 'plate')[task_id % 3]} on the stove ({task_id})",
                        instruction=f"put the {('bowl', 'mug', 'plate')[task_id % 3]} on the stove ({task_id})",
                        init_state=init_state,
                        split=split,
                        outcome="success" if success else "failure",
                        success=success,
                        num_steps=steps,
                        steps_to_success=steps if success else None,
                        num_decisions=decisions,
                        wall_s=round(sim_s + render_s + decisions * (forward_ms + 2) / 1000 + 0.1, 4),
                        sim_s=round(sim_s, 4),
                        render_s=round(render_s, 4),
                        queue_ms=2.0,
                        policy_ms_mean=round(forward_ms, 3),
                        policy_ms_p95=round(1.3 * forward_ms, 3),
                        smoothness=float(random.uniform(0.05, 0.09) * (2 if objective == "l1" else 1)),
                        action_saturation=float(random.uniform(0, 0.02)),
                        failure_mode="" if success else MODES[int(random.choice(5, p=(0.45, 0.25, 0.15, 0.1, 0.05)))],
                        video="",
                        protocol="openvla",
                        max_steps=MAX_STEPS,
                        sampling=json.dumps(
                            {"num_sampling_steps": num_sampling_steps, "objective": objective}, sort_keys=True
                        ),
                        num_sampling_steps=num_sampling_steps,
                        num_executed_steps=num_executed_steps,
                    )
                )
                rows[-1] = EpisodeRow(**{**vars(rows[-1]), **changes})
    return rows


def write_csv(path: Path, rows: list[EpisodeRow]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header() + "".join(each.to_line() for each in rows))
    return path


def write_choice(folder: Path, chosen: EpisodeRow, num_candidates: int) -> None:
    """`chosen.json`, as a sweep writes it, for the candidate that `chosen` is a row of."""
    choice = {
        "run": chosen.run,
        "checkpoint": chosen.checkpoint,
        "step": chosen.step,
        "weights_hash": chosen.weights_hash,
        "settings": {name: getattr(chosen, name) for name in ("protocol", "seed", "sampling", "num_executed_steps")},
        "num_candidates": num_candidates,
    }
    (folder / "chosen.json").write_text(json.dumps(choice))
