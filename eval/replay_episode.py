"""One demonstration in the simulator: its actions again from where it began, its states shown one by one, and from a fresh reset.

**From the recorded state** a replay is exact, bit for bit, where two things that are not in a flattened MuJoCo state are put back.
One is where the furniture stands: the recorded model says it. The other is the gripper's command, which moves a quarter of its
way per control step whatever the fingers do (robosuite's `format_action`): a multiple of 1/4 between two control steps, so that
trying all nine and keeping the one whose first step leads nearest to the second recorded state finds it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.episodes import DataError
from ..data.robots.libero_panda import LIBERO_PANDA
from ..data.sources.libero_hdf5 import LiberoHdf5Source, ObservationTiming
from .benchmarks import load_benchmark
from .benchmarks.benchmark import FixturePose, Task
from .replay_checks import Looks, Measured, check_order, fit_lag, gripper_agreement, look
from .replay_demos import Recording, fixture_poses, read_pictures, read_recording
from .replay_findings import Finding, about_gripper, about_pictures, about_timing

if TYPE_CHECKING:
    from .benchmarks.libero_environment import LiberoEnvironment

GRIPPER_COMMANDS = tuple(np.arange(-4, 5) / 4)
"""Open, …, closed: all that a command can be between two control steps."""
XML_ROUNDING = 1e-5
"""Recorded models have six digits: where they and the seed agree to that, the seed's furniture is the exact one."""


@dataclass(frozen=True, kw_only=True)
class ReplayJob:
    """One demonstration to replay."""

    path: Path
    key: str
    """Its key in a `LiberoHdf5Source` of `path`."""
    task: Task
    timing: ObservationTiming
    num_pictures: int
    """How many of its rows have their pictures compared."""
    picture_tolerance: float
    keep_pictures: bool
    """Whether the compared pictures come back, for a person to look at."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Recorded actions, executed."""

    success: bool
    num_steps: int
    """Actions until success, or all of them."""
    deviations: np.ndarray
    """(T,) the largest difference of a position (metres or radians) from the recorded state before each action."""


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What became of one demonstration."""

    job: ReplayJob
    recording: Recording
    from_state: Run
    gripper_command: float
    """The command that was found for its start."""
    open_loop: Run
    """From a fresh reset, seeded with its init state's index: the very episode again where the file names that index, another
    arrangement of the objects where it does not."""
    open_loop_init_state: int
    lag: float | None
    """Control steps from row t's state to the moment that its observation shows; None where nothing tells."""
    state_error: float
    """Of the worst dataset of `LAYOUTS`, in units of its tolerance."""
    looks: dict[str, Looks]
    """By camera."""
    gripper: float | None
    """See `gripper_agreement`."""
    findings: tuple[Finding, ...]
    pictures: dict[str, tuple[np.ndarray, np.ndarray]]
    """camera -> stored and rendered (P, H, W, 3), with `keep_pictures`."""
    rows: np.ndarray
    """The rows of those pictures."""


_environment: "LiberoEnvironment | None" = None
"""The task that this process replayed last: building it took longer than an episode."""


def replay_demo(job: ReplayJob) -> Replayed:
    """Depends on the job alone. Raises `DataError` where the demonstration cannot be replayed: damaged, or of another model."""
    source = LiberoHdf5Source(job.path, observation_timing=job.timing)
    recording = read_recording(source, job.key)
    environment = _environment_for(job.task, recording.picture_px)
    index = recording.init_state_index
    if index is None:
        index = int(job.key.rpartition("_")[2]) % job.task.num_init_states
    environment.reset(index, seed=index)
    _check_model(recording, environment)
    fixtures = _moved_fixtures(environment, fixture_poses(recording.model_xml))
    command = _gripper_command(environment, recording, index, fixtures)
    environment.reset_to(recording.states_TD[0], index, gripper_command=command, fixtures=fixtures, render=False)
    from_state = _run(environment, recording)
    measured = _measure(environment, recording)
    lag = fit_lag(recording.stored, measured)
    assumed = lag if lag is not None else float(not recording.observed_before)
    checked = [check_order(name, rows, measured, assumed) for name, rows in recording.stored.items()]
    rows_P, stored, rendered = _pictures(environment, source, job, recording, round(assumed))
    looks = {camera: look(pictures, rendered, camera) for camera, pictures in stored.items()}
    gripper = gripper_agreement(_asks_open(recording), measured.fingers)
    environment.reset(index, seed=index)
    return Replayed(
        job=job,
        recording=replace(recording, model_xml="", stored={}),  # they are large, and nobody asks for them again
        from_state=from_state,
        gripper_command=command,
        open_loop=_run(environment, recording),
        open_loop_init_state=index,
        lag=lag,
        state_error=max(error for error, _ in checked),
        looks=looks,
        gripper=gripper,
        findings=(
            *(Finding(check="state", sentence=said) for _, said in checked if said),
            *about_timing(lag, recording.observed_before),
            *about_pictures(looks, job.picture_tolerance),
            *about_gripper(gripper),
        ),
        pictures={camera: (stored[camera], rendered[camera]) for camera in stored} if job.keep_pictures else {},
        rows=rows_P,
    )


