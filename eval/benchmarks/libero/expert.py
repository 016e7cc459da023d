"""A scripted pick-and-place for LIBERO's tasks, from true poses: reach, close, lift, carry, lower, let go."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from ..benchmark import NoExpert, SimObservation, Task
from .grasps import PLACES, SHAPES, Place, Shape

SUITES = ("libero_spatial", "libero_object", "libero_goal")
"""Where the expert's successes were counted: tests/bench/libero_expert.py."""

METRES_PER_ACTION = 0.05
"""OSC_POSE: an action of 1 asks for this."""
RADIANS_PER_ACTION = 0.5
GAIN = 2.5
TURN_GAIN = 0.5
AT_M = 0.012
"""Fingers start to close when the grip site is this near to where it should be, sideways and in height,"""
OPEN_M = 0.07
"""(once they are nearer to each other than this they go on closing, even where they move the thing a little),"""
TURNED_RAD = 0.15
"""and the hand is turned as it should be, but for this."""
REACH_M = 0.025
"""A thing whose grip point is this near to the grip site, each way, is between the fingers,"""
PLAY_M = 0.012
"""and held when they are no further apart than its width and this (it may turn a little)"""
STILL_M_S = 0.02
"""and have stopped closing."""
EMPTY_M = 0.0035
"""Fingers this near to each other hold nothing: they open fully before they try again,"""
MISSED_M = 0.03
"""this far above the thing."""
FUNNEL_M = 0.10
"""The further off to the side, the higher above the thing the hand travels, up to this."""
LIFT_M = 0.09
"""A thing is lifted this far from where it stood before it travels."""
CENTRED_M = 0.018
"""It is let go this near to its target's middle."""
SIDE = np.array([0.0, 1.0, 0.0])
"""Where a bowl's rim is taken: on the side away from the cabinets and from most of what bowls stand beside."""
BELOW_M = 0.008
"""It is moved towards a point this far beyond where it should come, or it would never quite get there: joints have friction."""
AWAY_M = 0.1
"""How far at a time the hand rises from a thing it has let go."""
DRAWER_M = 0.014
"""In a drawer fingers open this much further from its wall; closing, they move the bowl."""
DRAWER_LIFT_M = 0.03
"""Until it is lifted this far, a thing may still be under the top of the cabinet whose drawer it is in:"""
CABINET_M = 0.14
"""a bowl's middle nearer to the cabinet's than this."""
POINTING_DOWN = Rotation.from_quat([1.0, 0.0, 0.0, 0.0])
"""A hand that points straight down, its fingers along the world's y."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a BDDL file asks for, where that is one thing on or in another."""

    thing: str
    target: str
    drawer: str
    """The drawer that the thing starts in, a region of a cabinet; empty where it starts in none."""


def make_expert(task: Task) -> "PickAndPlace":
    """Raises `NoExpert` where the task asks for anything but picking one thing up and putting it down."""
    goal = read_goal(Path(task.bddl_file).read_text())
    if task.suite not in SUITES or goal is None or (shape_and_place := _shape_and_place(goal)) is None:
        raise NoExpert(
            f"LIBERO's scripted expert knows all tasks of libero_spatial and libero_object, and 1, 2, 4, 6, 8 and 9 of "
            f"libero_goal; it does not know how to {task.name!r}"
        )
    return PickAndPlace(goal, *shape_and_place)


def read_goal(bddl: str) -> Goal | None:
    """Of a BDDL file's text; None where the goal is not a single On or In."""
    goal = re.search(r"\(:goal\s*\(And\s*\((?:On|In) (\w+) (\w+)\)\s*\)\s*\)", bddl)
    if goal is None:
        return None
    drawer = re.search(rf"\(In {goal[1]} (\w+)\)", bddl[bddl.index("(:init") : goal.start()])
    return Goal(thing=goal[1], target=goal[2], drawer=drawer[1] if drawer else "")


def _shape_and_place(goal: Goal) -> tuple[Shape, Place] | None:
    thing, target = (re.sub(r"_\d+(?=_|$)", "", name) for name in (goal.thing, goal.target))
    return (SHAPES[thing], PLACES[target]) if thing in SHAPES and target in PLACES else None


