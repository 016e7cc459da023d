"""LIBERO's scripted expert: which tasks it knows, how it tries again; with LIBERO's assets, that it succeeds and is recorded."""

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from vlatune.data.cache import Cache
from vlatune.data.prepare import PrepareConfig, prepare
from vlatune.data.sources.libero_hdf5 import LiberoHdf5Source
from vlatune.eval.benchmarks import load_benchmark
from vlatune.eval.benchmarks.benchmark import NoExpert, SimObservation
from vlatune.eval.benchmarks.libero.expert import PickAndPlace, read_goal
from vlatune.eval.benchmarks.libero.grasps import SHAPES
from vlatune.eval.benchmarks.libero.init_states import load_init_states
from vlatune.eval.collect import Collect, collect

LIBERO = load_benchmark("libero")
CLAIMED = {"libero_spatial": range(10), "libero_object": range(10), "libero_goal": (1, 2, 4, 6, 8, 9)}


def task_of(suite: str, task_id: int):
    return LIBERO.suites()[suite][task_id]


def make(suite: str, task_id: int):
    protocol = replace(LIBERO.protocols(suite)["openvla"], image_px=16)
    return LIBERO.make_environment(task_of(suite, task_id), protocol)


def test_which_tasks_it_knows():
    known = []
    for tasks in LIBERO.suites().values():
        for task in tasks:
            try:
                LIBERO.make_expert(task)
            except NoExpert as error:
                assert "1, 2, 4, 6, 8 and 9 of libero_goal; it does not know how to" in str(error)
                assert task.name in str(error) and "\n" not in str(error)
            else:
                known.append((task.suite, task.task_id))
    assert known == [(suite, task_id) for suite, task_ids in CLAIMED.items() for task_id in task_ids]


