"""One episode: reset, then decide and execute chunks until success or the step limit."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.raw_observation import RawObservation
from .benchmarks.benchmark import Environment, SimObservation
from .chunk_queue import ChunkQueue
from .delay import InferenceDelay

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
    seam_jump: float = 0.0
    """Mean L2 norm of the difference of successive actions (gripper left out) where one chunk gives way to the next, or to standing
    still."""


def roll_out(
    environment: Environment,
    decide: Decide,
    *,
    init_state: int,
    seed: int,
    max_steps: int,
    num_executed_steps: int,
    observation_offsets: tuple[int, ...] = (0,),
    temporal_ensemble: float | None = None,
    delay: InferenceDelay | None = None,
    reads_images: bool = True,
    render_every_step: bool = False,
    on_step: OnStep | None = None,
    on_end: Callable[[SimObservation], None] | None = None,
) -> EpisodeOutcome:
    """Run one episode: a decision at every `num_executed_steps`-th step, those spent waiting not counted. Cameras are rendered only for
    the steps whose images a decision reads (none, if it `reads_images` not), unless `render_every_step`.

    `observation_offsets` are the control steps, relative to a decision, whose observations it gets (0 or less, the last one 0).
    With a coefficient for `temporal_ensemble` (temporal_ensemble.py) an action is the mean of what all chunks planned for its step.
    With a `delay` (delay.py) a chunk is carried out from so many steps after its observation on; plans stand still where the robot does,
    and where it goes on with the chunk before, the first steps of the new one are over when it comes.
    `on_end` gets the last observation (rendered only with `render_every_step`), which no action follows. Raises `ValueError` if the
    actor decides on fewer actions than are to be executed."""
    start = time.perf_counter()
    robot = environment.robot
    observation = environment.reset(init_state, seed)
    seen = deque([observation], maxlen=1 - min(observation_offsets))
    delay = delay or InferenceDelay()
    queue = ChunkQueue(robot, num_executed=num_executed_steps, delay=delay, temporal_ensemble=temporal_ensemble)
    actions = queue.taken
    decision_ms: list[float] = []
    clipped = 0
    while len(actions) < max_steps and not observation.success:
        if delay.is_decision(len(actions), num_executed_steps):
            asked = time.perf_counter()
            raw = _raw_observation(seen, len(actions), observation_offsets, environment.task.language)
            chunk_HA = decide(len(decision_ms), raw, observation)
            decision_ms.append(1000 * (time.perf_counter() - asked))
            queue.await_chunk(chunk_HA)
        wanted_A = queue.wanted()
        action_A = np.clip(wanted_A, -robot.action_limit, robot.action_limit)
        clipped += int(np.sum(np.delete(action_A != wanted_A, robot.gripper_action)))
        if on_step is not None:
            on_step(len(actions), observation, environment.mujoco_state(), action_A)
        queue.took(action_A)
        is_read = reads_images and any(
            delay.is_decision(len(actions) - offset, num_executed_steps) for offset in observation_offsets
        )
        observation = environment.step(action_A, render=render_every_step or is_read)
        seen.append(observation)
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
        seam_jump=queue.seam_jump,
    )


def _raw_observation(
    seen: Sequence[SimObservation], step: int, offsets: tuple[int, ...], instruction: str
) -> RawObservation:
    """What a decision at `step` gets; `seen` ends with that step's. Before the episode's start its first observation stands in, as in
    training."""
    there_T = step + np.asarray(offsets) >= 0
    read = [seen[max(offset, -step) - 1] for offset in offsets]
    return RawObservation(
        images={camera: np.stack([one.images[camera] for one in read]) for camera in read[-1].images},
        state_TS=np.stack([one.state_S for one in read]),
        instruction=instruction,
        there_T=there_T,
    )
