"""LIBERO's problems with LIBERO's own init states, and with new ones drawn as LIBERO drew those."""

from pathlib import Path

import numpy as np

from ....data.robots.card import RobotCard
from ..benchmark import EpisodeProtocol, SimObservation, Task
from ..libero_environment import LiberoEnvironment
from ..libero_library import use_assets
from .init_states import load_init_states

FIRST_DRAWN = 1_000
"""Init states from this on are drawn: for demonstrations, which must not start where policies are evaluated."""
JOINT_NOISE_RAD = 0.02
"""robosuite's standard deviation of the arm's joints at the start; LIBERO's fixed init states have it too."""


MOST_SETTLING_M = 0.06
"""A drawn state in which something goes further than this sideways while it settles, as things do that were placed into
each other, is drawn again; in the fixed ones, of which LIBERO kept 50 of 100, nothing goes further."""
DRAWS = 20
SEED_STRIDE = 1_000_000_007
"""From a draw's seed to the next one's."""


class Environment(LiberoEnvironment):
    """LIBERO's 50 init states by their index; from `FIRST_DRAWN` on, one drawn from the BDDL file's placement regions, a
    function of (task, index) alone, whatever the seed."""

    _drawn_D: np.ndarray

    def reset(self, init_state: int, seed: int) -> SimObservation:
        if init_state < FIRST_DRAWN:
            return super().reset(init_state, seed)
        for k in range(DRAWS):
            self._put_fixtures_back()
            observation = super().reset(init_state, (init_state + k * SEED_STRIDE) % 2**32)
            if self._settling_m() < MOST_SETTLING_M:
                return observation
        raise RuntimeError(f"{self.task.name}: in {DRAWS} draws nothing stood still (init state {init_state})")

    def draw(self, after_reset_D: np.ndarray, index: int) -> np.ndarray:
        """The flattened state after a reset, with the arm a little off, as LIBERO's own init states have it."""
        (panda,) = self.domain.robots
        joints = 1 + np.asarray(panda._ref_joint_pos_indexes)
        self._drawn_D = after_reset_D.copy()
        self._drawn_D[joints] += np.random.default_rng(index).normal(0.0, JOINT_NOISE_RAD, len(joints))
        return self._drawn_D

    def _settling_m(self) -> float:
        """How far the thing that went furthest is from where it was placed, sideways."""
        model, settled_D = self.domain.sim.model, self.mujoco_state()
        firsts = [1 + model.get_joint_qpos_addr(thing.joints[-1])[0] for thing in self.domain.objects_dict.values()]
        return max(float(np.linalg.norm((settled_D - self._drawn_D)[first : first + 2])) for first in firsts)

    def _put_fixtures_back(self) -> None:
        """Where the model's XML has them: LIBERO places what stands on or in a fixture by adding the fixture's new place
        to its sites' current ones, which is right only in a model that was just built."""
        model = self.domain.sim.model
        for fixture in self.domain.fixtures_dict.values():
            built = fixture.get_obj()
            body = model.body_name2id(fixture.root_body)
            model.body_pos[body] = np.array(built.get("pos", "0 0 0").split(), np.float64)
            model.body_quat[body] = np.array(built.get("quat", "1 0 0 0").split(), np.float64)


def make_environment(
    task: Task, protocol: EpisodeProtocol, robot: RobotCard, settle_action: tuple[float, ...]
) -> Environment:
    use_assets()
    bddl = Path(task.bddl_file)
    fixed = load_init_states(bddl.parents[2] / "init_files" / task.suite / f"{task.name}.pruned_init")

    def init_state(after_reset_D: np.ndarray, index: int) -> np.ndarray:
        if index >= FIRST_DRAWN:
            return environment.draw(after_reset_D, index)
        if not 0 <= index < len(fixed):
            raise ValueError(
                f"{task.name} has init states 0 to {len(fixed) - 1}, and new ones drawn from {FIRST_DRAWN} on, not {index}"
            )
        state: np.ndarray = fixed[index]
        return state

    environment = Environment(task, protocol, robot, init_state=init_state, settle_action=np.asarray(settle_action))
    return environment
