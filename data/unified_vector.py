"""RDT's unified vector of 128 (configs/state_vec.py of its repository), and how LIBERO's Panda is written into it.

A single arm takes the right half; units are SI; a gripper goes from 0 (closed) to 1 (open). RDT's authors left LIBERO open, and
others filled it in differently:

    libero_osc        state: seven joints and both fingers; actions: the controller's own numbers, -1 to 1, in the velocities'
                      places, and the gripper's command. Libero_RDT reports 76 to 94 % by suite with it after full fine-tuning.
    libero_joints     the same actions; state by RDT's own rule: seven joints, and the gripper's opening in its place.
    libero_physical   state: the end effector; actions: metres and rotations that the controller is asked for, in the places
                      of positions. Every number means what RDT was pretrained on; the one attempt known to us reports 0 of 10.
"""

from dataclasses import dataclass

from .named import named
from .robots.libero_panda import LIBERO_PANDA, LIBERO_PANDA_JOINTS, LIBERO_PANDA_JOINTS_FINGERS
from .vector_layout import VectorLayout

WIDTH = 128
ARM_JOINTS = (0, 1, 2, 3, 4, 5, 6)
GRIPPER, SECOND_FINGER = 10, 11
EEF_POSITION = (30, 31, 32)
EEF_ROTATION_6D = (33, 34, 35, 36, 37, 38)
EEF_VELOCITY = (39, 40, 41)
EEF_ANGULAR_VELOCITY = (42, 43, 44)

_PANDAS = tuple(card.name for card in (LIBERO_PANDA, LIBERO_PANDA_JOINTS, LIBERO_PANDA_JOINTS_FINGERS))


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A robot's state and actions in one unified vector."""

    state: VectorLayout
    actions: VectorLayout


_OSC_ACTIONS = VectorLayout(
    name="libero_osc",
    width=WIDTH,
    slots=(*EEF_VELOCITY, *EEF_ANGULAR_VELOCITY, GRIPPER),
    encoding="libero_osc_action",
    robots=_PANDAS,
)

CODECS: dict[str, Codec] = {
    "libero_osc": Codec(
        state=VectorLayout(
            name="libero_osc",
            width=WIDTH,
            slots=(*ARM_JOINTS, GRIPPER, SECOND_FINGER),
            encoding="libero_osc_state",
            robots=(LIBERO_PANDA_JOINTS_FINGERS.name,),
        ),
        actions=_OSC_ACTIONS,
    ),
    "libero_joints": Codec(
        state=VectorLayout(
            name="libero_joints", width=WIDTH, slots=(*ARM_JOINTS, GRIPPER), robots=(LIBERO_PANDA_JOINTS.name,)
        ),
        actions=_OSC_ACTIONS,
    ),
    "libero_physical": Codec(
        state=VectorLayout(
            name="libero_physical",
            width=WIDTH,
            slots=(*EEF_POSITION, *EEF_ROTATION_6D, GRIPPER),
            encoding="libero_physical_state",
            robots=(LIBERO_PANDA.name,),
        ),
        actions=VectorLayout(
            name="libero_physical",
            width=WIDTH,
            slots=(*EEF_POSITION, *EEF_ROTATION_6D, GRIPPER),
            encoding="libero_physical_action",
            robots=_PANDAS,
        ),
    ),
}
"""By name; a checkpoint keeps both layouts whole."""


def codec_named(name: str) -> Codec:
    """Raises ValueError with the nearest name and all that there are."""
    return named("codec", name, CODECS)
