"""Robot cards, one file a robot. Adding one is a file here and a line below."""

from ..named import named
from .card import RobotCard
from .libero_panda import LIBERO_PANDA, LIBERO_PANDA_JOINTS, LIBERO_PANDA_JOINTS_FINGERS

ROBOTS: dict[str, RobotCard] = {
    card.name: card
    for card in (
        LIBERO_PANDA,
        LIBERO_PANDA_JOINTS,
        LIBERO_PANDA_JOINTS_FINGERS,
    )
}


def robot_named(name: str) -> RobotCard:
    """Raises ValueError with the nearest name and all that there are."""
    return named("robot", name, ROBOTS)
