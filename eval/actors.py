"""Who chooses the actions of an episode: the policy, what is left of it under a control, or no policy at all."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..data.raw_observation import RawObservation
from .benchmarks.benchmark import Environment, ScriptedExpert, SimObservation, Task
from .results import EpisodeKey
from .rollout import Decide

POLICY_ACTORS = ("policy", "untrained", "blind", "wrong_instruction")
"""Actors that ask a policy; the rest do without."""

Ask = Callable[[int, RawObservation], np.ndarray]
"""(decision index, observation) -> (H, A) from the policy server."""


def make_decide(
    key: EpisodeKey,
    environment: Environment,
    *,
    cameras: Sequence[str],
    ask: Ask,
    make_expert: Callable[[Task], ScriptedExpert],
) -> Decide:
    """The actor that `key` names. `cameras` are those that the policy reads; no other image is sent to it."""
    if key.actor == "scripted":
        expert = make_expert(environment.task)
        expert.reset(key.seed)
        return lambda decision, raw, seen: expert.act(seen)[None]
    if key.actor == "zero":
        still_1A = np.asarray(environment.robot.still_action, np.float32)[None]
        return lambda decision, raw, seen: still_1A
    if key.actor == "random":
        rng, limit_A = np.random.default_rng(np.frombuffer(key.digest(), np.uint32)), environment.robot.action_limit
        shape = (1, len(environment.robot.still_action))
        return lambda decision, raw, seen: rng.uniform(-1, 1, shape) * limit_A
    if key.actor not in POLICY_ACTORS:
        raise ValueError(
            f"there is no actor {key.actor!r}; there are {', '.join((*POLICY_ACTORS, 'scripted', 'zero', 'random'))}"
        )

    def decide(decision: int, raw: RawObservation, seen: SimObservation) -> np.ndarray:
        images = {camera: raw.images[camera] for camera in cameras}
        if key.actor == "blind":
            images = {camera: np.zeros_like(image) for camera, image in images.items()}
        chunk_HA = ask(decision, replace(raw, images=images, instruction=key.instruction))
        if not np.isfinite(chunk_HA).all():
            raise ValueError(f"the policy's actions at decision {decision} are not finite")
        return chunk_HA

    return decide


def wrong_instruction(task: Task, others: Sequence[Task]) -> str:
    """The instruction that differs most from the task's own: the one that shares the smallest part of its words with it
    (Jaccard index), so that object and target differ where the suite allows; of equals, the next task's cyclically."""
    own = set(task.language.lower().split())

    def overlap(other: Task) -> float:
        words = set(other.language.lower().split())
        return len(own & words) / len(own | words)

    candidates = [other for other in others if other.language.lower() != task.language.lower()]
    if not candidates:
        raise ValueError(
            f"suite {task.suite!r} has no other instruction than {task.language!r}: the wrong-instruction control needs one"
        )
    count = 1 + max(other.task_id for other in (task, *others))
    return min(candidates, key=lambda other: (overlap(other), (other.task_id - task.task_id) % count)).language
