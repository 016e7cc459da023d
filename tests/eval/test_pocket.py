"""Pocket: its tasks, its scene, its expert, and episodes that depend on their key alone."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

from vlatune.eval.benchmarks import load_benchmark
from vlatune.eval.benchmarks.benchmark import EpisodeProtocol, NoExpert, SimObservation

POCKET = load_benchmark("pocket")
TASKS = POCKET.suites()["pocket"]
PROTOCOL = replace(POCKET.protocols("pocket")["pocket"], image_px=64)
STILL_A = np.array([0.0] * 6 + [-1.0])
PROPRIOCEPTION = ("joint_pos", "joint_pos_cos", "joint_pos_sin", "joint_vel", "eef_pos", "eef_quat", "gripper_qpos")


def make(task_id: int = 0, protocol: EpisodeProtocol = PROTOCOL):
    return POCKET.make_environment(TASKS[task_id], protocol)


@pytest.fixture(scope="module")
def used():
    """An environment that has been through an episode of random actions, and was left in the middle of it."""
    environment = make()
    environment.reset(7, seed=7)
    rng = np.random.default_rng(7)
    for _ in range(23):
        environment.step(np.append(rng.uniform(-1, 1, 6), 1.0), render=False)
    yield environment
    environment.close()


class Outcome(NamedTuple):
    success: bool
    failure_mode: str
    num_steps: int


def act(environment, init_state: int, decide, max_steps: int = PROTOCOL.max_steps) -> Outcome:
    """An episode of `decide(step, observation) -> action`, without pictures."""
    seen = environment.reset(init_state, seed=init_state)
    step = 0
    while step < max_steps and not seen.success:
        seen = environment.step(decide(step, seen), render=False)
        step += 1
    return Outcome(seen.success, environment.failure_mode(), step)


def test_four_instructions_that_differ_in_cube_and_target():
    assert [task.language for task in TASKS] == [
        "pick up the blue cube and put it on the green tray",
        "pick up the blue cube and put it on the yellow plate",
        "pick up the red cube and put it on the green tray",
        "pick up the red cube and put it on the yellow plate",
    ]
    assert [task.task_id for task in TASKS] == [0, 1, 2, 3]
    assert all(task.num_init_states >= 50 for task in TASKS)
    assert len(POCKET.suites()["pocket_holdout"]) == 2


def test_listing_tasks_loads_no_simulator():
    code = (
        "import sys; from vlatune.eval.benchmarks import load_benchmark; b = load_benchmark('pocket'); "
        "b.make_expert(b.suites()['pocket'][0]); print([m for m in ('torch', 'robosuite', 'mujoco', 'libero') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_no_expert_for_an_unknown_task():
    with pytest.raises(NoExpert, match=r"does not know how to 'open_the_drawer'"):
        POCKET.make_expert(replace(TASKS[0], name="open_the_drawer"))


@pytest.mark.sim
def test_observations_are_liberos(used):
    seen = used.reset(0, seed=0)
    assert seen.images.keys() == {"agentview", "eye_in_hand"}
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in seen.images.values())
    assert {f"robot0_{name}" for name in PROPRIOCEPTION} <= seen.low_dim.keys()
    assert {"red_cube_1_pos", "red_cube_1_quat", "blue_cube_1_to_robot0_eef_pos", "object-state"} <= seen.low_dim.keys()
    assert seen.state_S.dtype == np.float32 and seen.state_S.shape == (8,)
    np.testing.assert_allclose(seen.state_S[:3], seen.low_dim["robot0_eef_pos"], rtol=1e-6)
    np.testing.assert_allclose(seen.state_S[6:], [0.0387, -0.0387], atol=1e-3)  # open
    assert np.linalg.norm(seen.state_S[3:6]) == pytest.approx(np.pi, abs=0.1)  # pointing down
    assert not seen.success


@pytest.mark.sim
def test_pictures_are_upside_down_and_both_cameras_see_both_cubes(used):
    for init_state in range(4):
        seen = used.reset(init_state, seed=0)
        for camera, image in seen.images.items():
            red, green, blue = np.moveaxis(image.astype(int), -1, 0)
            assert np.sum((red > 130) & (green < 90) & (blue < 90)) >= 6, f"no red cube in {camera}"
            assert np.sum((blue > 110) & (red < 90) & (green < 110)) >= 6, f"no blue cube in {camera}"
        yellow = (seen.images["agentview"][..., 0] > 180) & (seen.images["agentview"][..., 2] < 80)
        rows = np.nonzero(yellow)[0]
        assert rows.mean() < 32, "the plate is nearest to the camera: low in an upright picture, in the first rows here"


@pytest.mark.sim
def test_a_used_environment_equals_a_fresh_one(used):
    """State, pictures and outcome bit for bit: physics' warm start, the gripper's last command, robosuite's clocks."""
    rng = np.random.default_rng(0)
    actions = np.column_stack([rng.uniform(-1, 1, (40, 6)), rng.choice([-1.0, 1.0], 40)])
    fresh = make()
    for init_state, seed in ((3, 11), (5, 12)):
        pair = [environment.reset(init_state, seed) for environment in (used, fresh)]
        np.random.seed(999)
        for k, action_A in enumerate(actions):
            pair = [environment.step(action_A, render=k % 7 == 6) for environment in (used, fresh)]
            assert np.array_equal(used.mujoco_state(), fresh.mujoco_state()), f"step {k}"
            assert pair[0].images.keys() == pair[1].images.keys()
            for camera in pair[0].images:
                assert np.array_equal(pair[0].images[camera], pair[1].images[camera]), (k, camera)
            for name, value in pair[0].low_dim.items():
                assert np.array_equal(value, pair[1].low_dim[name]), (k, name)
        assert used.failure_mode() == fresh.failure_mode()
        used.reset(9, seed=1)
    fresh.close()


