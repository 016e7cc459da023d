"""LIBERO's Panda: OSC_POSE deltas and a gripper; the state as openpi and OpenVLA read it."""

from .card import RobotCard

LIBERO_PANDA = RobotCard(
    name="libero_panda",
    state_names=(
        "eef_x_m",
        "eef_y_m",
        "eef_z_m",
        "eef_rx_rad",
        "eef_ry_rad",
        "eef_rz_rad",
        "finger_left_m",
        "finger_right_m",
    ),
    action_names=("dx", "dy", "dz", "drx", "dry", "drz", "gripper"),
    cameras=("agentview", "eye_in_hand"),
    control_hz=20.0,
    action_limit=1.0,
    gripper_action=6,
    gripper_open=-1.0,
    gripper_closed=1.0,
    still_action=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0),
)