class PickAndPlace:
    """A function of what is seen, and of little else: which side of a bowl was chosen in the beginning, whether the fingers
    have just closed on nothing, and how high the thing stood when it was last taken hold of."""

    def __init__(self, goal: Goal, shape: Shape, place: Place) -> None:
        self._goal = goal
        self._shape = shape
        self._place = place
        self.reset(seed=0)

    def reset(self, seed: int) -> None:
        self._side: np.ndarray | None = None
        self._missed = False
        self._stood_z: float | None = None

    def act(self, observation: SimObservation) -> np.ndarray:
        seen, shape, place = observation.low_dim, self._shape, self._place
        thing, target = seen[f"{self._goal.thing}_pos"], seen[f"{self._goal.target}_pos"]
        hand = Rotation.from_quat(seen["robot0_eef_quat"])
        width_m = seen["robot0_gripper_qpos"][0] - seen["robot0_gripper_qpos"][1]
        bottom_z = thing[2] + shape.bottom_m
        drop_z = target[2] + place.rest_m + place.drop_m + (shape.bottom_m if place.inside else 0.0)
        point, across = self._grip(seen)
        to_point = point - seen["robot0_eef_pos"]
        slack_m = AT_M if width_m > OPEN_M else REACH_M
        there = bool(np.linalg.norm(to_point[:2]) < slack_m and abs(to_point[2]) < slack_m)
        self._missed = bool(width_m < EMPTY_M or (width_m < OPEN_M and (self._missed or not there)))

        turn, grip = _to_upright(hand), -1.0
        if np.linalg.norm((target - thing)[:2]) < CENTRED_M and bottom_z < drop_z:
            free = width_m > shape.width_m + PLAY_M
            move = np.array([0.0, 0.0, AWAY_M if free else 0.0])
        elif width_m < shape.width_m + PLAY_M and not self._missed:
            still = np.abs(seen["robot0_gripper_qvel"]).max() < STILL_M_S
            move = self._carry(seen, bottom_z, drop_z) if still else np.zeros(3)
            grip = 1.0
        else:
            self._stood_z = None
            turn = _to_across(hand, across)
            off_m = float(np.linalg.norm(to_point[:2]))
            above_m = MISSED_M if self._missed else FUNNEL_M * np.clip((off_m - AT_M) / 0.05, 0.0, 1.0)
            move = to_point + [0.0, 0.0, above_m]
            grip = 1.0 if there and not self._missed and np.linalg.norm(turn) < TURNED_RAD else -1.0
        return np.concatenate(
            [_within(GAIN * move / METRES_PER_ACTION), _within(TURN_GAIN * turn / RADIANS_PER_ACTION), [grip]]
        )

    def _carry(self, seen: Mapping[str, np.ndarray], bottom_z: float, drop_z: float) -> np.ndarray:
        """Which way a thing goes that is held: up, over to its target, down."""
        target = seen[f"{self._goal.target}_pos"]
        to_target = (target - seen[f"{self._goal.thing}_pos"])[:2]
        if self._stood_z is None:
            self._stood_z = bottom_z
        if self._goal.drawer and bottom_z - self._stood_z < DRAWER_LIFT_M:
            out, out_m = self._way_out(seen)
            if out_m > 0.0:
                return np.array([*out * (out_m + BELOW_M), 0.0])
        travel_z = max(self._stood_z + LIFT_M, target[2] + self._place.travel_m)
        far = np.clip((np.linalg.norm(to_target) - CENTRED_M) / 0.03, 0.0, 1.0)
        wanted_z = drop_z - BELOW_M + (travel_z - drop_z) * far
        # Up first: it moves sideways only as far as it has risen, so that it leaves a drawer without touching it.
        sideways = np.clip((bottom_z - travel_z + 0.06) / 0.04, 0.0, 1.0) if far == 1.0 else 1.0
        return np.array([*(to_target * sideways), wanted_z - bottom_z])

    def _grip(self, seen: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Where the grip site goes and along which direction the fingers close, in the world."""
        shape, thing = self._shape, seen[f"{self._goal.thing}_pos"]
        turned = Rotation.from_quat(seen[f"{self._goal.thing}_quat"])
        up = turned.apply(shape.up)
        if not shape.rim_radius_m:
            return thing + shape.grip_m * up, turned.apply(shape.across)
        if self._side is None:
            self._side = self._choose_side(seen)
        side = self._side - up * (self._side @ up)  # along the rim's plane: a bowl may lie askew
        side /= np.linalg.norm(side)
        radius_m = shape.rim_radius_m - (DRAWER_M if self._goal.drawer else 0.0)
        return thing + shape.grip_m * up + radius_m * side, side

    def _choose_side(self, seen: Mapping[str, np.ndarray]) -> np.ndarray:
        """The horizontal direction from a bowl's middle to where its rim is taken."""
        if not self._goal.drawer:
            return SIDE
        # Beside the way the drawer goes, and where there is more room: before and behind the bowl there is none.
        out = self._way_out(seen)[0]
        side = np.array([out[1], -out[0], 0.0])
        off = seen[f"{self._goal.thing}_pos"] - seen[f"{self._goal.drawer}_pos"]
        return side if side @ off < 0.0 else -side

    def _way_out(self, seen: Mapping[str, np.ndarray]) -> tuple[np.ndarray, float]:
        """Which way (x, y) the drawer opens, and how far the thing has to go that way until nothing is above it."""
        cabinet = seen[re.sub(r"(_\d+)_.*", r"\1_pos", self._goal.drawer)]
        out = (seen[f"{self._goal.drawer}_pos"] - cabinet)[:2]
        out /= np.linalg.norm(out)
        return out, CABINET_M - float(out @ (seen[f"{self._goal.thing}_pos"] - cabinet)[:2])


def _within(command: np.ndarray) -> np.ndarray:
    """Scaled down, not bent, to plus or minus 1."""
    return command / max(1.0, float(np.abs(command).max()))


def _to_upright(hand: Rotation) -> np.ndarray:
    """Axis-angle (world) that turns the hand to point straight down, by the shortest way."""
    pointing = hand.apply([0.0, 0.0, 1.0])
    axis = np.cross(pointing, [0.0, 0.0, -1.0])
    sine = float(np.linalg.norm(axis))
    return axis * (np.arctan2(sine, -pointing[2]) / sine if sine > 1e-9 else 0.0)


def _to_across(hand: Rotation, across: np.ndarray) -> np.ndarray:
    """Axis-angle (world) to a hand that points down with its fingers along `across`, whichever finger is on which side."""
    yaw = np.arctan2(-across[0], across[1])
    turns = [(Rotation.from_euler("z", yaw + half) * POINTING_DOWN * hand.inv()).as_rotvec() for half in (0.0, np.pi)]
    return min(turns, key=lambda turn: float(np.linalg.norm(turn)))
