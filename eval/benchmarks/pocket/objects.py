"""Pocket's objects: cubes, and two flat targets that stand still. Registered with LIBERO by their category names."""

from pathlib import Path

from ..libero_library import libero_envs  # noqa: F401  (first: robosuite must not be imported before it)

# isort: split
from libero.libero.envs.base_object import register_object
from robosuite.models.objects import BoxObject, MujocoXMLObject

CUBE_SIDE_M = 0.04
ASSETS = Path(__file__).parent / "assets"


class Cube(BoxObject):
    """A free cube that rubber fingers hold firmly; 32 g."""

    category: str
    colour: tuple[float, float, float, float]

    def __init__(self, name: str) -> None:
        super().__init__(
            name=name,
            size=[CUBE_SIDE_M / 2] * 3,
            density=500,
            friction=(1.5, 0.02, 0.0005),
            rgba=self.colour,
            joints=[{"type": "free", "damping": "0.0005"}],
        )
        self.category_name = self.category
        self.rotation = (0.0, 0.0)
        self.rotation_axis = "z"
        self.object_properties: dict[str, dict] = {"vis_site_names": {}}


@register_object
class RedCube(Cube):
    category = "red_cube"
    colour = (0.9, 0.03, 0.03, 1.0)


@register_object
class BlueCube(Cube):
    category = "blue_cube"
    colour = (0.03, 0.12, 0.95, 1.0)


@register_object
class PurpleCube(Cube):
    category = "purple_cube"
    colour = (0.62, 0.05, 0.75, 1.0)


class Target(MujocoXMLObject):
    """A flat thing bolted to the table, with a site over its top that LIBERO's `On` reads."""

    category: str

    def __init__(self, name: str, joints: None = None) -> None:
        super().__init__(
            str(ASSETS / f"{self.category}.xml"),
            name=name,
            joints=joints,
            obj_type="all",
            duplicate_collision_geoms=False,
        )
        self.category_name = self.category
        self.rotation = (0.0, 0.0)
        self.rotation_axis = "z"
        self.object_properties: dict[str, dict] = {"vis_site_names": {}}


@register_object
class YellowPlate(Target):
    category = "yellow_plate"


@register_object
class GreenTray(Target):
    category = "green_tray"