def test_making_one_loads_no_simulator():
    code = (
        "import sys; from vlatune.eval.benchmarks import load_benchmark; b = load_benchmark('libero'); "
        "b.make_expert(b.suites()['libero_spatial'][0]); print([m for m in ('torch', 'robosuite', 'mujoco') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_goal_says_which_of_two_bowls_and_where_it_starts():
    in_drawer = read_goal(Path(task_of("libero_spatial", 4).bddl_file).read_text())
    assert in_drawer is not None
    assert (in_drawer.thing, in_drawer.target) == ("akita_black_bowl_1", "plate_1")
    assert in_drawer.drawer == "wooden_cabinet_1_top_region"
    on_table = read_goal(Path(task_of("libero_spatial", 2).bddl_file).read_text())
    assert on_table is not None and on_table.drawer == ""
    assert read_goal(Path(task_of("libero_goal", 7).bddl_file).read_text()) is None, "a knob"


class FloatingHand:
    """A hand that goes where it is told and carries what its fingers close on: no physics, for what the expert decides."""

    DOWN = np.array([1.0, 0.0, 0.0, 0.0])

    def __init__(self) -> None:
        self.expert = LIBERO.make_expert(task_of("libero_object", 1))
        assert isinstance(self.expert, PickAndPlace)
        self.eef = np.array([-0.2, 0.0, 0.27])
        self.cheese = np.array([0.05, -0.1, 0.009])
        self.basket = np.array([0.0, 0.26, 0.067])
        self.width_m, self.velocity_m_s = 0.078, 0.0

    def step(self) -> np.ndarray:
        finger = self.width_m / 2
        action_A = self.expert.act(
            SimObservation(
                images={},
                state_S=np.zeros(8, np.float32),
                low_dim={
                    "robot0_eef_pos": self.eef.copy(),
                    "robot0_eef_quat": self.DOWN,
                    "robot0_gripper_qpos": np.array([finger, -finger]),
                    "robot0_gripper_qvel": np.array([self.velocity_m_s, -self.velocity_m_s]),
                    "cream_cheese_1_pos": self.cheese.copy(),
                    "cream_cheese_1_quat": np.array([0.0, 0.0, 1.0, 0.0]),
                    "basket_1_contain_region_pos": self.basket,
                },
                success=False,
            )
        )
        moved = np.clip(action_A[:3], -1, 1) * 0.02
        between = np.abs(self.eef - self.cheese).max() < 0.02
        width_m = np.clip(self.width_m - 0.01 * action_A[6], 0.042 if between else 0.002, 0.078)
        if between and self.width_m == width_m == 0.042:
            self.cheese = self.cheese + moved
        elif not between or width_m > 0.042:
            self.cheese[2] = 0.009
        self.eef = self.eef + moved
        self.velocity_m_s, self.width_m = abs(width_m - self.width_m) * 20, float(width_m)
        return action_A

    def placed(self) -> bool:
        return bool(np.linalg.norm((self.cheese - self.basket)[:2]) < 0.02 and self.width_m > 0.07)


def test_it_lifts_before_it_travels_and_lets_go_over_the_target():
    hand = FloatingHand()
    path = []
    for _ in range(200):
        hand.step()
        path.append(hand.cheese.copy())
        if hand.placed():
            break
    assert hand.placed()
    path_TP = np.array(path)
    off_T = np.linalg.norm((path_TP - hand.basket)[:, :2], axis=1)
    at_the_wall = (off_T > 0.06) & (off_T < 0.12)
    assert at_the_wall.any() and path_TP[at_the_wall, 2].min() > 0.146, "over the basket's wall"


def test_what_it_dropped_it_picks_up_again():
    hand = FloatingHand()
    while hand.cheese[2] < 0.1:
        hand.step()
    hand.cheese = np.array([-0.1, 0.05, 0.009])
    grips = []
    for _ in range(300):
        grips.append(hand.step()[6])
        if hand.placed():
            break
    assert hand.placed()
    assert grips[0] == -1.0, "it opens at once"


def test_closed_on_nothing_it_opens_fully_before_it_tries_again():
    hand = FloatingHand()
    hand.eef = hand.cheese + [0.0, 0.0, 0.03]
    hand.width_m = 0.001
    widths = []
    while hand.step()[6] < 0 and len(widths) < 50:
        widths.append(hand.width_m)
    assert max(widths) > 0.07, "it closed again before it was open"


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.parametrize(("suite", "task_id"), [("libero_object", 0), ("libero_object", 3), ("libero_goal", 1)])
def test_sizes_are_the_simulators(suite, task_id):
    environment = make(suite, task_id)
    environment.reset(0, seed=0)
    problem = environment.domain
    model, data = problem.sim.model, problem.sim.data
    for name in problem.objects_dict:
        kind = name.rsplit("_", 1)[0]
        if kind not in SHAPES:
            continue
        shape, body = SHAPES[kind], problem.obj_body_id[name]
        turned = data.body_xmat[body].reshape(3, 3)
        corners = np.array(
            [
                turned.T
                @ (
                    data.geom_xpos[g]
                    + data.geom_xmat[g].reshape(3, 3) @ (model.geom_size[g] * sign)
                    - data.body_xpos[body]
                )
                for g in range(model.ngeom)
                if model.body_rootid[model.geom_bodyid[g]] == model.body_rootid[body] and model.geom_contype[g]
                for sign in itertools.product((-1, 1), repeat=3)
            ]
        )
        along, across = corners @ shape.up, corners @ shape.across
        assert (turned @ shape.up)[2] > 0.99, f"{name} does not stand"
        assert along.min() == pytest.approx(shape.bottom_m, abs=0.002), name
        assert along.max() - shape.grip_m < 0.045, f"{name} reaches the palm"
        if shape.rim_radius_m:
            assert across.max() == pytest.approx(shape.rim_radius_m, abs=0.006), name
        else:
            # A bottle is thinner where it is held, and round things' boxes have corners.
            assert across.max() - across.min() >= shape.width_m - 0.004, name
            assert shape.width_m + 0.005 < 0.07, f"{name} does not fit between the fingers"
    environment.close()


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "task_id"),
    [("libero_spatial", 4), ("libero_spatial", 6), ("libero_object", 0), ("libero_object", 6), ("libero_goal", 9)],
    ids=["bowl_in_a_drawer", "bowl_by_the_cabinet", "can", "flat_box", "bottle_on_the_rack"],
)
def test_it_succeeds(suite, task_id):
    environment, expert = make(suite, task_id), LIBERO.make_expert(task_of(suite, task_id))
    for init_state in (0, 5):
        expert.reset(init_state)
        seen, num_steps = environment.reset(init_state, seed=init_state), 0
        while not seen.success and num_steps < 150:  # of 220 to 300: it should not dawdle
            seen = environment.step(np.clip(expert.act(seen), -1, 1), render=False)
            num_steps += 1
        assert seen.success, (init_state, environment.failure_mode())
    environment.close()


