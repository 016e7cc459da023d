"""A benchmark without a simulator: a point must reach the dot that the instruction names. Same surface as the real ones.

`trouble` is a folder: a file `<task_id>_<init_state>.<kind>` in it makes that episode misbehave (`exit`, `hang`, `raise`, `once`:
exit the first time only)."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlatune.data.robots.libero_panda import LIBERO_PANDA
from vlatune.data.robots.state import check_parts
from vlatune.eval.benchmarks.benchmark import EpisodeProtocol, NoExpert, SimObservation, Task

COLOURS = ("red", "green", "blue")
PX = 16


def make(trouble: Path | None = None, broken: bool = False, suite: str = "points") -> "FakeBenchmark":
    return FakeBenchmark(trouble, broken, suite)


class FakeBenchmark:
    name = "fake"

    def __init__(self, trouble: Path | None, broken: bool, suite: str) -> None:
        self.trouble, self.broken, self.suite = trouble, broken, suite

    def suites(self):
        return {
            self.suite: [
                Task(
                    benchmark="fake",
                    suite=self.suite,
                    task_id=k,
                    name=f"reach_the_{colour}_dot",
                    language=f"reach the {colour} dot",
                    bddl_file="",
                    num_init_states=20,
                )
                for k, colour in enumerate(COLOURS)
            ]
        }

    def protocols(self, suite):
        protocol = EpisodeProtocol(name="short", max_steps=24, num_settle_steps=1, image_px=PX)
        return {"short": protocol}

    def make_environment(self, task, protocol, robot=LIBERO_PANDA):
        if self.broken:
            raise ImportError("Unable to load OSMesa library")
        return FakeEnvironment(task, self.trouble)

    def make_expert(self, task):
        if task.task_id == 2:
            raise NoExpert("no expert for blue")
        return FakeExpert(task.task_id)


class FakeExpert:
    def __init__(self, colour):
        self.colour = colour

    def reset(self, seed):
        pass

    def act(self, observation):
        action_A = np.zeros(7, np.float32)
        action_A[:2] = np.clip(observation.low_dim["dots"][self.colour] - observation.state_S[:2], -0.1, 0.1) / 0.1
        return action_A


class FakeEnvironment:
    robot = LIBERO_PANDA

    def __init__(self, task, trouble):
        self.task, self.trouble = task, trouble
        self.physics_s = self.render_s = 0.0

    def reset(self, init_state, seed):
        rng = np.random.default_rng([self.task.task_id, init_state, seed])
        angle = rng.uniform(0, 2 * np.pi, 3)
        self.dots = rng.uniform(0.4, 0.9, (3, 1)) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        self.point = rng.uniform(-0.1, 0.1, 2)
        self.physics_s, self.render_s = 0.001, 0.002
        self._misbehave(init_state)
        return self._observation(render=True)

    def _misbehave(self, init_state):
        if self.trouble is None:
            return
        name = f"{self.task.task_id}_{init_state}"
        if (self.trouble / f"{name}.slow").exists():
            time.sleep(0.2)
        if (self.trouble / f"{name}.raise").exists():
            raise RuntimeError("the physics\nexploded")
        if (self.trouble / f"{name}.hang").exists():
            time.sleep(60)
        if (self.trouble / f"{name}.exit").exists():
            os._exit(3)
        if (self.trouble / f"{name}.once").exists():
            (self.trouble / f"{name}.once").unlink()
            os.kill(os.getpid(), 9)

    def step(self, action_A, *, render):
        self.point = self.point + 0.1 * np.asarray(action_A, float)[:2]
        self.physics_s += 0.001
        return self._observation(render)

    def _observation(self, render):
        images = {}
        if render:
            self.render_s += 0.002
            image = np.zeros((PX, PX, 3), np.uint8)
            for channel, dot in enumerate(self.dots):
                row, column = np.round((dot + 1) / 2 * (PX - 1)).astype(int)
                image[row, column, channel] = 255
            images = {"agentview": image, "eye_in_hand": image[::-1].copy()}
        state_S = np.zeros(8, np.float32)
        state_S[:2] = self.point
        near = np.linalg.norm(self.dots[self.task.task_id] - self.point) < 0.1
        return SimObservation(images=images, state_S=state_S, low_dim={"dots": self.dots}, success=bool(near))

    def mujoco_state(self):
        return self.point.copy()

    def failure_mode(self):
        near = np.linalg.norm(self.dots[self.task.task_id] - self.point) < 0.1
        return "" if near else "never_reached"

    def close(self):
        pass


class Watched(FakeEnvironment):
    """Notes the steps that were rendered, and never succeeds; its state's third entry is the step, and so is every pixel of its pictures."""

    def __init__(self):
        super().__init__(make().suites()["points"][0], None)
        self.step_index, self.rendered = 0, []

    def step(self, action_A, *, render):
        self.step_index += 1
        return super().step(action_A, render=render)

    def _observation(self, render):
        seen = super()._observation(render)
        state_S = seen.state_S.copy()
        state_S[2] = self.step_index
        if render:
            self.rendered.append(self.step_index)
        images = {camera: np.full_like(image, self.step_index) for camera, image in seen.images.items()}
        return replace(seen, images=images, state_S=state_S, success=False)


def fingers_only():
    """A benchmark whose simulator measures the gripper's joints and nothing else."""
    benchmark = make()
    benchmark.make_environment = lambda task, protocol, robot: check_parts(robot, ("gripper_joints",))
    return benchmark
