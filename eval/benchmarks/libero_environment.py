"""LIBERO problems (its own suites, and pocket) as environments whose episode depends on its key alone.

Written on robosuite's problem class itself, not on LIBERO's `ControlEnv`: that one's `reset` loops for ever on any
error. The model is built once (a hard reset costs seconds); what robosuite 1.4.0 would carry from one episode into the
next is put back, and tests compare a used environment with a fresh one bit by bit:
    fixtures are placed by the global numpy generator and are not part of the state: it is seeded before each reset;
    the gripper keeps its last command: it gets its first value;
    colours that show a state (a stove that is on) live in the model: LIBERO's post-processing sets them, before settling;
    past its horizon `step` raises: there is no horizon, the rollout counts steps.
"""

import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...data.robots.card import RobotCard
from ...data.robots.libero_panda import MEASURED
from ...data.robots.state import assemble_state, check_parts
from ...data.rotations import quaternion_to_axis_angle
from .benchmark import EpisodeProtocol, FixturePose, SimObservation, Task
from .libero_library import libero_envs, robosuite
from .progress import Progress

# isort: split
from robosuite.utils.errors import RandomizationError
from robosuite.utils.observables import Observable, sensor

CAMERAS = {"agentview": "agentview", "eye_in_hand": "robot0_eye_in_hand"}
"""Ours -> robosuite's."""

PLACEMENT_TRIES = 100

InitState = Callable[[np.ndarray, int], np.ndarray]
"""(flattened state after the reset, index) -> flattened state to start from."""


