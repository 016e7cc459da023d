"""One episode, recorded: an expert's rollout as a demonstration in a file of its own."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.files import write_whole
from ..data.raw_observation import RawObservation
from ..data.sources.libero_hdf5_writer import Demo, replacing, write_demo
from .benchmarks import load_benchmark
from .benchmarks.benchmark import SimObservation, Task
from .rollout import roll_out

if TYPE_CHECKING:
    from .benchmarks.libero_environment import LiberoEnvironment

NOISE_SHAPE_A = np.array([1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.0])
"""Positions shake, the wrist hardly, the gripper not at all."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One episode to record."""

    task: Task
    init_state: int
    image_px: int
    noise: float
    seed: int
    part: Path
    """Where it goes: `<part>.hdf5` if it succeeds, `<part>.failed` if not."""

    @property
    def success_path(self) -> Path:
        return self.part.with_name(f"{self.part.name}.hdf5")

    @property
    def failure_path(self) -> Path:
        return self.part.with_name(f"{self.part.name}.failed")

    def is_done(self) -> bool:
        return self.success_path.exists() or self.failure_path.exists()


@dataclass(frozen=True, kw_only=True)
class Recorded:
    success: bool
    num_steps: int


class Recorder:
    """Collects one episode: `meant` before each step, `on_step` from the rollout."""

    def __init__(self) -> None:
        self._meant: list[np.ndarray] = []
        self._executed: list[np.ndarray] = []
        self._states: list[np.ndarray] = []
        self._seen: list[SimObservation] = []

    def meant(self, action_A: np.ndarray) -> None:
        """What the actor wants to do next, whatever noise makes of it."""
        self._meant.append(action_A)

    def on_step(self, _step: int, observation: SimObservation, state: np.ndarray, action_A: np.ndarray) -> None:
        self._seen.append(observation)
        self._states.append(state)
        self._executed.append(action_A)

    def demo(self, environment: "LiberoEnvironment", init_state: int) -> Demo:
        def stacked(name: str) -> np.ndarray:
            return np.stack([seen.low_dim[name] for seen in self._seen])

        meant_TA, executed_TA = np.stack(self._meant), np.stack(self._executed)
        return Demo(
            actions=meant_TA,
            executed_actions=None if np.array_equal(meant_TA, executed_TA) else executed_TA,
            states=np.stack(self._states),
            gripper_states=stacked("robot0_gripper_qpos"),
            joint_states=stacked("robot0_joint_pos"),
            ee_pos=stacked("robot0_eef_pos"),
            ee_quat=stacked("robot0_eef_quat"),
            ee_ori=np.stack([seen.state_S[3:6] for seen in self._seen]),
            images={camera: np.stack([seen.images[camera] for seen in self._seen]) for camera in self._seen[0].images},
            model_file=environment.model_xml(),
            init_state_index=init_state,
        )


_environment: "LiberoEnvironment | None" = None
"""The task that this process recorded last: building it took longer than an episode."""


def record_episode(job: Job) -> Recorded:
    """Run the job; when this returns, its outcome is on disk. Depends on the job alone, not on earlier ones."""
    import h5py

    environment = _environment_for(job)
    expert, recorder = load_benchmark(job.task.benchmark).make_expert(job.task), Recorder()
    expert.reset(job.init_state)
    rng = np.random.default_rng([job.seed, job.init_state])
    limit = environment.robot.action_limit

    def decide(_decision: int, _raw: RawObservation, observation: SimObservation) -> np.ndarray:
        meant_A = np.clip(expert.act(observation), -limit, limit)
        recorder.meant(meant_A)
        return np.clip(meant_A + job.noise * limit * NOISE_SHAPE_A * rng.normal(size=meant_A.shape), -limit, limit)[
            None
        ]

    outcome = roll_out(
        environment,
        decide,
        init_state=job.init_state,
        seed=job.init_state,
        max_steps=environment.protocol.max_steps,
        num_executed_steps=1,
        render_every_step=True,
        on_step=recorder.on_step,
    )
    if outcome.success:
        with replacing(job.success_path) as temporary, h5py.File(temporary, "w") as file:
            data = file.create_group("data")
            for key, value in environment.demo_attributes().items():
                data.attrs[key] = value if isinstance(value, str) else json.dumps(value)
            write_demo(data, "demo_0", recorder.demo(environment, job.init_state))
    else:
        write_whole(job.failure_path, outcome.failure_mode.encode())
    return Recorded(success=outcome.success, num_steps=outcome.num_steps)


def _environment_for(job: Job) -> "LiberoEnvironment":
    from .benchmarks.libero_environment import LiberoEnvironment

    global _environment
    if _environment is None or _environment.task != job.task or _environment.protocol.image_px != job.image_px:
        if _environment is not None:
            _environment.close()
        benchmark = load_benchmark(job.task.benchmark)
        protocol = next(iter(benchmark.protocols(job.task.suite).values()))
        made = benchmark.make_environment(job.task, replace(protocol, image_px=job.image_px))
        assert isinstance(made, LiberoEnvironment), "only LIBERO's problems can be recorded in LIBERO's format"
        _environment = made
    return _environment
