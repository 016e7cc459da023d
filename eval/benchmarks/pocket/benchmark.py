"""Pocket: four instructions over one table, told apart by language alone; LIBERO's robot, rates and predicates."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from ....data.robots.card import RobotCard
from ....data.robots.libero_panda import LIBERO_PANDA
from ..benchmark import Environment, EpisodeProtocol, NoExpert, ScriptedExpert, Task

BDDL = Path(__file__).parent / "bddl"
SUITES = ("pocket", "pocket_holdout")
NUM_INIT_STATES = 50
"""Fixed init states for evaluation; the generator goes on beyond them, for demonstrations."""

PROTOCOL = EpisodeProtocol(name="pocket", max_steps=150, num_settle_steps=10, image_px=128, num_trials=NUM_INIT_STATES)


class Pocket:
    name = "pocket"

    def suites(self) -> Mapping[str, Sequence[Task]]:
        return _suites()

    def protocols(self, suite: str) -> Mapping[str, EpisodeProtocol]:
        return {PROTOCOL.name: PROTOCOL}

    def make_environment(self, task: Task, protocol: EpisodeProtocol, robot: RobotCard = LIBERO_PANDA) -> Environment:
        from .environment import make_environment

        return make_environment(task, protocol, robot)

    def make_expert(self, task: Task) -> ScriptedExpert:
        from .expert import PickAndPlace

        goal = re.fullmatch(r"pick_up_the_(\w+_cube)_and_put_it_on_the_(\w+)", task.name)
        if goal is None:
            raise NoExpert(f"pocket's expert picks and places cubes; it does not know how to {task.name!r}")
        return PickAndPlace(cube=f"{goal[1]}_1", target=f"{goal[2]}_1")


@cache
def _suites() -> Mapping[str, Sequence[Task]]:
    return {
        suite: tuple(_task(suite, k, path) for k, path in enumerate(sorted((BDDL / suite).glob("*.bddl"))))
        for suite in SUITES
    }


def _task(suite: str, task_id: int, path: Path) -> Task:
    return Task(
        benchmark="pocket",
        suite=suite,
        task_id=task_id,
        name=path.stem,
        language=path.stem.replace("_", " "),
        bddl_file=str(path),
        num_init_states=NUM_INIT_STATES,
    )


def make() -> Pocket:
    return Pocket()