@pytest.mark.sim
def test_skipped_pictures_change_nothing(used):
    """Rendering each step or only when asked: the same pictures of the asked steps, the same states."""
    rng = np.random.default_rng(1)
    actions = rng.uniform(-1, 1, (30, 7))
    runs = []
    for every in (1, 8):
        used.reset(2, seed=2)
        run = {}
        for k, action_A in enumerate(actions):
            seen = used.step(action_A, render=(k + 1) % every == 0)
            assert bool(seen.images) == ((k + 1) % every == 0)
            run[k] = (seen.images, used.mujoco_state(), seen.state_S)
        runs.append(run)
    for k in range(7, 30, 8):
        (images, state, state_S), (other_images, other_state, other_state_S) = runs[0][k], runs[1][k]
        assert all(np.array_equal(images[camera], other_images[camera]) for camera in ("agentview", "eye_in_hand"))
        assert np.array_equal(state, other_state) and np.array_equal(state_S, other_state_S)
    assert not np.array_equal(runs[0][7][0]["agentview"], runs[0][15][0]["agentview"])


@pytest.mark.sim
def test_two_environments_in_one_process_draw_their_own_pictures(used):
    alone = used.reset(4, seed=4).images
    other = make(task_id=3, protocol=replace(PROTOCOL, image_px=48))
    other.reset(5, seed=5)
    beside = used.reset(4, seed=4).images
    assert all(np.array_equal(alone[camera], beside[camera]) for camera in alone)
    other.close()
    afterwards = used.reset(4, seed=4).images
    assert all(np.array_equal(alone[camera], afterwards[camera]) for camera in alone)


@pytest.mark.sim
def test_time_is_accounted_for(used):
    used.reset(0, seed=0)
    physics_s, render_s = used.physics_s, used.render_s
    assert physics_s > 0 and render_s > 0
    used.step(STILL_A, render=False)
    assert used.physics_s > physics_s and used.render_s == render_s
    used.step(STILL_A, render=True)
    assert used.render_s > render_s


@pytest.mark.sim
def test_there_is_no_horizon(used):
    used.reset(0, seed=0)
    used.domain.timestep = 10_000  # robosuite's own would have raised at 1000
    used.step(STILL_A, render=False)
    used.step(STILL_A, render=False)


@pytest.mark.sim
def test_init_states_vary_over_their_regions_and_come_from_their_index(used):
    def cubes(index):
        seen = used.reset(index, seed=0)
        return np.concatenate([seen.low_dim["red_cube_1_pos"][:2], seen.low_dim["blue_cube_1_pos"][:2]])

    places = np.stack([cubes(k) for k in range(50)])
    assert np.all(np.ptp(places, axis=0) > 0.08)
    assert np.all(np.ptp(places, axis=0) < 0.15)
    assert places[:, 1].max() < -0.02 and places[:, 3].min() > 0.02, "red on the robot's right, blue on its left"
    assert np.array_equal(cubes(17), places[17])
    # Pinned: another generator would be another benchmark.
    np.testing.assert_allclose(places[0], FIRST_CUBES, atol=1e-6)
    beyond = np.stack([cubes(k) for k in range(1000, 1010)])
    assert np.abs(beyond[:, None] - places[None]).max(axis=2).min() > 1e-4
    with pytest.raises(ValueError, match="init states from 0 on, not -1"):
        used.reset(-1, seed=0)


FIRST_CUBES = [-0.1309281, -0.0739937, -0.0232141, 0.0430542]


