"""State and actions of a LeRobot dataset, as a robot card has them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from ..episodes import DataError
from ..robots.card import RobotCard
from ..robots.state import assemble_state
from .lerobot_metadata import DatasetInfo

STATE_COLUMNS = ("observation.state", "state")
ACTION_COLUMNS = ("action", "actions")
STATE_PARTS = {"eef_position": 3, "eef_axis_angle": 3, "gripper_joints": 2}
"""What the state of LIBERO's published datasets is, in this order, and how many numbers each part has."""
JOINT_COLUMN, NUM_JOINTS = "observation.states.joint_state", 7
"""any4lerobot's conversions have the joints too."""


@dataclass(frozen=True, kw_only=True)
class VectorColumns:
    """Which columns a robot's state and actions are made of."""

    robot: RobotCard
    state: str
    actions: str
    joints: str | None
    """Where the dataset has them and the card is made of parts."""

    @classmethod
    def of(cls, info: DatasetInfo, robot: RobotCard) -> Self:
        """Raises `DataError` where a column is missing, is not as wide as the card says, or is not what the card is made of.

        A card that names its `state_parts` is one of LIBERO's: the state is taken for `STATE_PARTS`, since another card may
        have as many numbers of another meaning. One that names none takes the state whole."""
        width = sum(STATE_PARTS.values()) if robot.state_parts else len(robot.state_names)
        columns = cls(
            robot=robot,
            state=_column(info, STATE_COLUMNS, width, robot),
            actions=_column(info, ACTION_COLUMNS, len(robot.action_names), robot),
            joints=JOINT_COLUMN if robot.state_parts and info.vectors.get(JOINT_COLUMN) == NUM_JOINTS else None,
        )
        if robot.state_parts:
            joints = {} if columns.joints is None else {"joint_positions": np.zeros(NUM_JOINTS)}
            assemble_state(robot, {**{part: np.zeros(size) for part, size in STATE_PARTS.items()}, **joints})
        return columns

    @property
    def names(self) -> list[str]:
        """The columns to read."""
        return [self.state, self.actions, *([] if self.joints is None else [self.joints])]

    def state_of(self, rows: Any, where: str) -> np.ndarray:
        """(N, S) float32 from a pyarrow table of N rows; `DataError` if of another shape, or not finite."""
        if not self.robot.state_parts:
            return _numbers(rows, self.state, len(self.robot.state_names), where)
        whole = _numbers(rows, self.state, sum(STATE_PARTS.values()), where)
        ends = np.cumsum(list(STATE_PARTS.values()))[:-1]
        parts = dict(zip(STATE_PARTS, np.split(whole, ends, axis=1), strict=True))
        if self.joints is not None:
            parts["joint_positions"] = _numbers(rows, self.joints, NUM_JOINTS, where)
        return assemble_state(self.robot, parts)

    def actions_of(self, rows: Any, where: str) -> np.ndarray:
        """(N, A) float32; `DataError` also where the gripper is not the card's."""
        actions_NA = _numbers(rows, self.actions, len(self.robot.action_names), where)
        gripper_N = actions_NA[:, self.robot.gripper_action]
        opens, closes = self.robot.gripper_open, self.robot.gripper_closed
        if opens * closes < 0 and gripper_N.min() >= 0 and gripper_N.min() <= 0.5:
            raise DataError(
                f"{where} has gripper actions from {gripper_N.min():g} to {gripper_N.max():g}; robot {self.robot.name} opens at {opens:g} "
                f"and closes at {closes:g}: take a conversion that left the actions as they were, such as lerobot/libero"
            )
        return actions_NA


def _column(info: DatasetInfo, names: Sequence[str], width: int, robot: RobotCard) -> str:
    """The one of `names` that the dataset has, with `width` numbers a frame."""
    found = next((name for name in names if name in info.vectors), None)
    if found is None:
        raise DataError(
            f"{info.folder} has neither {' nor '.join(f'`{name}`' for name in names)}, which robot {robot.name} needs; its columns of "
            f"numbers: {', '.join(info.vectors)}"
        )
    if info.vectors[found] != width:
        raise DataError(
            f"{info.folder} has {info.vectors[found]} numbers in `{found}` and robot {robot.name} needs {width}; choose the robot card that "
            "it was recorded with (--robot), or write one in data/robots/"
        )
    return found


def _numbers(rows: Any, column: str, width: int, where: str) -> np.ndarray:
    """(N, width) float32; `DataError` if of another shape, or not finite."""
    import pyarrow
    from pyarrow import compute, types

    values = rows[column]
    if types.is_list(values.type) or types.is_large_list(values.type) or types.is_fixed_size_list(values.type):
        lengths = compute.unique(compute.list_value_length(values)).to_pylist()  # [None, ...] where a frame has none
        values = compute.list_flatten(values) if lengths == [width] else None
    elif width > 1:  # one number a frame is stored without a list
        values = None
    if values is None or not (types.is_floating(values.type) or types.is_integer(values.type)):
        raise DataError(
            f"{where} has something else ({rows[column].type}) than {width} numbers in each frame's `{column}`; get the dataset again"
        )
    numbers = values.cast(pyarrow.float32(), safe=False).to_numpy().reshape(-1, width)
    bad_N = ~np.isfinite(numbers).all(axis=1)  # an absent number is NaN here
    if bad_N.any():
        raise DataError(
            f"{where} has NaN or infinity in `{column}`, first in frame {int(bad_N.argmax())}; record it again or remove the episode"
        )
    return np.array(numbers)
