"""Replay's comparisons, without a simulator: a smooth motion, and files that store it rightly or wrongly."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vlatune.eval.replay_checks import LAYOUTS, Measured, check_order, fit_lag, gripper_agreement, look

NUM_ROWS = 60


def motion() -> Measured:
    """A Panda's: fingers that close half-way, a hand that points down (so that its axis angle passes pi)."""
    time_T = np.linspace(0, 3, NUM_ROWS)
    waves = np.random.default_rng(0).uniform(0.5, 1.5, (12, 1))
    swing_NT = np.sin(waves * time_T + 3 * waves)
    opening_T = 0.02 + 0.02 * np.cos(time_T)
    turn = Rotation.from_rotvec(np.stack([np.pi + 0.05 * swing_NT[0], 0.2 * swing_NT[1], 0.1 * swing_NT[2]], axis=1))
    return Measured(
        joints=swing_NT[3:10].T,
        position=np.stack([0.1 * swing_NT[10], 0.2 * swing_NT[11], 1 + 0.1 * swing_NT[0]], axis=1),
        quaternion=turn.as_quat() * np.sign(turn.as_quat()[:, :1]),
        fingers=np.stack([opening_T, -opening_T], axis=1),
    )


MEASURED = motion()


def stored(lag: float = 0.0) -> dict[str, np.ndarray]:
    """What a right file has, of the rows that `lag` leaves."""
    true = MEASURED.at(lag)
    return {name: np.concatenate([true[block] for block in blocks], axis=1) for name, blocks in LAYOUTS.items()}


@pytest.mark.parametrize("lag", [-0.96, -0.04, 0.0, 0.96])
def test_the_moment_is_found_to_a_substep(lag):
    assert fit_lag(stored(lag), MEASURED) == pytest.approx(lag)
    without_joints = {name: rows for name, rows in stored(lag).items() if name != "obs/joint_states"}
    assert fit_lag(without_joints, MEASURED) == pytest.approx(lag)


