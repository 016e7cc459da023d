"""A robot's state, put together from the parts that its card names: the same in demonstrations and in simulators."""

from collections.abc import Callable, Collection, Mapping

import numpy as np

from ..episodes import DataError
from .card import RobotCard
from .libero_panda import gripper_opening

DERIVED: Mapping[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "gripper_opening": ("gripper_joints", gripper_opening),
}
"""Part -> the part that it is made from where it is not measured itself, and how."""


def check_parts(card: RobotCard, measured: Collection[str]) -> None:
    """Raises DataError unless the state of `card` can be put together from what is measured."""
    if not card.state_parts:
        raise DataError(
            f"robot {card.name!r} does not say what its state is made of; give its card state_parts, of {', '.join(measured)}"
        )
    for name in card.state_parts:
        if name not in measured and (name not in DERIVED or DERIVED[name][0] not in measured):
            raise DataError(
                f"the state of robot {card.name!r} has a part {name!r}, and what is measured here is {', '.join(measured) or 'nothing'}; "
                "choose another robot card, or mend this one"
            )


def assemble_state(card: RobotCard, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """(…, S) float32 in the card's order, from parts (…, n) that agree in all but the last axis.

    `parts` may have more than the card names. Raises DataError as `check_parts` does, and where the parts have more or fewer
    numbers than the card's state."""
    check_parts(card, parts)
    columns = [_part(name, parts) for name in card.state_parts]
    state = np.concatenate(columns, axis=-1).astype(np.float32)
    if state.shape[-1] != len(card.state_names):
        sizes = ", ".join(f"{name} {part.shape[-1]}" for name, part in zip(card.state_parts, columns, strict=True))
        raise DataError(
            f"robot {card.name!r} has {len(card.state_names)} state_names, and its parts have {state.shape[-1]} numbers ({sizes}); "
            "mend the card"
        )
    return state


def _part(name: str, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    if name in parts:
        return np.asarray(parts[name])
    source, derive = DERIVED[name]
    return derive(np.asarray(parts[source], np.float64))
