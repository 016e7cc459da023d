"""LIBERO's Panda: OSC_POSE deltas and a gripper, and three states that policies read.

What its demonstrations and its simulator measure, by the names that cards use:

    eef_position (3)      of the gripper's site, metres
    eef_axis_angle (3)    its rotation, radians; robosuite's, so up to 2 pi long
    gripper_joints (2)    metres: left finger 0 (closed) to 0.04 (open), right finger 0 to -0.04
    joint_positions (7)   radians
    gripper_opening (1)   from gripper_joints, see `gripper_opening`
"""

from dataclasses import replace

import numpy as np

from .card import RobotCard

MEASURED = ("eef_position", "eef_axis_angle", "gripper_joints", "joint_positions")
"""What demonstrations and simulator give; the rest is derived."""

FINGER_TRAVEL_M = 0.04
"""How far either finger goes: the range of the finger joints in robosuite's panda_gripper.xml."""

_JOINTS = tuple(f"joint_{k}_rad" for k in range(1, 8))
_FINGERS = ("finger_left_m", "finger_right_m")

LIBERO_PANDA = RobotCard(
    name="libero_panda",
    state_names=("eef_x_m", "eef_y_m", "eef_z_m", "eef_rx_rad", "eef_ry_rad", "eef_rz_rad", *_FINGERS),
    state_parts=("eef_position", "eef_axis_angle", "gripper_joints"),
    action_names=("dx", "dy", "dz", "drx", "dry", "drz", "gripper"),
    cameras=("agentview", "eye_in_hand"),
    control_hz=20.0,
    action_limit=1.0,
    gripper_action=6,
    gripper_open=-1.0,
    gripper_closed=1.0,
    still_action=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0),
)
"""The state as openpi and OpenVLA read it."""

LIBERO_PANDA_JOINTS = replace(
    LIBERO_PANDA,
    name="libero_panda_joints",
    state_names=(*_JOINTS, "gripper_opening"),
    state_parts=("joint_positions", "gripper_opening"),
)
"""The state by RDT's rules: joints in radians, a gripper from 0 (closed) to 1 (open)."""

LIBERO_PANDA_JOINTS_FINGERS = replace(
    LIBERO_PANDA,
    name="libero_panda_joints_fingers",
    state_names=(*_JOINTS, *_FINGERS),
    state_parts=("joint_positions", "gripper_joints"),
)
"""The state of the RDT that was reported to work on LIBERO; its mapping scales the fingers (`vector_encodings.py`)."""


def gripper_opening(gripper_joints: np.ndarray) -> np.ndarray:
    """(…, 2) metres -> (…, 1), 0 closed to 1 open: the fingers' distance, (left - right) / (2 * 0.04 m), kept within 0 and 1
    where a contact pushes a finger beyond its range."""
    left, right = gripper_joints[..., 0:1], gripper_joints[..., 1:2]
    return np.clip((left - right) / (2 * FINGER_TRAVEL_M), 0.0, 1.0)
