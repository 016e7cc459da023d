"""A robot's numbers in a wider vector, and back."""

import numpy as np
import pytest
import torch

from vlatune.data.robots import LIBERO_PANDA, LIBERO_PANDA_JOINTS, LIBERO_PANDA_JOINTS_FINGERS, ROBOTS, robot_named
from vlatune.data.rotations import axis_angle_to_matrix, matrix_to_6d
from vlatune.data.unified_vector import CODECS, codec_named
from vlatune.data.vector_encodings import axis_angle_from_6d, axis_angle_to_6d
from vlatune.data.vector_layout import LaidOut, VectorLayout

LEGAL_ACTIONS = torch.rand(5000, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
LEGAL_ACTIONS[:, 6] = LEGAL_ACTIONS[:, 6].sign()
LEGAL_ACTIONS[:7] = torch.eye(7)  # no rotation, and one about each axis
LEGAL_ACTIONS[:7, 6] = 1.0
LEGAL_ACTIONS[7] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0])  # the longest rotation
LEGAL_ACTIONS[8:1000, 3:6] *= 1e-3


def test_there_and_back():
    laid_out = LaidOut(VectorLayout(name="rdt", width=12, slots=(7, 2, 9)), 3)
    x = torch.randn(2, 5, 3)
    wide = laid_out(x)
    assert wide.shape == (2, 5, 12)
    assert torch.equal(wide[..., [7, 2, 9]], x)
    assert wide.abs().sum() == pytest.approx(x.abs().sum().item(), rel=1e-6)
    assert torch.equal(laid_out.inverse(wide), x)
    assert laid_out.mask_W.nonzero().flatten().tolist() == [2, 7, 9]
    assert laid_out.slots_with(2).tolist() == [9]


def test_first_in_order_without_slots_and_the_same_without_a_layout():
    x = torch.randn(4, 7)
    padded = LaidOut(VectorLayout(name="padded", width=32), 7)(x)
    assert torch.equal(padded[:, :7], x)
    assert not padded[:, 7:].any()
    assert torch.equal(LaidOut(None, 7)(x), x)


def test_a_robot_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"'rdt' places 2 dimensions, the robot has 3"):
        LaidOut(VectorLayout(name="rdt", width=12, slots=(7, 2)), 3)
    with pytest.raises(ValueError, match=r"'padded' places 32 dimensions, the robot has 33"):
        LaidOut(VectorLayout(name="padded", width=32), 33)
    with pytest.raises(ValueError, match=r"'libero_physical' places 8 dimensions, the robot has 9"):
        LaidOut(CODECS["libero_physical"].state, 9)
    with pytest.raises(ValueError, match="must be distinct and within 0 to 11"):
        VectorLayout(name="rdt", width=12, slots=(7, 12))


def test_an_encoding_needs_its_name_and_its_slots():
    with pytest.raises(ValueError, match=r"no encoding 'libero_osc'; there are as_is, libero_osc_state, "):
        VectorLayout(name="mine", width=128, encoding="libero_osc")
    with pytest.raises(ValueError, match=r"'libero_physical_action' gives 10 numbers and there are 7 slots"):
        VectorLayout(name="mine", width=128, slots=tuple(range(7)), encoding="libero_physical_action")


def test_a_layout_is_for_the_robots_that_it_names():
    state = CODECS["libero_physical"].state
    state.check_robot("libero_panda")
    with pytest.raises(
        ValueError,
        match=r"for the robot card libero_panda, and the data are of 'libero_panda_joints': .* --robot libero_panda",
    ):
        state.check_robot("libero_panda_joints")  # of eight numbers too
    VectorLayout(name="padded", width=32).check_robot("anybody's")


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_fits_its_robot_and_marks_its_slots(name):
    codec = codec_named(name)
    robot = robot_named(codec.state.robots[0])
    assert robot.name in codec.actions.robots
    assert set(codec.actions.robots) <= set(ROBOTS)
    for layout, num_dims in ((codec.state, len(robot.state_names)), (codec.actions, len(robot.action_names))):
        laid_out = LaidOut(layout, num_dims)
        assert sorted(layout.slots) == laid_out.mask_W.nonzero().flatten().tolist()
        wide = laid_out(torch.rand(3, num_dims))
        assert wide.shape == (3, 128)
        assert not wide[:, ~laid_out.mask_W].any()
        used = torch.cat([laid_out.slots_with(dim) for dim in range(num_dims)])
        assert set(used.tolist()) == set(layout.slots)
    assert LaidOut(codec.actions, 7).slots_with(robot.gripper_action).tolist() == [10]


def test_an_unknown_codec_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"no codec 'libero_ocs'; did you mean 'libero_osc'\? There are: libero_osc, "):
        codec_named("libero_ocs")


