"""LIBERO's problems with LIBERO's own init states."""

from pathlib import Path

import numpy as np

from ....data.robots.card import RobotCard
from ..benchmark import EpisodeProtocol, Task
from ..libero_environment import LiberoEnvironment
from ..libero_library import use_assets
from .init_states import load_init_states


def make_environment(
    task: Task, protocol: EpisodeProtocol, robot: RobotCard, settle_action: tuple[float, ...]
) -> LiberoEnvironment:
    use_assets()
    bddl = Path(task.bddl_file)
    states = load_init_states(bddl.parents[2] / "init_files" / task.suite / f"{task.name}.pruned_init")

    def init_state(_after_reset: np.ndarray, index: int) -> np.ndarray:
        if not 0 <= index < len(states):
            raise ValueError(f"{task.name} has init states 0 to {len(states) - 1}, not {index}")
        state: np.ndarray = states[index]
        return state

    return LiberoEnvironment(task, protocol, robot, init_state=init_state, settle_action=np.asarray(settle_action))
