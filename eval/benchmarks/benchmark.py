"""What a benchmark offers: tasks, fixed init states, and an environment whose episode depends on its key alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ...data.robots.card import RobotCard
from ...data.robots.libero_panda import LIBERO_PANDA


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of a suite."""

    benchmark: str
    suite: str
    task_id: int
    name: str
    """File-name form: `put_the_red_cube_on_the_plate`."""
    language: str
    """The instruction that policies are given, in training and in acting alike."""
    bddl_file: str
    num_init_states: int


@dataclass(frozen=True, kw_only=True)
class EpisodeProtocol:
    """How an episode is run, by name; written into every row. A benchmark's name stands for the same rules for ever: others get another
    name. What a sweep overrides stands in the row's columns beside it."""

    name: str
    max_steps: int
    """Control steps after settling; an episode that has not succeeded by then is a failure."""
    num_settle_steps: int
    """Still actions after the init state is set."""
    image_px: int
    """Side of the rendered (square) images."""
    num_trials: int = 50
    """Episodes per task that results under it are published with."""


@dataclass(frozen=True, kw_only=True)
class SimObservation:
    """What the simulator shows after a control step."""

    images: Mapping[str, np.ndarray]
    """camera -> (image_px, image_px, 3) uint8, rows as OpenGL has them (upside-down); empty where none was rendered."""
    state_S: np.ndarray
    """float32, in the robot card's order."""
    low_dim: Mapping[str, np.ndarray]
    """robosuite's other observables by their own names (true object poses too: for recorders and scripted experts only)."""
    success: bool


FixturePose = tuple[np.ndarray, np.ndarray]
"""Position (3) in metres and quaternion (4) w, x, y, z, of a piece of furniture in its parent: MuJoCo's order."""


class Environment(Protocol):
    """One task's simulator. Lives in one process; not thread-safe."""

    task: Task
    robot: RobotCard
    physics_s: float
    """Seconds spent in physics since `reset` began (the reset's own included)."""
    render_s: float
    """Seconds spent rendering since `reset` began."""

    def reset(self, init_state: int, seed: int) -> SimObservation:
        """Seed, reset, set the init state, settle; rendered. The episode depends on these arguments alone."""

    def step(self, action_A: np.ndarray, *, render: bool) -> SimObservation:
        """One control step. With `render` the images are those that robosuite samples within the step (with the other
        observables, at its last physics substep but one), bit-identical to rendering at every step."""

    def mujoco_state(self) -> np.ndarray:
        """Flattened simulator state (time, positions, velocities)."""

    def failure_mode(self) -> str:
        """Why the episode has not succeeded so far, from simulator states seen since `reset`: `never_reached`,
        `missed_grasp`, `dropped`, `wrong_object` or `timeout`; empty once it has succeeded."""

    def close(self) -> None: ...


class ScriptedExpert(Protocol):
    """Solves a task from true poses, one action at a time."""

    def reset(self, seed: int) -> None: ...

    def act(self, observation: SimObservation) -> np.ndarray: ...


class Benchmark(Protocol):
    """A family of suites. Importing its module is cheap; simulators load when an environment is made."""

    name: str

    def suites(self) -> Mapping[str, Sequence[Task]]: ...

    def protocols(self, suite: str) -> Mapping[str, EpisodeProtocol]:
        """By name; the first is the default."""

    def make_environment(self, task: Task, protocol: EpisodeProtocol, robot: RobotCard = LIBERO_PANDA) -> Environment:
        """Raises `DataError` where the simulator does not measure what the state of `robot` is made of."""

    def make_expert(self, task: Task) -> ScriptedExpert:
        """Raises `NoExpert` where the benchmark has none for this task."""


class NoExpert(Exception):
    """No scripted expert knows this task."""
