"""From a worker's result to a row of `episodes.csv`."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .policy_server import PolicyServer
from .results import EpisodeRow
from .run_folder import Checkpoint
from .sweep_plan import Split
from .workers import EpisodeResult

_DISTRIBUTIONS = {
    "mujoco": "mujoco",
    "robosuite": "robosuite",
    "libero": "hf-libero",
    "torch": "torch",
    "vlatune": "vlatune",
}


def installed_versions() -> dict[str, str]:
    """Column -> version of what shapes a result; empty where it is not installed."""
    versions = {}
    for column, distribution in _DISTRIBUTIONS.items():
        try:
            versions[column] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[column] = ""
    return versions


def row_of(
    result: EpisodeResult,
    *,
    folder: Path,
    run: str,
    checkpoint: Checkpoint | None,
    split: Split,
    server: PolicyServer | None,
    versions: Mapping[str, str],
) -> EpisodeRow:
    """The row of one episode; `folder` is where `episodes.csv` lies."""
    spec, outcome = result.spec, result.outcome
    policy = server.policy if server else None
    return EpisodeRow(
        **asdict(spec.key),
        **dict[str, Any](versions),
        run=run,
        checkpoint=checkpoint.name if checkpoint else "",
        step=checkpoint.step if checkpoint else None,
        task=spec.task.name,
        task_language=spec.task.language,
        split=split,
        outcome="error" if outcome is None else "success" if outcome.success else "failure",
        success=outcome.success if outcome else None,
        num_steps=outcome.num_steps if outcome else None,
        steps_to_success=outcome.num_steps if outcome and outcome.success else None,
        num_decisions=len(outcome.decision_ms) if outcome else None,
        wall_s=_seconds(outcome.wall_s if outcome else None),
        sim_s=_seconds(outcome.physics_s if outcome else None),
        render_s=_seconds(outcome.render_s if outcome else None),
        queue_ms=_milliseconds(np.mean(result.queue_ms)) if result.queue_ms else None,
        policy_ms_mean=_milliseconds(np.mean(result.policy_ms)) if result.policy_ms else None,
        policy_ms_p95=_milliseconds(np.percentile(result.policy_ms, 95)) if result.policy_ms else None,
        smoothness=outcome.smoothness if outcome else None,
        action_saturation=outcome.saturation if outcome else None,
        failure_mode=outcome.failure_mode if outcome and not outcome.success else "",
        video=result.video.relative_to(folder).as_posix() if result.video else "",
        horizon=policy.horizon if policy else None,
        batch_size=server.batch_size if server else None,
        renderer=result.renderer,
        device=str(policy.device) if policy else "",
        error=result.error,
    )


def _seconds(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _milliseconds(value: float | np.floating) -> float:
    return round(float(value), 3)