@pytest.mark.sim
def test_the_light_robot_has_liberos_physics():
    from vlatune.eval.benchmarks.pocket.panda import MountedPocketPanda, PocketMount, PocketPandaGripper

    # isort: split
    import mujoco
    from libero.libero.envs.robots import MountedPanda
    from robosuite.models.grippers import PandaGripper
    from robosuite.models.mounts import RethinkMount

    def compiled(robot, gripper, mount):
        robot.add_gripper(gripper)
        robot.add_mount(mount)
        return mujoco.MjModel.from_xml_string(robot.get_xml())

    light = compiled(MountedPocketPanda(), PocketPandaGripper(), PocketMount())
    heavy = compiled(MountedPanda(), PandaGripper(), RethinkMount())
    names = (
        "body_mass",
        "body_inertia",
        "body_ipos",
        "body_pos",
        "body_quat",
        "jnt_range",
        "dof_damping",
        "dof_armature",
    )
    for name in (
        *names,
        "dof_frictionloss",
        "actuator_gainprm",
        "actuator_ctrlrange",
        "actuator_forcerange",
        "cam_pos",
    ):
        np.testing.assert_array_equal(getattr(light, name), getattr(heavy, name), err_msg=name)

    def colliding(model):
        geoms = np.nonzero((model.geom_contype | model.geom_conaffinity) > 0)[0]
        columns = ("geom_type", "geom_size", "geom_pos", "geom_quat", "geom_friction", "geom_solref", "geom_bodyid")
        return {name: getattr(model, name)[geoms] for name in columns}

    for name, values in colliding(light).items():
        np.testing.assert_array_equal(values, colliding(heavy)[name], err_msg=name)
    assert drawn_triangles(light) < 5_000
    assert drawn_triangles(heavy) > 100_000


def drawn_triangles(model) -> int:
    drawn = (model.geom_group == 1) & (model.geom_dataid >= 0)
    return int(model.mesh_facenum[model.geom_dataid[drawn]].sum())


@pytest.mark.sim
@pytest.mark.parametrize("suite", ["pocket", "pocket_holdout"])
def test_the_expert_solves_some_of_each_task(suite):
    for task in POCKET.suites()[suite]:
        assert solved(task, range(2)) == 2, task.name


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute on two quiet cores
def test_the_expert_solves_at_least_95_in_100():
    assert sum(solved(task, range(50)) for task in TASKS) >= 190


def solved(task, init_states) -> int:
    environment, expert = POCKET.make_environment(task, PROTOCOL), POCKET.make_expert(task)
    outcomes = [act(environment, k, lambda _, seen: expert.act(seen)) for k in init_states]
    environment.close()
    assert all(outcome.num_steps < 80 for outcome in outcomes if outcome.success), "the expert dawdles"
    return sum(outcome.success for outcome in outcomes)


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.timeout(3600)  # two minutes on two quiet cores
def test_grasping_without_looking_fails():
    """The best that a policy can do without sight: grasp at the middle of the cube's region, then as the expert."""
    successes = tries = 0
    for task in TASKS:
        environment, expert = POCKET.make_environment(task, PROTOCOL), POCKET.make_expert(task)
        problem = environment.domain.parsed_problem
        (region,) = [state[2] for state in problem["initial_state"] if state[1] == expert.cube]
        x_low, y_low, x_high, y_high = problem["regions"][region]["ranges"][0]
        middle = np.array([(x_low + x_high) / 2, (y_low + y_high) / 2, 0.92])
        for k in range(50):
            closed = [False]

            def blind(_step, seen: SimObservation, closed=closed, expert=expert, middle=middle):
                fingers = seen.low_dim["robot0_gripper_qpos"]
                closed[0] |= bool(fingers[0] - fingers[1] < 0.046)
                cube = seen.low_dim["robot0_eef_pos"] if closed[0] else middle
                return expert.act(replace(seen, low_dim={**seen.low_dim, f"{expert.cube}_pos": cube}))

            successes += act(environment, k, blind, max_steps=100).success
            tries += 1
        environment.close()
    # 28 of 200; a few tip over with the last bits of another machine's physics. With sight it is 200.
    assert successes / tries < 0.25


@pytest.mark.sim
def test_failures_have_names():
    environment, expert = make(), POCKET.make_expert(TASKS[0])
    other_cube = POCKET.make_expert(TASKS[2])

    def never_reached(_step, _seen):
        return STILL_A

    def missed_grasp(_step, seen):
        return np.append(expert.act(seen)[:6], -1.0)

    def wrong_object(_step, seen):
        return other_cube.act(seen)

    lifted = [0]

    def dropped(_step, seen):
        lifted[0] += bool(seen.low_dim["blue_cube_1_pos"][2] > 0.96)
        return STILL_A if lifted[0] > 1 else expert.act(seen)

    def timeout(_step, seen):
        height_m = seen.low_dim["blue_cube_1_pos"][2]
        return np.array([0, 0, 0, 0, 0, 0, 1.0]) if height_m > 0.965 else expert.act(seen)

    for decide in (never_reached, missed_grasp, wrong_object, dropped, timeout):
        outcome = act(environment, 0, decide, max_steps=60)
        assert outcome == (False, decide.__name__, 60)
    outcome = act(environment, 0, lambda _, seen: expert.act(seen))
    assert (outcome.success, outcome.failure_mode) == (True, "")
    environment.close()


@pytest.mark.sim
def test_the_expert_moves_smoothly_and_does_not_wait(used):
    expert = POCKET.make_expert(TASKS[0])
    taken = []

    def decide(_step, seen):
        taken.append(expert.act(seen))
        return taken[-1]

    assert act(used, 1, decide).success
    actions_TA = np.stack(taken)
    assert np.abs(actions_TA).max() <= 1.0
    waits = np.linalg.norm(actions_TA[:, :3], axis=1) < 0.05
    longest = max(Counter(np.cumsum(~waits)[waits]).values(), default=0)
    assert longest <= 4
