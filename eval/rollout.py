"""One episode: reset, then decide and execute chunks until success or the step limit."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..data.raw_observation import RawObservation
from .benchmarks.benchmark import Environment, SimObservation

Decide = Callable[[int, RawObservation, SimObservation], np.ndarray]
"""(decision index, what a policy may see, what the simulator knows) -> (n, A) actions to execute. A policy reads only the
second; a scripted expert reads the third."""

OnStep = Callable[[int, SimObservation, np.ndarray, np.ndarray], None]
"""(step, observation, simulator state, action): called before each action, with what was seen and true just then."""


@dataclass(frozen=True, kw_only=True)
class EpisodeOutcome:
    success: bool
    num_steps: int
    """Control steps after settling."""
    failure_mode: str
    """Empty on success."""
    wall_s: float
    physics_s: float
    render_s: float
    decision_ms: tuple[float, ...]
    """How long each decision took, queueing included."""
    smoothness: float
    """Mean L2 norm of the difference of successive actions."""
    saturation: float
    """Share of action entries (gripper left out) that had to be clipped to the robot's limit."""


def roll_out(
    environment: Environment,
    decide: Decide,
    *,
    init_state: int,
    seed: int,
    max_steps: int,
    num_executed_steps: int,
    render_every_step: bool = False,
    on_step: OnStep | None = None,
    on_end: Callable[[SimObservation], None] | None = None,
) -> EpisodeOutcome:
    """Run one episode. Cameras are rendered only for the steps whose images are read, unless `render_every_step`.

    `on_end` gets the last observation (rendered only with `render_every_step`), which no action follows."""
    start = time.perf_counter()
    robot = environment.robot
    observation = environment.reset(init_state, seed)
    actions: list[np.ndarray] = []
    decision_ms: list[float] = []
    clipped = 0
    while len(actions) < max_steps and not observation.success:
        asked = time.perf_counter()
        raw = RawObservation(
            images={camera: image[None] for camera, image in observation.images.items()},
            state_TS=observation.state_S[None],
            instruction=environment.task.language,
        )
        chunk_NA = decide(len(decision_ms), raw, observation)[:num_executed_steps]
        decision_ms.append(1000 * (time.perf_counter() - asked))
        chunk_NA = chunk_NA[: max_steps - len(actions)]
        for k, wanted_A in enumerate(chunk_NA):
            action_A = np.clip(wanted_A, -robot.action_limit, robot.action_limit)
            clipped += int(np.sum(np.delete(action_A != wanted_A, robot.gripper_action)))
            if on_step is not None:
                on_step(len(actions), observation, environment.mujoco_state(), action_A)
            observation = environment.step(action_A, render=render_every_step or k == len(chunk_NA) - 1)
            actions.append(action_A)
            if observation.success:
                break
    if on_end is not None:
        on_end(observation)
    taken_NA = np.asarray(actions)
    return EpisodeOutcome(
        success=observation.success,
        num_steps=len(actions),
        failure_mode=environment.failure_mode(),
        wall_s=time.perf_counter() - start,
        physics_s=environment.physics_s,
        render_s=environment.render_s,
        decision_ms=tuple(decision_ms),
        smoothness=float(np.linalg.norm(np.diff(taken_NA, axis=0), axis=1).mean()) if len(actions) > 1 else 0.0,
        saturation=clipped / max(1, taken_NA.size - len(actions)),
    )