def test_libero_osc_in_numbers():
    codec = CODECS["libero_osc"]
    state = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 0.05185, -0.04245])
    wide = LaidOut(codec.state, len(LIBERO_PANDA_JOINTS_FINGERS.state_names))(state)
    torch.testing.assert_close(wide[[0, 1, 2, 3, 4, 5, 6, 10, 11]], torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 1, 0]))
    actions = LaidOut(codec.actions, 7)
    wide = actions(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0]))
    torch.testing.assert_close(wide[[39, 40, 41, 42, 43, 44, 10]], torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0]))
    for said, done in ((0.3, 1.0), (-0.01, -1.0), (0.0, -1.0), (7.0, 1.0)):
        wide[10] = said
        assert actions.inverse(wide)[6] == done


def test_libero_joints_in_numbers():
    state = torch.arange(1.0, 9.0)
    wide = LaidOut(CODECS["libero_joints"].state, len(LIBERO_PANDA_JOINTS.state_names))(state)
    assert wide[[0, 1, 2, 3, 4, 5, 6, 10]].tolist() == state.tolist()


def test_libero_physical_in_numbers():
    codec = CODECS["libero_physical"]
    quarter = torch.pi / 2
    state = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.0, quarter, 0.01, -0.01])
    wide = LaidOut(codec.state, len(LIBERO_PANDA.state_names))(state)
    torch.testing.assert_close(
        wide[[*range(30, 39), 10]], torch.tensor([0.1, 0.2, 0.3, 0, 1, 0, -1, 0, 0, 0.25]), atol=1e-6, rtol=0
    )
    wide = LaidOut(codec.actions, 7)(torch.tensor([1.0, 0, -1, 0, 0, 1, 1]))
    expected = matrix_to_6d(axis_angle_to_matrix(np.array([0, 0, 0.5])))
    torch.testing.assert_close(wide[30:33], torch.tensor([0.05, 0, -0.05]))
    np.testing.assert_allclose(wide[33:39], expected, atol=1e-6)
    assert wide[10] == 0  # closed


@pytest.mark.parametrize("name", CODECS)
def test_legal_actions_return_to_a_millionth(name):
    laid_out = LaidOut(CODECS[name].actions, 7)
    assert (laid_out.inverse(laid_out(LEGAL_ACTIONS)) - LEGAL_ACTIONS).abs().max() < 1e-6


@pytest.mark.parametrize("name", CODECS)
def test_states_return(name):
    codec = CODECS[name]
    num_dims = len(robot_named(codec.state.robots[0]).state_names)
    laid_out = LaidOut(codec.state, num_dims)
    state = torch.rand(50, num_dims)
    if name == "libero_physical":
        state[:, 6] *= 0.04
        state[:, 7] = -state[:, 6]  # both fingers alike: their distance is all that is kept
    torch.testing.assert_close(laid_out.inverse(laid_out(state)), state, atol=1e-6, rtol=1e-6)


def test_six_numbers_are_the_matrix_of_rotations_py_and_return_from_it():
    axes = np.random.default_rng(0).normal(size=(200, 3))
    axes[:3] = np.eye(3)
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    for angle in (0.0, 1e-7, 1e-3, 1.0, 3.0, np.pi - 1e-4, np.pi):
        vectors = torch.tensor(axes * angle, dtype=torch.float32)
        columns = axis_angle_to_6d(vectors)
        np.testing.assert_allclose(columns, matrix_to_6d(axis_angle_to_matrix(vectors.double().numpy())), atol=1e-6)
        back = axis_angle_from_6d(columns)
        np.testing.assert_allclose(axis_angle_to_6d(back), columns, atol=3e-6)  # at pi the vector may turn round
        if angle < 3.1:
            np.testing.assert_allclose(back, vectors, atol=3e-6)


def test_what_a_policy_makes_up_is_decoded_to_finite_actions():
    laid_out = LaidOut(CODECS["libero_physical"].actions, 7)
    wild = torch.randn(1000, 128, generator=torch.Generator().manual_seed(0)) * 100
    wild[:100] = 0
    wild[100:200, 36:39] = wild[100:200, 33:36]  # parallel columns
    assert laid_out.inverse(wild).isfinite().all()
    assert not laid_out.inverse(torch.zeros(128))[:6].any()


@pytest.mark.parametrize("name", CODECS)
def test_bfloat16_is_computed_in_float32(name):
    laid_out = LaidOut(CODECS[name].actions, 7).to(torch.bfloat16)
    rounded = LEGAL_ACTIONS[:50].to(torch.bfloat16)
    assert torch.equal(laid_out(rounded), laid_out(rounded.float()))
    assert laid_out.inverse(laid_out(rounded).to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("name", CODECS)
def test_no_value_is_read_on_the_host(name):
    """On the meta device there are none."""
    with torch.device("meta"):
        laid_out = LaidOut(CODECS[name].actions, 7)
        assert laid_out.inverse(laid_out(torch.empty(2, 3, 7))).shape == (2, 3, 7)
