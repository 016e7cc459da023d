"""Which policies `vlatune act` compares, and whether they and the demonstrations fit each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.robots.card import RobotCard
from ..policy.execution import Compile, Precision
from .act_frames import ChosenEpisode
from .run_folder import checkpoint_at, find_run

if TYPE_CHECKING:
    from ..policy.acting import ActingPolicy


def load_policies(
    checkpoint: Path,
    other: Path | None,
    *,
    averaged: bool,
    device: str,
    num_sampling_steps: int | None,
    compile: Compile = "off",
    precision: Precision = "float32",
) -> "dict[str, ActingPolicy]":
    """One or two policies by label, `RUN/CHECKPOINT`; of a run its last checkpoint. Raises `DataError` where there is no such
    checkpoint, `ValueError` for two of different robots, or the same one twice."""
    from ..policy.acting import load_policy

    found = {}
    for path in filter(None, (checkpoint, other)):
        run = find_run(path)
        found[path] = run, checkpoint_at(path, run, averaged=averaged)
    folders = [checkpoint.path for _, checkpoint in found.values()]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"{folders[0]} is what both {' and '.join(map(str, found))} mean; give another checkpoint")
    labels = [f"{run.name}/{checkpoint.name}" for run, checkpoint in found.values()]
    if len(set(labels)) < len(labels):  # two runs of one name
        labels = [f"{run.path}/{checkpoint.name}" for run, checkpoint in found.values()]
    policies = {
        label: load_policy(
            checkpoint.path, device=device, averaged=checkpoint.averaged, compile=compile, precision=precision
        )
        for label, (_, checkpoint) in zip(labels, found.values(), strict=True)
    }
    if num_sampling_steps is not None:
        policies = {label: one.with_sampling_steps(num_sampling_steps) for label, one in policies.items()}
    robots = {label: f"{one.robot} ({one.action_dim} action dims)" for label, one in policies.items()}
    if len(set(robots.values())) > 1:
        said = " and ".join(f"{label} of {robot}" for label, robot in robots.items())
        raise ValueError(f"the checkpoints are of different robots, {said}; give two of one robot")
    return policies


def check_fit(label: str, policy: "ActingPolicy", robot: RobotCard) -> None:
    """Raises `ValueError` where demonstrations of this robot are none that the policy can act on."""
    missing = [camera for camera in policy.cameras if camera not in robot.cameras]
    if missing:
        raise ValueError(
            f"{label} sees through {', '.join(policy.cameras)}, and the demonstrations have {', '.join(robot.cameras)}; give demonstrations "
            "with its cameras"
        )
    state_dim = policy.policy.embodiment.state_dim
    if (policy.robot, state_dim, policy.action_dim) != (robot.name, len(robot.state_names), len(robot.action_names)):
        raise ValueError(
            f"{label} is of robot {policy.robot} ({state_dim} state and {policy.action_dim} action dims), and the demonstrations are of "
            f"{robot.name} ({len(robot.state_names)} and {len(robot.action_names)}); give demonstrations of its robot"
        )


def deviation_of(policies: "Mapping[str, ActingPolicy]", chosen: Sequence[ChosenEpisode]) -> tuple[np.ndarray, str]:
    """(A,) float64, one for all policies or their errors could not be compared; and a sentence that says where it is from."""
    for label, policy in policies.items():
        known = policy.policy.statistics.actions.std
        if known is not None:
            return np.asarray(known, np.float64), f"deviations: those of the data that {label} was trained on"
    together_NA = np.concatenate([one.episode.actions_NA for one in chosen])
    return (
        together_NA.std(axis=0, dtype=np.float64),
        "deviations: those of these demonstrations, since no checkpoint knows its data's",
    )
