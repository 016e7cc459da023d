"""How LIBERO's things are shaped, where a hand takes hold of them, and how they are put down: the scripted expert's numbers.

Sizes are those of the collision geometry, in each thing's own frame; a test holds them against the simulator."""

from collections.abc import Mapping
from dataclasses import dataclass

Axis = tuple[int, int, int]
X, Y, Z = (1, 0, 0), (0, 1, 0), (0, 0, 1)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A movable thing, taken hold of from above."""

    up: Axis
    """The axis of its own frame that points up when it stands."""
    across: Axis
    """The axis along which fingers close on it; a bowl's rim goes all around, whichever this is."""
    bottom_m: float
    """Where it stands, along `up` from its origin."""
    grip_m: float
    """Where the grip site goes, along `up` from its origin: the palm is 45 mm above that."""
    width_m: float
    """Between the fingers there: along `across`, or the thickness of a rim."""
    rim_radius_m: float = 0.0
    """Of a bowl, which is taken by its rim; 0 for what is taken across its middle."""


BOWL = Shape(up=Z, across=Y, bottom_m=0.002, grip_m=0.036, width_m=0.008, rim_radius_m=0.049)
CAN = Shape(up=Y, across=Z, bottom_m=-0.039, grip_m=0.012, width_m=0.063)
BOTTLE = Shape(up=Y, across=X, bottom_m=-0.073, grip_m=0.035, width_m=0.055)
CARTON = Shape(up=Y, across=X, bottom_m=-0.07, grip_m=0.025, width_m=0.053)

SHAPES: Mapping[str, Shape] = {
    "akita_black_bowl": BOWL,
    "alphabet_soup": CAN,
    "tomato_sauce": CAN,
    "salad_dressing": BOTTLE,
    "ketchup": BOTTLE,
    "milk": CARTON,
    "orange_juice": CARTON,
    "bbq_sauce": Shape(up=Z, across=X, bottom_m=-0.055, grip_m=0.02, width_m=0.046),
    "cream_cheese": Shape(up=Z, across=Y, bottom_m=-0.009, grip_m=0.004, width_m=0.042),
    "butter": Shape(up=Z, across=Y, bottom_m=-0.009, grip_m=0.004, width_m=0.04),
    "chocolate_pudding": Shape(up=Z, across=Y, bottom_m=-0.013, grip_m=0.004, width_m=0.046),
    "wine_bottle": Shape(up=Z, across=Y, bottom_m=0.001, grip_m=0.12, width_m=0.03),
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """How a thing is put down at its target. Heights are from the target's position to the thing's bottom."""

    rest_m: float
    """Where it comes to rest."""
    drop_m: float = 0.012
    """It is let go this far above that, so that it is free when LIBERO calls it placed."""
    travel_m: float = 0.09
    """It comes from the side at least this high, clear of what stands around."""
    inside: bool = False
    """`rest_m` is where its origin comes to rest, not its bottom: LIBERO looks whether that is in a region."""


PLACES: Mapping[str, Place] = {
    "plate": Place(rest_m=0.006),
    "basket_contain_region": Place(rest_m=0.07, travel_m=0.095, inside=True),
    "flat_stove_cook_region": Place(rest_m=0.027),
    "wooden_cabinet_top_side": Place(rest_m=0.002),
    "akita_black_bowl": Place(rest_m=0.01),
    "wine_rack_top_region": Place(rest_m=0.0),
}
"""A fixture's region has its own position."""
