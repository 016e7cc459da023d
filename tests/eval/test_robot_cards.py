"""A policy gets the state of the card it was trained with, whoever simulates."""

import dataclasses
from functools import partial
from pathlib import Path

import fake_point_world
import numpy as np
import pytest
from fake_policy import FakePolicy

from vlatune.data.episodes import DataError
from vlatune.data.robots import LIBERO_PANDA, LIBERO_PANDA_JOINTS, LIBERO_PANDA_JOINTS_FINGERS
from vlatune.data.robots.libero_panda import gripper_opening
from vlatune.eval.benchmarks import load_benchmark
from vlatune.eval.simulator_process import EpisodeSpec
from vlatune.eval.sweep_plan import Wanted, make_plan
from vlatune.eval.workers import SimulatorError, WorkerPool


def spec(robot: str, actor: str = "policy") -> EpisodeSpec:
    plan = make_plan(
        fake_point_world.make(), Wanted(tasks=(0,), selection_episodes=1, report_episodes=1, actors=("policy",))
    )
    policy = FakePolicy(skill=1.0, weights_hash="0")
    policy.robot = robot
    asks = policy if actor == "policy" else None
    return plan.specs("report", actor, policy=asks, checkpoint=None, num_executed_steps=1, videos=Path("videos"))[0]


def test_an_episode_carries_its_policys_card():
    assert spec("libero_panda_joints").robot == LIBERO_PANDA_JOINTS
    assert spec("", actor="zero").robot == LIBERO_PANDA


def test_a_policy_of_an_unknown_robot_is_refused_before_any_episode():
    with pytest.raises(ValueError, match=r"no robot 'libero_pands'; did you mean 'libero_panda'\?"):
        spec("libero_pands")


def test_a_simulator_that_cannot_show_the_card_stops_the_sweep():
    with (
        WorkerPool(fake_point_world.fingers_only, num_workers=1) as pool,
        pytest.raises(
            SimulatorError, match="'libero_panda' has a part 'eef_position', and what is measured here is gripper"
        ),
    ):
        list(pool.run([spec("libero_panda")], None))


@pytest.mark.sim
def test_pocket_shows_the_state_of_every_card():
    benchmark = load_benchmark("pocket")
    task = benchmark.suites()["pocket"][0]
    protocol = dataclasses.replace(benchmark.protocols("pocket")["pocket"], image_px=32)
    make = partial(benchmark.make_environment, task, protocol)
    seen = {}
    for card in (LIBERO_PANDA, LIBERO_PANDA_JOINTS, LIBERO_PANDA_JOINTS_FINGERS):
        environment = make(card)
        assert environment.robot is card
        seen[card.name] = environment.reset(0, seed=0)
        environment.close()
    measured = seen["libero_panda"].low_dim
    joints, fingers = measured["robot0_joint_pos"], measured["robot0_gripper_qpos"]
    np.testing.assert_allclose(seen["libero_panda_joints"].state_S, [*joints, *gripper_opening(fingers)], rtol=1e-6)
    np.testing.assert_allclose(seen["libero_panda_joints_fingers"].state_S, [*joints, *fingers], rtol=1e-6)
    assert seen["libero_panda_joints"].state_S[7] > 0.9  # settled open
    with pytest.raises(DataError, match="does not say what its state is made of"):
        make(dataclasses.replace(LIBERO_PANDA, state_parts=()))


@pytest.mark.sim
def test_the_state_is_what_robosuite_computes():
    from robosuite.utils.transform_utils import quat2axisangle

    benchmark = load_benchmark("pocket")
    task = benchmark.suites()["pocket"][1]
    environment = benchmark.make_environment(task, benchmark.protocols("pocket")["pocket"])
    random = np.random.default_rng(0)
    seen = environment.reset(0, seed=0)
    for _ in range(20):
        expected = quat2axisangle(seen.low_dim["robot0_eef_quat"].copy())
        np.testing.assert_allclose(seen.state_S[3:6], expected, atol=1e-6)
        seen = environment.step(random.uniform(-1, 1, 7), render=False)
    environment.close()
