"""A robot card: what each number of a robot's state and action means.

**Adding a robot** is a file beside this one with a `RobotCard` in it (`libero_panda.py` has three), and a line in `ROBOTS` in
`__init__.py`. From then on `vlatune prepare --robot NAME` and a simulator that can show the robot know it. A card that only one script
uses, with demonstrations that hand over the state whole, needs neither: it is stored in the cache.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RobotCard:
    """One robot, as one policy sees it; stored in every cache. A checkpoint keeps its name."""

    name: str
    state_names: tuple[str, ...]
    """One for each number of the state, with its unit."""
    state_parts: tuple[str, ...] = ()
    """What the state is put together from, in this order: names of what demonstrations and simulators measure (`state.py`).
    Empty where a source of demonstrations hands over the state whole."""
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

    def __post_init__(self) -> None:
        num_actions = len(self.action_names)
        if len(self.still_action) != num_actions:
            raise ValueError(
                f"robot {self.name!r} has {num_actions} action_names and {len(self.still_action)} numbers in still_action; give as many"
            )
        if not 0 <= self.gripper_action < num_actions:
            raise ValueError(
                f"robot {self.name!r} has gripper_action {self.gripper_action}; it is an index of action_names, 0 to {num_actions - 1}"
            )