class LiberoEnvironment:
    """One task's simulator; see `benchmark.Environment`.

    Cameras are observables of our own, sampled when robosuite samples its others: once per control step, at one of its 25
    physics substeps (the second but last, after an init state was set). Where no image is wanted the observable returns an
    empty array: clocks and sampling points are those of a run that renders every step.

    `robot` is the card whose state observations show; the simulated robot is LIBERO's Panda whatever it says."""

    def __init__(
        self,
        task: Task,
        protocol: EpisodeProtocol,
        robot: RobotCard,
        *,
        init_state: InitState,
        settle_action: np.ndarray,
    ) -> None:
        check_parts(robot, MEASURED)
        self.task = task
        self.protocol = protocol
        self.robot = robot
        self.physics_s = 0.0
        self.render_s = 0.0
        self._init_state = init_state
        self._settle_action = settle_action
        self._want_images = False
        self.problem_info: dict[str, str] = libero_envs.bddl_base_domain.BDDLUtils.get_problem_info(task.bddl_file)
        """LIBERO's: problem_name, domain_name, language_instruction (the BDDL's, which is not `task.language`)."""
        self._controller = robosuite.load_controller_config(default_controller="OSC_POSE")
        self.domain = libero_envs.TASK_MAPPING[self.problem_info["problem_name"]](
            task.bddl_file,
            robots=["Panda"],
            controller_configs=copy.deepcopy(self._controller),
            initialization_noise=None,
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=True,
            control_freq=int(self.robot.control_hz),
            ignore_done=True,
            hard_reset=False,
        )
        for camera, name in CAMERAS.items():
            self.domain.add_observable(
                Observable(name=f"{name}_image", sensor=self._camera(camera), sampling_rate=self.robot.control_hz)
            )
        self._progress = Progress(self.domain)

    def reset(self, init_state: int, seed: int) -> SimObservation:
        return self._start(
            seed,
            lambda after_reset: self._init_state(after_reset, init_state),
            num_settle_steps=self.protocol.num_settle_steps,
        )

    def reset_to(
        self,
        state: np.ndarray,
        seed: int,
        *,
        gripper_command: float = -1.0,
        fixtures: Mapping[str, FixturePose] | None = None,
        render: bool = True,
    ) -> SimObservation:
        """Start from a flattened simulator state, without settling.

        What such a state does not hold is given beside it. `gripper_command`: where the gripper's slow command stands, from -1
        (open) to 1 (closed); a control step takes it a quarter of 1 further. `fixtures`: where furniture stands that a seed alone
        would put elsewhere. With both right, an episode goes on as it did, bit for bit (`tests/eval/test_replay.py`)."""
        observation = self._start(
            seed,
            lambda _: state,
            num_settle_steps=0,
            gripper_command=gripper_command,
            fixtures=fixtures or {},
            render=render,
        )
        for robot in self.domain.robots:
            # Or its first goal would be relative to the pose before the state was set, which in `reset` the settling forgets.
            robot.controller.new_update = True
        return observation

    def show(self, state: np.ndarray, *, render: bool) -> SimObservation:
        """What is seen and measured in a flattened simulator state, just then. Call `reset` or `reset_to` before stepping."""
        self._want_images = render
        return self._observation(self._observables_in(state))

    def _start(
        self,
        seed: int,
        start_state: Callable[[np.ndarray], np.ndarray],
        *,
        num_settle_steps: int,
        gripper_command: float = 0.0,
        fixtures: Mapping[str, FixturePose] | None = None,
        render: bool = True,
    ) -> SimObservation:
        start = time.perf_counter()
        self.physics_s = self.render_s = 0.0
        domain = self.domain
        domain.seed(seed)
        self._want_images = False
        for _ in range(PLACEMENT_TRIES):
            try:
                domain.reset()
                break
            except RandomizationError:
                continue
        else:
            raise RuntimeError(
                f"{self.task.name}: objects could not be placed in {PLACEMENT_TRIES} tries (seed {seed})"
            )
        for robot in domain.robots:
            robot.gripper.current_action = gripper_command * np.array([-1.0, 1.0])
        for body, (position, quaternion) in (fixtures or {}).items():
            body_id = domain.sim.model.body_name2id(body)
            domain.sim.model.body_pos[body_id], domain.sim.model.body_quat[body_id] = position, quaternion
        self._want_images = render and num_settle_steps == 0
        observables = self._observables_in(start_state(self.mujoco_state()))
        for k in range(num_settle_steps):
            self._want_images = k == num_settle_steps - 1
            observables, _, _, _ = domain.step(self._settle_action)
        self._progress.reset()
        self.physics_s = time.perf_counter() - start - self.render_s
        return self._observation(observables)

    def step(self, action_A: np.ndarray, *, render: bool) -> SimObservation:
        start, rendered_s = time.perf_counter(), self.render_s
        self._want_images = render
        observables, _, _, _ = self.domain.step(np.asarray(action_A, dtype=np.float64))
        self._progress.update()
        self.physics_s += time.perf_counter() - start - (self.render_s - rendered_s)
        return self._observation(observables)

    def _observables_in(self, state: np.ndarray) -> dict[str, np.ndarray]:
        """robosuite's observables after `state` was set."""
        domain = self.domain
        domain.sim.set_state_from_flattened(state)
        domain.sim.forward()
        domain._post_process()
        domain._update_observables(force=True)
        observables: dict[str, np.ndarray] = domain._get_observations()
        return observables

    def mujoco_state(self) -> np.ndarray:
        state: np.ndarray = self.domain.sim.get_state().flatten()
        return state

    def model_xml(self) -> str:
        """The compiled model, as LIBERO's demonstrations store it."""
        xml: str = self.domain.sim.model.get_xml()
        return xml

    def demo_attributes(self) -> dict[str, Any]:
        """What LIBERO writes over a task's demonstrations, by its names."""
        bddl = Path(self.task.bddl_file)
        side = self.protocol.image_px
        return {
            "env_name": type(self.domain).__name__,
            "problem_info": self.problem_info,
            "macros_image_convention": "opengl",
            "bddl_file_name": f"{self.task.suite}/{bddl.name}",
            "bddl_file_content": bddl.read_text(),
            "env_args": {
                "type": 1,
                "env_name": type(self.domain).__name__,
                "problem_name": self.problem_info["problem_name"],
                "bddl_file": f"{self.task.suite}/{bddl.name}",
                "env_kwargs": {
                    "robots": ["Panda"],
                    "controller_configs": self._controller,
                    "bddl_file_name": f"{self.task.suite}/{bddl.name}",
                    "has_renderer": False,
                    "has_offscreen_renderer": True,
                    "ignore_done": True,
                    "use_camera_obs": True,
                    "camera_depths": False,
                    "camera_names": list(reversed(CAMERAS.values())),
                    "reward_shaping": False,
                    "control_freq": int(self.robot.control_hz),
                    "camera_heights": side,
                    "camera_widths": side,
                    "camera_segmentations": None,
                },
            },
        }

    def failure_mode(self) -> str:
        return self._progress.failure_mode()

    def close(self) -> None:
        self.domain.close()

    def _camera(self, camera: str) -> Callable[[Any], np.ndarray]:
        @sensor(modality="image")
        def image(_cache: Any) -> np.ndarray:
            if not self._want_images:
                return np.zeros((0, 0, 3), np.uint8)
            start = time.perf_counter()
            side = self.protocol.image_px
            # robosuite leaves the newest environment's OpenGL context current, whichever is asked for a picture.
            self.domain.sim._render_context_offscreen.gl_ctx.make_current()
            pixels: np.ndarray = self.domain.sim.render(camera_name=CAMERAS[camera], width=side, height=side)
            self.render_s += time.perf_counter() - start
            return pixels

        return image

    def _observation(self, observables: dict[str, np.ndarray]) -> SimObservation:
        images, low_dim = {}, {}
        names = {f"{name}_image": camera for camera, name in CAMERAS.items()}
        for name, value in observables.items():
            if name not in names:
                low_dim[name] = value
            elif self._want_images:
                images[names[name]] = value
        for name in self.domain.fixtures_dict:
            low_dim[f"{name}_pos"] = self.domain.sim.data.body_xpos[self.domain.obj_body_id[name]].copy()
        for name in self.domain.object_sites_dict:
            low_dim[f"{name}_pos"] = self.domain.sim.data.get_site_xpos(name).copy()
        return SimObservation(
            images=images,
            state_S=assemble_state(self.robot, state_parts(low_dim)),
            low_dim=low_dim,
            success=bool(self.domain._check_success()),
        )


def state_parts(low_dim: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the Panda's state can be made of, from robosuite's observables."""
    return {
        "eef_position": low_dim["robot0_eef_pos"],
        "eef_axis_angle": quaternion_to_axis_angle(low_dim["robot0_eef_quat"]),
        "gripper_joints": low_dim["robot0_gripper_qpos"],
        "joint_positions": low_dim["robot0_joint_pos"],
    }