def _run(environment: "LiberoEnvironment", recording: Recording) -> Run:
    """All recorded actions from where the environment is; success at any of them is success, as in an evaluation."""
    num_positions = environment.domain.sim.model.nq
    deviations, solved_at = [], None
    for step, (state, action_A) in enumerate(zip(recording.states_TD, recording.actions_TA, strict=True), start=1):
        apart = np.abs(environment.mujoco_state() - state)[1 : 1 + num_positions]
        deviations.append(float(apart.max()))
        if environment.step(action_A, render=False).success and solved_at is None:
            solved_at = step
    return Run(success=solved_at is not None, num_steps=solved_at or len(deviations), deviations=np.array(deviations))


def _gripper_command(
    environment: "LiberoEnvironment", recording: Recording, seed: int, fixtures: dict[str, FixturePose]
) -> float:
    """The command at the recorded start; see the module's first words. Open, as after settling, where there is no second state."""
    if len(recording.states_TD) < 2:
        return GRIPPER_COMMANDS[0]

    def missed_by(command: float) -> float:
        environment.reset_to(recording.states_TD[0], seed, gripper_command=command, fixtures=fixtures, render=False)
        environment.step(recording.actions_TA[0], render=False)
        return float(np.abs(environment.mujoco_state() - recording.states_TD[1]).max())

    return min(GRIPPER_COMMANDS, key=missed_by)


def _moved_fixtures(environment: "LiberoEnvironment", recorded: dict[str, FixturePose]) -> dict[str, FixturePose]:
    """The recorded poses of furniture that the seed put elsewhere."""
    model, moved = environment.domain.sim.model, {}
    for fixture in environment.domain.fixtures_dict.values():
        body = fixture.root_body
        if body in recorded:
            body_id, (position, quaternion) = model.body_name2id(body), recorded[body]
            apart = np.abs(np.r_[model.body_pos[body_id] - position, model.body_quat[body_id] - quaternion]).max()
            if apart > XML_ROUNDING:
                moved[body] = recorded[body]
    return moved


def _measure(environment: "LiberoEnvironment", recording: Recording) -> Measured:
    seen = [environment.show(state, render=False).low_dim for state in recording.states_TD]
    return Measured(
        joints=np.stack([low_dim["robot0_joint_pos"] for low_dim in seen]),
        position=np.stack([low_dim["robot0_eef_pos"] for low_dim in seen]),
        quaternion=np.stack([low_dim["robot0_eef_quat"] for low_dim in seen]),
        fingers=np.stack([low_dim["robot0_gripper_qpos"] for low_dim in seen]),
    )


def _pictures(
    environment: "LiberoEnvironment", source: LiberoHdf5Source, job: ReplayJob, recording: Recording, shift: int
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Evenly spread rows; their stored pictures; and those of the states `shift` rows later, rendered."""
    first, last = max(0, -shift), len(recording.states_TD) - 1 - max(0, shift)
    rows_P = np.unique(np.linspace(first, max(first, last), job.num_pictures).round().astype(int))
    shown = recording.states_TD[np.minimum(rows_P + shift, len(recording.states_TD) - 1)]
    seen = [environment.show(state, render=True).images for state in shown]
    stored = read_pictures(source, job.key, rows_P)
    return rows_P, stored, {camera: np.stack([images[camera] for images in seen]) for camera in stored}


def _asks_open(recording: Recording) -> np.ndarray:
    robot = LIBERO_PANDA
    asked_T = recording.actions_TA[:, robot.gripper_action]
    return np.asarray(np.abs(asked_T - robot.gripper_open) < np.abs(asked_T - robot.gripper_closed))


def _check_model(recording: Recording, environment: "LiberoEnvironment") -> None:
    ours, theirs = len(environment.mujoco_state()), recording.states_TD.shape[1]
    if ours != theirs:
        raise DataError(
            f"{recording.where} has states of {theirs} numbers, and the model of {environment.task.name} has {ours}: it was recorded "
            "with other objects or another robot, and cannot be replayed here"
        )


def _environment_for(task: Task, image_px: int) -> "LiberoEnvironment":
    from .benchmarks.libero_environment import LiberoEnvironment

    global _environment
    if _environment is None or _environment.task != task or _environment.protocol.image_px != image_px:
        if _environment is not None:
            _environment.close()
        benchmark = load_benchmark(task.benchmark)
        protocol = next(iter(benchmark.protocols(task.suite).values()))
        made = benchmark.make_environment(task, replace(protocol, image_px=image_px))
        assert isinstance(made, LiberoEnvironment), "only LIBERO's problems are recorded in LIBERO's format"
        _environment = made
    return _environment
