"""Pocket's problem domain: LIBERO's tabletop with our scene, a lighter robot and a nearer camera."""

from typing import Any

from ..libero_library import libero_envs
from . import objects, panda  # noqa: F401  (they register themselves)

# isort: split
from libero.libero.envs.bddl_base_domain import register_problem
from libero.libero.envs.regions import REGION_SAMPLERS, Libero100TableRegionSampler

AGENTVIEW_POS = (0.55, 0.0, 1.62)
AGENTVIEW_TARGET = (-0.045, 0.0, 0.95)
AGENTVIEW_FOVY_DEG = 38
"""Nearer than LIBERO's: the part of the table where things happen fills a picture of 64 pixels."""


def look_at(position: tuple[float, float, float], target: tuple[float, float, float]) -> list[float]:
    """Quaternion (w, x, y, z) of a MuJoCo camera at `position` that looks at `target` with z up: it looks along its -z."""
    import numpy as np
    from robosuite.utils.transform_utils import mat2quat

    backward = np.subtract(position, target)
    backward = backward / np.linalg.norm(backward)
    right = np.cross([0.0, 0.0, 1.0], backward)
    right = right / np.linalg.norm(right)
    x, y, z, w = mat2quat(np.stack([right, np.cross(backward, right), backward], axis=1))
    return [float(w), float(x), float(y), float(z)]


LiberoTabletop: Any = libero_envs.TASK_MAPPING["libero_tabletop_manipulation"]


@register_problem
class Pocket_Tabletop(LiberoTabletop):
    """BDDL files name it `Pocket_Tabletop`; LIBERO asks that the class has that name."""

    def __init__(self, bddl_file_name: str, *args: Any, **kwargs: Any) -> None:
        kwargs["robots"] = ["PocketPanda"]
        kwargs["scene_xml"] = str(objects.ASSETS / "scene.xml")
        super().__init__(bddl_file_name, *args, **kwargs)

    def _add_placement_initializer(self) -> None:
        self.z_offset = 0.0  # LIBERO sinks fixtures into the table; ours stand on it
        super()._add_placement_initializer()

    def _setup_camera(self, mujoco_arena: Any) -> None:
        super()._setup_camera(mujoco_arena)
        mujoco_arena.set_camera(
            camera_name="agentview",
            pos=list(AGENTVIEW_POS),
            quat=look_at(AGENTVIEW_POS, AGENTVIEW_TARGET),
            camera_attribs={"fovy": str(AGENTVIEW_FOVY_DEG)},
        )


REGION_SAMPLERS["pocket_tabletop"] = {"table": Libero100TableRegionSampler}
