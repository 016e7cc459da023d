"""Rotations in the four forms that robots' states and policies use, as robosuite 1.4 converts them; NumPy, float64.

    quaternion   (…, 4) x, y, z, w
    axis angle   (…, 3) the axis, as long as the angle in radians
    matrix       (…, 3, 3)
    6d           (…, 6) the matrix's first two columns, one after the other: RDT's

SciPy does the work where its conventions are robosuite's. They are not for quaternion -> axis angle: robosuite keeps the sign
of the quaternion, so that an angle may be up to 2 pi, and so do LIBERO's demonstrations and everyone who trained on them.
"""

import numpy as np
from scipy.spatial.transform import Rotation


def quaternion_to_axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Angles from 0 to 2 pi: q and -q, the same rotation, give two different vectors. The quaternion must have length 1."""
    quaternion = np.asarray(quaternion, np.float64)
    vector, w = quaternion[..., :3], quaternion[..., 3:]
    sine = np.linalg.norm(vector, axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, w)
    scale = np.divide(angle, sine, out=np.zeros_like(sine), where=sine > 0)  # no rotation has no axis
    return vector * scale


def axis_angle_to_quaternion(axis_angle: np.ndarray) -> np.ndarray:
    """w is negative beyond pi, so that `quaternion_to_axis_angle` returns the same vector up to 2 pi."""
    flat = Rotation.from_rotvec(_flat(axis_angle, 3)).as_quat()
    return flat.reshape(*np.shape(axis_angle)[:-1], 4)


def quaternion_to_matrix(quaternion: np.ndarray) -> np.ndarray:
    """Of any length but 0."""
    flat = Rotation.from_quat(_flat(quaternion, 4)).as_matrix()
    return flat.reshape(*np.shape(quaternion)[:-1], 3, 3)


def matrix_to_quaternion(matrix: np.ndarray) -> np.ndarray:
    """The one of both with w >= 0."""
    flat = Rotation.from_matrix(np.asarray(matrix, np.float64).reshape(-1, 3, 3)).as_quat(canonical=True)
    return flat.reshape(*np.shape(matrix)[:-2], 4)


def axis_angle_to_matrix(axis_angle: np.ndarray) -> np.ndarray:
    return quaternion_to_matrix(axis_angle_to_quaternion(axis_angle))


def matrix_to_axis_angle(matrix: np.ndarray) -> np.ndarray:
    """Angles from 0 to pi."""
    return quaternion_to_axis_angle(matrix_to_quaternion(matrix))


def matrix_to_6d(matrix: np.ndarray) -> np.ndarray:
    matrix = np.asarray(matrix, np.float64)
    return np.concatenate([matrix[..., :, 0], matrix[..., :, 1]], axis=-1)


def matrix_from_6d(columns: np.ndarray) -> np.ndarray:
    """The rotation nearest in Gram-Schmidt's sense: the first column keeps its direction (Zhou et al. 2019,
    arXiv 1812.07035). The columns must not be parallel or 0."""
    columns = np.asarray(columns, np.float64)
    first = columns[..., :3] / np.linalg.norm(columns[..., :3], axis=-1, keepdims=True)
    second = columns[..., 3:] - np.sum(first * columns[..., 3:], axis=-1, keepdims=True) * first
    second /= np.linalg.norm(second, axis=-1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], axis=-1)


def _flat(values: np.ndarray, size: int) -> np.ndarray:
    """(…, size) -> (N, size): SciPy takes no more axes."""
    return np.asarray(values, np.float64).reshape(-1, size)
