"""Pocket's environment: LIBERO's, with init states drawn from their index."""

import zlib

import numpy as np

from ....data.robots.card import RobotCard
from ..benchmark import EpisodeProtocol, Task
from ..libero_environment import LiberoEnvironment
from . import domain as _domain  # noqa: F401  (registers the problem)


def make_environment(task: Task, protocol: EpisodeProtocol, robot: RobotCard) -> LiberoEnvironment:
    environment = LiberoEnvironment(
        task,
        protocol,
        robot,
        init_state=lambda state, index: _place_cubes(environment, state, index),
        settle_action=np.asarray(robot.still_action),
    )
    return environment


def _place_cubes(environment: LiberoEnvironment, state: np.ndarray, index: int) -> np.ndarray:
    """Each cube uniform over its region of the BDDL file; the rest of `state` as it is. A function of (task, index)."""
    if index < 0:
        raise ValueError(f"{environment.task.name} has init states from 0 on, not {index}")
    problem = environment.domain
    rng = np.random.default_rng([zlib.crc32(environment.task.name.encode()), index])
    placed = state.copy()
    for _, name, region in (s for s in problem.parsed_problem["initial_state"] if s[1] in problem.objects_dict):
        x_low, y_low, x_high, y_high = problem.parsed_problem["regions"][region]["ranges"][0]
        half_height = problem.objects_dict[name].size[2]
        position = problem.workspace_offset + rng.uniform([x_low, y_low, half_height], [x_high, y_high, half_height])
        first, last = problem.sim.model.get_joint_qpos_addr(problem.objects_dict[name].joints[-1])
        placed[1 + first : 1 + last] = [*position, 1.0, 0.0, 0.0, 0.0]
    return placed
