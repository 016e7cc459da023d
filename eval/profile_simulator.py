"""What a profiled policy sees, what the simulator that shows it costs, and from both what an episode costs."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.raw_observation import RawObservation
from ..data.robots import robot_named
from .benchmarks.benchmark import Benchmark, Environment, EpisodeProtocol, SimObservation, Task
from .benchmarks.renderer import choose_renderer
from .policy_server import PolicyUnderTest

NUM_OBSERVATIONS = 32
"""Different observations that are kept for timing decisions; a larger batch repeats them."""
CAMERA_PX = 256
"""Of LIBERO's pictures under the usual protocol."""
INSTRUCTION = "pick up the black bowl and place it on the plate"
"""For a policy whose language knows no text."""


@dataclass(frozen=True, kw_only=True)
class SimulatorCost:
    """Of one task's simulator, in one process."""

    reset_s: float
    """A reset with its settling and first pictures."""
    physics_ms: float
    """Median control step, without pictures."""
    render_ms: float
    """Median of all cameras' pictures of a control step."""
    num_steps: int
    """Control steps that were measured."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Where a policy is profiled."""

    observations: Sequence[RawObservation]
    columns: Mapping[str, Any]
    """As `profile.csv` has them."""
    simulator: SimulatorCost | None = None

    def batch(self, size: int) -> list[RawObservation]:
        return [self.observations[k % len(self.observations)] for k in range(size)]


def in_simulator(
    policy: PolicyUnderTest,
    benchmark: Benchmark,
    task: Task,
    protocol: EpisodeProtocol,
    *,
    num_steps: int,
    num_executed_steps: int,
    on_step: Callable[[], object] = lambda: None,
) -> Surroundings:
    """Those of a task, measured. Raises `ValueError` for a robot without a card, and what the benchmark raises where it cannot run."""
    renderer = choose_renderer()
    with closing(benchmark.make_environment(task, protocol, robot_named(policy.robot))) as environment:
        cost, observations = drive(
            environment, policy, num_steps=num_steps, num_executed_steps=num_executed_steps, on_step=on_step
        )
    columns = {
        "benchmark": task.benchmark,
        "suite": task.suite,
        "task": task.name,
        "renderer": renderer,
        "image_px": protocol.image_px,
        "physics_ms": round(cost.physics_ms, 4),
        "render_ms": round(cost.render_ms, 4),
        "reset_s": round(cost.reset_s, 4),
    }
    return Surroundings(observations=observations, columns=columns, simulator=cost)


def drive(
    environment: Environment,
    policy: PolicyUnderTest,
    *,
    num_steps: int,
    num_executed_steps: int,
    on_step: Callable[[], object] = lambda: None,
) -> tuple[SimulatorCost, list[RawObservation]]:
    """Let the policy act for some control steps; what these cost, and observations on the way.

    Every second step is rendered, whatever the policy reads: a step's physics is the same either way, and the policy's actions only
    make the robot move as it will."""
    robot, offsets = environment.robot, len(policy.observation_offsets)
    seen = environment.reset(0, seed=0)
    reset_s = environment.physics_s + environment.render_s
    language = environment.task.language
    observations = [_raw(seen, offsets, language)]
    physics_ms, render_ms = [], []
    noise = np.random.default_rng(0).standard_normal((num_steps, 1, *policy.noise_shape), dtype=np.float32)
    for step in range(num_steps):
        if step % num_executed_steps == 0:
            chunk_HA = policy.act(observations[-1:], noise[step])[0]
        action_A = np.clip(chunk_HA[step % num_executed_steps], -robot.action_limit, robot.action_limit)
        is_rendered = step % 2 == 1
        physics_s, render_s = environment.physics_s, environment.render_s
        seen = environment.step(action_A, render=is_rendered)
        physics_ms.append(1e3 * (environment.physics_s - physics_s))
        if is_rendered:
            render_ms.append(1e3 * (environment.render_s - render_s))
            observations.append(_raw(seen, offsets, language))
        on_step()
    cost = SimulatorCost(
        reset_s=reset_s,
        physics_ms=statistics.median(physics_ms),
        render_ms=statistics.median(render_ms),
        num_steps=num_steps,
    )
    return cost, observations[:NUM_OBSERVATIONS]


def _raw(seen: SimObservation, num_offsets: int, language: str) -> RawObservation:
    """One moment at all offsets: what a decision costs does not depend on what the pictures show."""
    return RawObservation(
        images={camera: np.repeat(image[None], num_offsets, axis=0) for camera, image in seen.images.items()},
        state_TS=np.repeat(seen.state_S[None], num_offsets, axis=0),
        instruction=language,
    )


def without_simulator(
    policy: PolicyUnderTest, *, state_dim: int, image_px: int | None, texts: Sequence[str]
) -> Surroundings:
    """Pictures of noise (256 pixels if not said otherwise), normal states, and the texts in turn."""
    random = np.random.default_rng(0)
    side, offsets = image_px or CAMERA_PX, len(policy.observation_offsets)
    texts = texts or (INSTRUCTION,)
    observations = [
        RawObservation(
            images={
                camera: random.integers(0, 256, (offsets, side, side, 3), dtype=np.uint8) for camera in policy.cameras
            },
            state_TS=random.standard_normal((offsets, state_dim), dtype=np.float32),
            instruction=texts[k % len(texts)],
        )
        for k in range(NUM_OBSERVATIONS)
    ]
    columns: dict[str, Any] = dict.fromkeys(("benchmark", "suite", "task", "renderer"), "")
    return Surroundings(
        observations=observations,
        columns={**columns, "image_px": side, **dict.fromkeys(("physics_ms", "render_ms", "reset_s"))},
    )


def episode_seconds(
    decision_ms: Mapping[str, float],
    simulator: SimulatorCost,
    *,
    num_steps: int,
    num_executed_steps: int,
    observation_offsets: Sequence[int],
) -> dict[str, float]:
    """Seconds of an episode of `num_steps` control steps by cause, in one process that waits for the policy: each part of a decision
    (`decision_ms`), then `physics`, `render` and `reset`. Rendered are the steps that decisions read, as `rollout.roll_out` does it."""
    num_decisions = -(-num_steps // num_executed_steps)
    num_rendered = sum(
        any((step - offset) % num_executed_steps == 0 for offset in observation_offsets)
        for step in range(1, num_steps + 1)
    )
    return {
        **{part: num_decisions * ms / 1e3 for part, ms in decision_ms.items()},
        "physics": num_steps * simulator.physics_ms / 1e3,
        "render": num_rendered * simulator.render_ms / 1e3,
        "reset": simulator.reset_s,
    }
