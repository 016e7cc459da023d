"""LIBERO's five suites, under the protocols by which results are published."""

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from ....data.robots.card import RobotCard
from ....data.robots.libero_panda import LIBERO_PANDA
from ....data.sources.libero_hdf5 import language_of
from ..benchmark import Environment, EpisodeProtocol, ScriptedExpert, Task

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
OPENVLA_MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""About the longest demonstration of each suite, and a bit; OpenVLA, -OFT and openpi all use these."""
NUM_INIT_STATES = 50
SETTLE_ACTIONS = {"openvla": LIBERO_PANDA.still_action, "lerobot": LIBERO_PANDA.still_action, "libero": (0.0,) * 7}
"""OpenVLA's and LeRobot's hold the gripper open while the scene settles; LIBERO's own leaves it half-way."""


class Libero:
    name = "libero"

    def suites(self) -> Mapping[str, Sequence[Task]]:
        return _suites()

    def protocols(self, suite: str) -> Mapping[str, EpisodeProtocol]:
        if suite not in OPENVLA_MAX_STEPS:
            raise ValueError(f"libero has no suite {suite!r}; it has {', '.join(SUITES)}")
        max_steps = OPENVLA_MAX_STEPS[suite]
        protocols = (
            EpisodeProtocol(name="openvla", max_steps=max_steps, num_settle_steps=10, image_px=256, num_trials=50),
            EpisodeProtocol(name="libero", max_steps=600, num_settle_steps=5, image_px=128, num_trials=20),
            # LeRobot gives Spatial 280 steps, the others what OpenVLA gives them, and draws larger pictures.
            EpisodeProtocol(
                name="lerobot", max_steps=max(max_steps, 280), num_settle_steps=10, image_px=360, num_trials=10
            ),
        )
        return {protocol.name: protocol for protocol in protocols}

    def make_environment(self, task: Task, protocol: EpisodeProtocol, robot: RobotCard = LIBERO_PANDA) -> Environment:
        """Raises `AssetsError` where LIBERO's assets are not installed."""
        from .environment import make_environment

        return make_environment(task, protocol, robot, SETTLE_ACTIONS[protocol.name])

    def make_expert(self, task: Task) -> ScriptedExpert:
        """Picks one thing up and puts it down; raises `NoExpert` for tasks that ask for anything else."""
        from .expert import make_expert

        return make_expert(task)


@cache
def _suites() -> Mapping[str, Sequence[Task]]:
    from ..libero_paths import libero_folder

    folder = libero_folder()
    return {
        suite: tuple(
            Task(
                benchmark="libero",
                suite=suite,
                task_id=task_id,
                name=name,
                language=language_of(name),
                bddl_file=str(folder / "bddl_files" / suite / f"{name}.bddl"),
                num_init_states=NUM_INIT_STATES,
            )
            for task_id, name in enumerate(_task_names(folder)[suite])
        )
        for suite in SUITES
    }


def _task_names(folder: Path) -> dict[str, list[str]]:
    """Suite -> task names in LIBERO's order, from the one file of LIBERO that has them and imports nothing."""
    path = folder / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("libero_suite_task_map", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names: dict[str, list[str]] = module.libero_task_map
    return names


def make() -> Libero:
    return Libero()
