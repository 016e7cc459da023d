"""Rotations, there and back, and as robosuite 1.4 converts them."""

import numpy as np
import pytest

from vlatune.data.rotations import (
    axis_angle_to_matrix,
    axis_angle_to_quaternion,
    matrix_from_6d,
    matrix_to_6d,
    matrix_to_axis_angle,
    matrix_to_quaternion,
    quaternion_to_axis_angle,
    quaternion_to_matrix,
)

ANGLES = np.array(
    [0.0, 1e-12, 1e-7, 1e-3, 0.5, 2.0, np.pi - 1e-3, np.pi - 1e-7, np.pi, np.pi + 1e-3, 4.0, 2 * np.pi - 1e-3]
)


def axes(count: int) -> np.ndarray:
    axes_N3 = np.random.default_rng(0).normal(size=(count, 3))
    axes_N3[:3] = np.eye(3)
    return axes_N3 / np.linalg.norm(axes_N3, axis=1, keepdims=True)


VECTORS = (axes(20)[:, None] * ANGLES[:, None]).reshape(-1, 3)
"""Every axis by every angle, up to 2 pi."""
lengths = np.linalg.norm(VECTORS, axis=1)


@pytest.fixture(scope="module")
def robosuite():
    return pytest.importorskip("robosuite.utils.transform_utils")


def one_by_one(function, values):
    return np.stack([function(value.copy()) for value in values])  # robosuite clips its argument in place


def test_quaternions_to_axis_angles_are_robosuites_sign_and_all(robosuite):
    quaternions = one_by_one(robosuite.axisangle2quat, VECTORS)
    turned = -quaternions[lengths > 1e-4]  # nearer to 2 pi robosuite's own angles are rounding errors
    for signed in (quaternions, turned):
        ours = quaternion_to_axis_angle(signed)
        np.testing.assert_allclose(ours, one_by_one(robosuite.quat2axisangle, signed), atol=1e-6)
    longest = np.linalg.norm(quaternion_to_axis_angle(turned), axis=1).max()
    assert longest == pytest.approx(2 * np.pi - 1e-3)  # not flipped into the shorter one


def test_axis_angles_to_quaternions_are_robosuites(robosuite):
    np.testing.assert_allclose(
        axis_angle_to_quaternion(VECTORS), one_by_one(robosuite.axisangle2quat, VECTORS), atol=1e-9
    )


def test_quaternions_and_matrices_are_robosuites(robosuite):
    """It rounds both to float32 on the way."""
    quaternions = axis_angle_to_quaternion(VECTORS)
    matrices = quaternion_to_matrix(quaternions)
    np.testing.assert_allclose(matrices, one_by_one(robosuite.quat2mat, quaternions), atol=1e-6)
    back = matrix_to_quaternion(matrices)
    theirs = one_by_one(robosuite.mat2quat, matrices)
    same_sign = np.sign((back * theirs).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(back, same_sign * theirs, atol=1e-6)
    assert (same_sign[np.abs(back[:, 3]) > 1e-6] == 1).all()  # at pi both signs are the same length from it


def test_axis_angles_return_up_to_two_pi():
    np.testing.assert_allclose(quaternion_to_axis_angle(axis_angle_to_quaternion(VECTORS)), VECTORS, atol=1e-9)


def test_matrices_are_rotations_and_return():
    matrices = axis_angle_to_matrix(VECTORS)
    np.testing.assert_allclose(
        matrices @ matrices.swapaxes(1, 2), np.broadcast_to(np.eye(3), matrices.shape), atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(matrices), 1, atol=1e-12)
    np.testing.assert_allclose(matrix_from_6d(matrix_to_6d(matrices)), matrices, atol=1e-12)
    np.testing.assert_allclose(quaternion_to_matrix(matrix_to_quaternion(matrices)), matrices, atol=1e-12)
    np.testing.assert_allclose(axis_angle_to_matrix(matrix_to_axis_angle(matrices)), matrices, atol=1e-12)
    short = lengths < np.pi - 1e-6
    np.testing.assert_allclose(matrix_to_axis_angle(matrices)[short], VECTORS[short], atol=1e-7)


def test_a_known_rotation():
    """A quarter turn about z takes x to y and y to -x."""
    quarter = np.array([0, 0, np.pi / 2])
    np.testing.assert_allclose(axis_angle_to_quaternion(quarter), [0, 0, np.sqrt(0.5), np.sqrt(0.5)], atol=1e-15)
    np.testing.assert_allclose(matrix_to_6d(axis_angle_to_matrix(quarter)), [0, 1, 0, -1, 0, 0], atol=1e-15)


def test_six_numbers_that_are_no_rotation_become_one():
    first, second = np.array([2.0, 0, 0]), np.array([5.0, 3, 0])
    np.testing.assert_allclose(matrix_from_6d(np.concatenate([first, second])), np.eye(3), atol=1e-15)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)])
def test_leading_axes_are_kept(leading):
    assert quaternion_to_axis_angle(np.ones((*leading, 4)) / 2).shape == (*leading, 3)
    assert axis_angle_to_quaternion(np.ones((*leading, 3))).shape == (*leading, 4)
    matrices = axis_angle_to_matrix(np.ones((*leading, 3)))
    assert matrices.shape == (*leading, 3, 3)
    assert matrix_to_6d(matrices).shape == (*leading, 6)
    assert matrix_from_6d(matrix_to_6d(matrices)).shape == (*leading, 3, 3)
    assert matrix_to_quaternion(matrices).shape == (*leading, 4)
    assert matrix_to_axis_angle(matrices).shape == (*leading, 3)
