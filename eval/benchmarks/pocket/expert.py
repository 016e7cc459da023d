"""A scripted pick-and-place from true poses: proportional, without memory, so that what it does shows in what is seen."""

import numpy as np

from ..benchmark import SimObservation

METRES_PER_ACTION = 0.05
"""OSC_POSE: an action of 1 asks for this."""
RADIANS_PER_ACTION = 0.5
GAIN = 1.3
TURN_GAIN = 0.5
HELD_WIDTH_M = 0.046
"""Fingers nearer to each other than this, the cube between them, hold it."""
REACH_M = 0.028
"""The cube's centre within this of the grip site is between the fingers."""
CLOSE_M = 0.028
"""Fingers start to close this far above the cube's centre: they need five steps to get there, and so lose none."""
TRAVEL_M = 0.085
"""The cube's centre travels this far above the table, clear of the other cube."""
RELEASE_M = 0.055
"""It is let go where its centre is lower than this (it rests at 0.03 on the target)"""
CENTRED_M = 0.03
"""and this near to the target's middle."""
PLACE_M = 0.042
"""Where it is lowered to, meanwhile."""


class PickAndPlace:
    """A function of the observation alone: reach, close, carry, let go."""

    def __init__(self, *, cube: str, target: str) -> None:
        self.cube = cube
        self.target = target

    def reset(self, seed: int) -> None:
        """Nothing to forget."""

    def act(self, observation: SimObservation) -> np.ndarray:
        seen = observation.low_dim
        eef, cube, target = seen["robot0_eef_pos"], seen[f"{self.cube}_pos"], seen[f"{self.target}_pos"]
        width_m = seen["robot0_gripper_qpos"][0] - seen["robot0_gripper_qpos"][1]
        to_cube, to_target = cube - eef, target - cube
        off_cube_m, off_target_m = np.linalg.norm(to_cube[:2]), np.linalg.norm(to_target[:2])
        height_m = cube[2] - target[2]
        if off_target_m < CENTRED_M and height_m < RELEASE_M:
            move, grip = np.array([*to_target[:2], PLACE_M - height_m]), -1.0
        elif width_m < HELD_WIDTH_M and np.linalg.norm(to_cube) < REACH_M:
            wanted = PLACE_M + (TRAVEL_M - PLACE_M) * np.clip((off_target_m - 0.02) / 0.06, 0.0, 1.0)
            # Up first: until it is clear of everything, the cube moves sideways only as far as it has risen.
            sideways = 1.0 if off_target_m < 0.05 else np.clip((height_m - 0.03) / 0.04, 0.0, 1.0)
            move, grip = np.array([*(to_target[:2] * sideways), wanted - height_m]), 1.0
        else:
            # A funnel: the further off to the side, the higher above the cube.
            above = 0.10 * np.clip((off_cube_m - 0.012) / 0.05, 0.0, 1.0)
            move = to_cube + [0.0, 0.0, above]
            grip = 1.0 if off_cube_m < 0.012 and abs(to_cube[2]) < CLOSE_M else -1.0
        turn = _turn(seen["robot0_eef_quat"])
        return np.concatenate(
            [_within(GAIN * move / METRES_PER_ACTION), _within(TURN_GAIN * turn / RADIANS_PER_ACTION), [grip]]
        )


def _within(command: np.ndarray) -> np.ndarray:
    """Scaled down, not bent, to plus or minus 1."""
    return command / max(1.0, float(np.abs(command).max()))


def _turn(quat_xyzw: np.ndarray) -> np.ndarray:
    """Axis-angle (world axes) from this orientation to straight down, fingers along y: the quaternion i."""
    x, y, z, w = quat_xyzw
    # i * conj(quat)
    turn = np.array([w, z, -y, x])  # xyz, then the scalar part
    turn = turn * np.sign(turn[3] or 1.0)
    length = float(np.linalg.norm(turn[:3]))
    return turn[:3] * (2 * np.arctan2(length, turn[3]) / length if length > 1e-9 else 2.0)
