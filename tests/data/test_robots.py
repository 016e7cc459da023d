"""Robot cards: found by name, and a state put together from what is measured."""

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from vlatune.data.cache import Manifest
from vlatune.data.episodes import DataError
from vlatune.data.images import ImageRule
from vlatune.data.robots import (
    LIBERO_PANDA,
    LIBERO_PANDA_JOINTS,
    LIBERO_PANDA_JOINTS_FINGERS,
    ROBOTS,
    RobotCard,
    robot_named,
)
from vlatune.data.robots import libero_panda as panda_file
from vlatune.data.robots.libero_panda import MEASURED, gripper_opening
from vlatune.data.robots.state import assemble_state, check_parts

SIZES = {"eef_position": 3, "eef_axis_angle": 3, "gripper_joints": 2, "joint_positions": 7}


def parts(*leading: int) -> dict[str, np.ndarray]:
    """Every number differs: 100 for the first part, 200 for the second, and so on."""
    return {
        name: np.broadcast_to(100.0 * (k + 1) + np.arange(SIZES[name]), (*leading, SIZES[name])).copy()
        for k, name in enumerate(MEASURED)
    }


def test_every_card_in_the_folder_has_its_line_in_robots():
    folder = Path(panda_file.__file__).parent
    modules = [f"vlatune.data.robots.{file.stem}" for file in folder.glob("*.py") if file.stem != "__init__"]
    written = [
        value
        for name in modules
        for value in vars(importlib.import_module(name)).values()
        if isinstance(value, RobotCard)
    ]
    assert {card.name for card in written} == set(ROBOTS)
    assert all(robot_named(card.name) is card for card in written)


@pytest.mark.parametrize("name", ROBOTS)
def test_a_cards_parts_have_as_many_numbers_as_it_has_names(name):
    card = ROBOTS[name]
    check_parts(card, MEASURED)
    state = assemble_state(card, parts(4, 5))
    assert state.shape == (4, 5, len(card.state_names))
    assert state.dtype == np.float32


def test_openpis_state_is_position_rotation_fingers():
    expected = [100, 101, 102, 200, 201, 202, 300, 301]
    assert assemble_state(LIBERO_PANDA, parts()).tolist() == expected
    assert LIBERO_PANDA.state_names[6:] == ("finger_left_m", "finger_right_m")


def test_the_joints_states():
    measured = parts(2)
    measured["gripper_joints"] = np.array([[0.04, -0.04], [0.01, -0.01]])
    joints = [400, 401, 402, 403, 404, 405, 406]
    np.testing.assert_allclose(
        assemble_state(LIBERO_PANDA_JOINTS, measured), [[*joints, 1], [*joints, 0.25]], rtol=1e-6
    )
    np.testing.assert_allclose(
        assemble_state(LIBERO_PANDA_JOINTS_FINGERS, measured),
        [[*joints, 0.04, -0.04], [*joints, 0.01, -0.01]],
        rtol=1e-6,
    )


def test_the_grippers_opening_is_the_fingers_distance_within_0_and_1():
    fingers = np.array([[0.0, 0.0], [0.04, -0.04], [0.02, -0.02], [0.03, -0.01], [0.0424, -0.0421], [-0.001, 0.002]])
    np.testing.assert_allclose(gripper_opening(fingers)[:, 0], [0, 1, 0.5, 0.5, 1, 0])


def test_a_part_that_is_measured_is_not_derived():
    state = assemble_state(LIBERO_PANDA_JOINTS, {"joint_positions": np.zeros(7), "gripper_opening": np.array([0.3])})
    assert state[-1] == np.float32(0.3)


def test_a_missing_part_and_a_wrong_size_are_named():
    without = {name: part for name, part in parts().items() if name != "gripper_joints"}
    with pytest.raises(
        DataError,
        match=r"'libero_panda_joints' has a part 'gripper_opening', and what is measured here is eef_position, ",
    ):
        assemble_state(LIBERO_PANDA_JOINTS, without)
    with pytest.raises(
        DataError, match=r"8 state_names, and its parts have 7 numbers \(eef_position 3, eef_axis_angle 3, "
    ):
        assemble_state(LIBERO_PANDA, {**parts(), "gripper_joints": np.zeros(1)})
    with pytest.raises(DataError, match=r"'whole' does not say what its state is made of"):
        assemble_state(dataclasses.replace(LIBERO_PANDA, name="whole", state_parts=()), parts())


def test_names_are_found_or_the_nearest_is_said():
    assert robot_named("libero_panda_joints") is LIBERO_PANDA_JOINTS
    with pytest.raises(
        ValueError, match=r"no robot 'libero_pandas'; did you mean 'libero_panda'\? There are: libero_panda, "
    ):
        robot_named("libero_pandas")


def test_a_card_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="7 action_names and 2 numbers in still_action"):
        dataclasses.replace(LIBERO_PANDA, still_action=(0.0, 0.0))
    with pytest.raises(ValueError, match="gripper_action 7; it is an index of action_names, 0 to 6"):
        dataclasses.replace(LIBERO_PANDA, gripper_action=7)


@pytest.mark.parametrize("card", ROBOTS.values(), ids=ROBOTS)
def test_a_card_survives_a_manifest(card):
    manifest = Manifest(
        source={},
        settings={},
        robot=card,
        image_rule=ImageRule(size_px=16),
        cameras=card.cameras,
        language={},
        num_frames=0,
        num_episodes=0,
        num_validation_episodes=0,
        num_tasks=0,
        files={},
    )
    assert Manifest.from_json(json.loads(manifest.to_bytes())).robot == card
