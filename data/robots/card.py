"""A robot card: what each number of a robot's state and action means."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RobotCard:
    name: str
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    cameras: tuple[str, ...]
    control_hz: float
    action_limit: float
    """Actions lie within plus or minus this."""
    gripper_action: int
    """Index of the gripper in the action."""
    gripper_open: float
    gripper_closed: float
    still_action: tuple[float, ...]
    """The action that asks for no motion, gripper open: used while a scene settles."""
