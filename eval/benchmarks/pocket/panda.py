"""LIBERO's mounted Panda with the same physics and a fraction of its triangles.

robosuite's Panda is drawn with 190 thousand triangles, which a CPU renderer pays for at every picture. Here what is
drawn are copies of the meshes that collide (about 3 thousand triangles); bodies, joints, inertias, colliding geoms and
actuators stay as they are.
"""

import copy
import xml.etree.ElementTree as ET

from ..libero_library import libero_envs  # noqa: F401  (first: robosuite must not be imported before it)

# isort: split
from libero.libero.envs.robots import MountedPanda
from robosuite.models.grippers import GRIPPER_MAPPING, PandaGripper
from robosuite.models.mounts import MOUNT_MAPPING, RethinkMount
from robosuite.robots import ROBOT_CLASS_MAPPING, SingleArm

SHELL_RGBA = "0.86 0.87 0.89 1"
DARK_RGBA = "0.30 0.31 0.33 1"
DARK = ("hand_collision", "link5_collision", "link7_collision")
FINGER_RGBA = "0.16 0.17 0.18 1"


class LightLooks:
    """Mixed into a robosuite model: draw what collides, nothing else. `resolve_asset_dependency` is robosuite's first
    call after it has read the model's file, and before it takes down the names of geoms."""

    tree: ET.ElementTree
    asset: ET.Element
    worldbody: ET.Element

    def resolve_asset_dependency(self) -> None:
        for parent in list(self.worldbody.iter("body")):
            for geom in parent.findall("geom"):
                if geom.get("group") == "1":
                    parent.remove(geom)
                elif self.is_drawn(geom):
                    parent.append(self.drawn(geom))
        meshes_used = {geom.get("mesh") for geom in self.worldbody.iter("geom")}
        materials_used = {geom.get("material") for geom in self.worldbody.iter("geom")}
        for tag, used in (("mesh", meshes_used), ("material", materials_used)):
            for element in self.asset.findall(tag):
                if element.get("name") not in used:
                    self.asset.remove(element)
        super().resolve_asset_dependency()  # type: ignore[misc]

    def is_drawn(self, geom: ET.Element) -> bool:
        return geom.get("type") in ("mesh", "box", "cylinder")

    def drawn(self, geom: ET.Element) -> ET.Element:
        """A copy of a colliding geom that is seen and touches nothing."""
        seen = copy.deepcopy(geom)
        name = geom.get("name", "")
        for physical in ("solref", "solimp", "friction", "condim", "margin", "mass", "density"):
            seen.attrib.pop(physical, None)
        seen.set("name", name.replace("_collision", "").replace("_col", "") + "_light")
        seen.set("group", "1")
        seen.set("contype", "0")
        seen.set("conaffinity", "0")
        seen.set("rgba", DARK_RGBA if name in DARK else FINGER_RGBA if name.startswith("finger") else SHELL_RGBA)
        if (
            seen.get("mesh") == "link1"
        ):  # robosuite never simplified this one (12 thousand triangles); link 2 has its shape
            seen.set("mesh", "link2")
            seen.set("quat", "0.707107 0.707107 0 0")
        return seen


class MountedPocketPanda(LightLooks, MountedPanda):
    """`Pocket_Tabletop` asks for "PocketPanda"; LIBERO's tabletop prepends "Mounted"."""

    @property
    def default_mount(self) -> str:
        return "PocketMount"

    @property
    def default_gripper(self) -> str:
        return "PocketPandaGripper"


class PocketMount(LightLooks, RethinkMount):
    """The pedestal as a plain column."""

    def is_drawn(self, geom: ET.Element) -> bool:
        return geom.get("name") == "pedestal_col"

    def drawn(self, geom: ET.Element) -> ET.Element:
        seen = super().drawn(geom)
        seen.set("type", "box")
        seen.set("size", "0.11 0.11 0.31")
        seen.set("rgba", DARK_RGBA)
        return seen


class PocketPandaGripper(LightLooks, PandaGripper):
    """The Panda's two fingers; the pads are part of the finger meshes."""

    def is_drawn(self, geom: ET.Element) -> bool:
        return geom.get("type") == "mesh"


ROBOT_CLASS_MAPPING["MountedPocketPanda"] = SingleArm
GRIPPER_MAPPING["PocketPandaGripper"] = PocketPandaGripper
MOUNT_MAPPING["PocketMount"] = PocketMount