def test_no_moment_where_nothing_moves_or_nothing_fits():
    still = Measured(**{name: np.repeat(rows[:1], NUM_ROWS, 0) for name, rows in vars(MEASURED).items()})
    assert fit_lag({"obs/joint_states": still.joints}, still) is None
    assert fit_lag({"obs/joint_states": MEASURED.joints[:, ::-1] + 1}, MEASURED) is None


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_right_file_is_not_accused(name):
    noise = np.random.default_rng(1).normal(scale=2e-4, size=stored()[name].shape)
    assert check_order(name, stored()[name] + noise, MEASURED, 0.0)[1] == ""
    error, said = check_order(name, stored(0.96)[name], MEASURED, 0.96)
    assert (said, error) == ("", pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize(
    ("name", "columns", "sentence"),
    [
        (
            "robot_states",
            [2, 3, 4, 0, 1, 5, 6, 7, 8],
            "`robot_states` has the order position, fingers, quaternion, where LIBERO has fingers, position, quaternion",
        ),
        (
            "robot_states",
            [0, 1, 2, 3, 4, 8, 5, 6, 7],
            "`robot_states` has the numbers of its quaternion in the order w, x, y, z, where LIBERO has x, y, z, w",
        ),
        (
            "robot_states",
            [2, 3, 4, 8, 5, 6, 7, 0, 1],
            "LIBERO has fingers, position, quaternion and the numbers of its quaternion in the order w, x, y, z",
        ),
        ("obs/ee_states", [3, 4, 5, 0, 1, 2], "the order axis angle, position, where LIBERO has position, axis angle"),
        ("obs/ee_pos", [1, 0, 2], "its position in the order y, x, z, where LIBERO has x, y, z"),
        ("obs/ee_ori", [0, 2, 1], "its axis angle in the order x, z, y, where LIBERO has x, y, z"),
        ("obs/gripper_states", [1, 0], "its fingers in the order right, left, where LIBERO has left, right"),
        (
            "obs/joint_states",
            [1, 0, 2, 3, 4, 5, 6],
            "its joints in the order 2, 1, 3, 4, 5, 6, 7, where LIBERO has 1, 2,",
        ),
    ],
)
def test_another_order_is_named(name, columns, sentence):
    error, said = check_order(name, stored(0.96)[name][:, columns], MEASURED, 0.96)
    assert sentence in said and error > 0.2


def test_a_quaternion_has_two_signs_and_an_axis_angle_must_have_the_robots():
    turned = stored()
    turned["robot_states"][::2, 5:] *= -1
    assert check_order("robot_states", turned["robot_states"], MEASURED, 0.0)[1] == ""
    canonical = Rotation.from_rotvec(
        stored()["obs/ee_ori"]
    ).as_rotvec()  # angles up to pi, where robosuite has up to 2 pi
    said = check_order("obs/ee_ori", canonical, MEASURED, 0.0)[1]
    assert "`obs/ee_ori` has the right rotations written with the other sign of their axis in some rows" in said


def test_other_numbers_are_no_order():
    elsewhere = stored()["obs/ee_pos"] + [0.0, 0.0, 0.05]
    error, said = check_order("obs/ee_pos", elsewhere, MEASURED, 0.0)
    assert "`obs/ee_pos` is not what the simulator measures in the recorded states, in whatever order" in said
    assert error == pytest.approx(5)
    assert check_order("obs/ee_pos", stored()["obs/ee_pos"] + [0.0, 0.0, 0.005], MEASURED, 0.0)[1] == ""


def scenes() -> dict[str, np.ndarray]:
    """Two cameras' pictures, without symmetry."""
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (2, 4, 8, 8, 3)).astype(np.uint8)
    agentview, eye_in_hand = blocks.repeat(4, axis=2).repeat(4, axis=3)
    return {"agentview": agentview, "eye_in_hand": eye_in_hand}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p[:, ::-1, ::-1], "turned by 180 degrees"),
        (lambda p: p[:, ::-1], "mirrored, their rows in reverse"),
        (lambda p: p[:, :, ::-1], "mirrored, their columns in reverse"),
        (lambda p: np.rot90(p, 1, (1, 2)), "turned by 90 degrees"),
        (lambda p: p[..., ::-1], "in BGR order"),
        (lambda p: p[:, ::-1, ::-1, ::-1], "turned by 180 degrees and in BGR order"),
        (lambda p: scenes()["eye_in_hand"], "those of camera eye_in_hand"),
        (lambda p: scenes()["eye_in_hand"][:, ::-1], "those of camera eye_in_hand and mirrored, their rows in reverse"),
    ],
)
def test_what_was_done_to_pictures_is_named(change, said):
    rng = np.random.default_rng(3)
    grain = rng.integers(-3, 4, scenes()["agentview"].shape)
    changed = np.clip(change(scenes()["agentview"]) + grain, 0, 255).astype(np.uint8)
    seen = look(changed, scenes(), "agentview")
    assert seen.better == said and seen.difference > 20 and seen.better_difference < 3


def test_right_pictures_are_not_accused():
    assert look(scenes()["agentview"], scenes(), "agentview").difference == 0
    darker = (scenes()["agentview"] * 0.8).astype(np.uint8)
    seen = look(darker, scenes(), "agentview")
    assert seen.better == "" and seen.difference > 10
    grey = {
        camera: np.full_like(pictures, 90) for camera, pictures in scenes().items()
    }  # the same however it is turned
    assert look(grey["agentview"] + 20, grey, "agentview").better == ""


def test_gripper_agreement():
    opening_T = np.array([0.04] * 5 + [0.03, 0.02, 0.01, 0.0] + [0.0] * 3 + [0.02, 0.04])
    fingers = np.stack([opening_T, -opening_T], axis=1)
    asked_open_T = np.array([True] * 3 + [False] * 7 + [True] * 4)
    assert gripper_agreement(asked_open_T, fingers) == pytest.approx(1.0)
    assert gripper_agreement(~asked_open_T, fingers) == pytest.approx(-1.0)
    assert gripper_agreement(asked_open_T, fingers / 5) is None