@pytest.mark.libero
@pytest.mark.slow
def test_drawn_init_states_depend_on_their_index_alone():
    """Task 4's bowls stand in and on a fixture: LIBERO places them rightly only in a model that was just built."""
    suite, task_id = "libero_spatial", 4
    task, (used, fresh) = task_of(suite, task_id), (make(suite, task_id), make(suite, task_id))
    settled = {}
    for index, seed in ((1003, 0), (2, 7), (1004, 0)):
        used.reset(index, seed)
        settled[index] = used.mujoco_state()
        used.step(np.array([0.5, -0.5, 0.2, 0, 0, 0.5, 1.0]), render=False)
    used.reset(1003, seed=99)
    assert np.array_equal(used.mujoco_state(), settled[1003])
    fresh.reset(1003, seed=1003)
    assert np.array_equal(fresh.mujoco_state(), settled[1003])
    fresh.reset(2, seed=7)
    assert np.array_equal(fresh.mujoco_state(), settled[2]), "drawn states leave the fixed ones as they were"
    assert np.abs(settled[1003] - settled[1004])[1:8].max() > 1e-3, "the arm's start varies"

    path = Path(task.bddl_file).parents[2] / "init_files" / suite / f"{task.name}.pruned_init"
    fixed_ND, drawn_D = load_init_states(path), used._drawn_D
    columns = slice(1, 1 + used.domain.sim.model.nq)
    margin = np.where(np.arange(used.domain.sim.model.nq) < 7, 0.06, 0.01)
    assert np.all(drawn_D[columns] > fixed_ND[:, columns].min(axis=0) - margin), "out of LIBERO's own range"
    assert np.all(drawn_D[columns] < fixed_ND[:, columns].max(axis=0) + margin), "out of LIBERO's own range"
    for index in (50, 999):
        with pytest.raises(ValueError, match=f"init states 0 to 49, and new ones drawn from 1000 on, not {index}"):
            used.reset(index, seed=0)
    used.close()
    fresh.close()


@pytest.mark.libero
@pytest.mark.slow
def test_a_collected_demonstration_reads_back_and_runs_again(tmp_path):
    collect(
        Collect(
            out=tmp_path / "demos",
            benchmark="libero",
            suite="libero_spatial",
            tasks=("0",),
            episodes=1,
            image_px=32,
            workers=1,
        )
    )
    task = task_of("libero_spatial", 0)
    file = tmp_path / "demos" / f"{task.name}_demo.hdf5"
    (key,) = LiberoHdf5Source(file).keys()
    episode = LiberoHdf5Source(file).read(key)
    assert episode.instruction == task.language
    cache = Cache.open(prepare(PrepareConfig(demos=tmp_path / "demos", out=tmp_path / "cache", image_px=32)))
    assert len(cache.episodes) == 1

    environment = LIBERO.make_environment(task, replace(LIBERO.protocols("libero_spatial")["openvla"], image_px=32))
    with h5py.File(file, "r") as opened:
        data, demo = opened["data"], opened["data/demo_0"]
        assert data.attrs["env_name"] == "Libero_Tabletop_Manipulation"
        assert "akita_black_bowl_1" in data.attrs["bddl_file_content"]
        assert demo.attrs["init_state_index"] == 1000
        seen = environment.reset(1000, seed=0)
        for k, action_A in enumerate(demo["actions"][()]):
            np.testing.assert_array_equal(environment.mujoco_state(), demo["states"][k])
            np.testing.assert_array_equal(seen.images["agentview"], demo["obs/agentview_rgb"][k])
            seen = environment.step(action_A, render=True)
        assert seen.success
    environment.close()
