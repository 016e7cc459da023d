"""What looks wrong in a cache. Each check says in one sentence what was seen and what to do; it decides nothing by itself."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..cache import Cache
from .dimensions import Dimension, action_dimensions, state_dimensions
from .survey import Survey, finger_dims, outside_limit, survey

LENGTH_FACTOR = 2.5
"""An episode this many times longer or shorter than its task's median stands out."""
FEWEST_TO_COMPARE = 4
"""Episodes of a task below which none stands out."""
DISOBEYED = -0.2
"""Fingers that go where they are told score about 1 (pocket's demonstrations), at random 0, and -1 with the sign turned."""


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """All that a check may look at."""

    cache: Cache
    survey: Survey
    state: Sequence[Dimension]
    actions: Sequence[Dimension]


def look(cache: Cache, num_pairs: int) -> Inspected:
    """Read the cache. Raises `DataError` as `survey` does."""
    return Inspected(
        cache=cache,
        survey=survey(cache, num_pairs),
        state=state_dimensions(cache),
        actions=action_dimensions(cache),
    )


@dataclass(frozen=True, kw_only=True)
class Concern:
    """One warning."""

    check: str
    """Its name in `CHECKS`."""
    sentence: str
    episodes: tuple[str, ...] = ()
    """The sources of the episodes that it is about; empty where it is about the whole cache."""


def concerns(inspected: Inspected) -> list[Concern]:
    """What every check found, in their order."""
    return [
        Concern(check=name, sentence=sentence, episodes=tuple(episodes))
        for name, check in CHECKS.items()
        for sentence, episodes in check(inspected)
    ]


Found = Iterator[tuple[str, Iterable[str]]]


def _outside_limit(inspected: Inspected) -> Found:
    limit, episodes = inspected.cache.robot.action_limit, inspected.survey.episodes
    outside = episodes[episodes["outside_frames"] > 0]
    if len(outside):
        names = [
            f"{dimension.name} from {dimension.edges[0]:.3g} to {dimension.edges[1]:.3g}"
            for dimension in inspected.actions
            if outside_limit(inspected.cache.robot, np.array(dimension.edges)).any()
        ]
        sentence = (
            f"{outside['outside_frames'].sum()} frames of {_count(outside)} have actions outside -{limit:g} to {limit:g} "
            f"({_some(names)}), which a controller clips: record the actions in the controller's units, or mend action_limit in "
            "the robot card"
        )
        yield sentence, outside["source"]


def _frozen_cameras(inspected: Inspected) -> Found:
    episodes = inspected.survey.episodes
    for camera in inspected.cache.manifest.cameras:
        frozen = episodes[episodes[f"frozen_{camera}"]]
        if len(frozen):
            sentence = (
                f"camera {camera} stands still in {_count(frozen)} while the state changes ({_some(frozen['source'])}): "
                "most of the sampled pictures equal the next one, so leave those episodes out, or record them again"
            )
            yield sentence, frozen["source"]


def _blank_cameras(inspected: Inspected) -> Found:
    episodes = inspected.survey.episodes
    for camera in inspected.cache.manifest.cameras:
        blank = episodes[episodes[f"blank_{camera}"] >= 0]
        if len(blank):
            first = blank.iloc[0]
            frame = first[f"blank_{camera}"] - first["start"]
            sentence = (
                f"camera {camera} shows one colour and nothing else in {_count(blank)} (first in {first['source']}, "
                f"frame {frame}): a cable, a cover or a renderer failed, so leave those episodes out, or record them again"
            )
            yield sentence, blank["source"]


def _gripper_sign(inspected: Inspected) -> Found:
    robot, episodes = inspected.cache.robot, inspected.survey.episodes
    opening = inspected.survey.opening_EK
    if opening is None:
        return
    full_travel = float(opening.max() - opening.min())
    for _, of_task in episodes.groupby(["suite", "task"]):
        task = of_task["task"].iloc[0]
        travel = of_task["finger_travel"].sum()
        obeyed = of_task["finger_obeyed"].sum()
        if travel > full_travel / 2 > 0 and obeyed < DISOBEYED * travel:
            sentence = (
                f"in task {task} the fingers close when the gripper's action asks them to open, and open when it asks them to "
                f"close (agreement {obeyed / travel:.2f}, where 1 is perfect): the robot card says {robot.gripper_open:g} opens "
                f"and {robot.gripper_closed:g} closes, so turn the sign in the demonstrations or in the card"
            )
            yield sentence, of_task["source"]


def _gripper_range(inspected: Inspected) -> Found:
    robot = inspected.cache.robot
    gripper = inspected.actions[robot.gripper_action]
    low, high = sorted((robot.gripper_open, robot.gripper_closed))
    slack = (high - low) / 4
    if not gripper.is_constant and (gripper.edges[0] > low + slack or gripper.edges[1] < high - slack):
        sentence = (
            f"the gripper's action runs from {gripper.edges[0]:.3g} to {gripper.edges[1]:.3g}, and the robot card says "
            f"{robot.gripper_open:g} opens and {robot.gripper_closed:g} closes: give the card the values that were recorded"
        )
        yield sentence, ()


def _duplicates(inspected: Inspected) -> Found:
    episodes = inspected.survey.episodes
    groups = [group for _, group in episodes.groupby("content", sort=False) if len(group) > 1]
    if groups:
        apart = sum(group["split"].nunique() > 1 for group in groups)
        leak = f"; {apart} of these stand in training and in validation, whose loss then flatters" if apart else ""
        copies = pd.concat([group.iloc[1:] for group in groups])
        examples = [f"{group['source'].iloc[0]} = {group['source'].iloc[1]}" for group in groups]
        sentence = (
            f"{_count(copies)} repeat{'s' if len(copies) == 1 else ''} another one's states and actions exactly "
            f"({_some(examples)}){leak}: delete the copies and prepare again"
        )
        yield sentence, copies["source"]


def _constant_dimensions(inspected: Inspected) -> Found:
    for kind, dimensions in (("action", inspected.actions), ("state", inspected.state)):
        constant = [f"{d.name} = {d.edges[0]:.4g}" for d in dimensions if d.is_constant]
        nearly = [
            f"{d.name} from {d.q01:.2g} to {d.q99:.2g}"
            for d in dimensions
            if d.is_nearly_constant and not d.is_constant
        ]
        if constant:
            sentence = (
                f"the {kind} is constant in {_some(constant)}: check that the recording filled it in, or leave it out"
            )
            yield sentence, ()
        if nearly:
            sentence = (
                f"98 % of all frames hardly vary in {kind} {_some(nearly)}: it is centred and not scaled, so rare larger values "
                "stay small; check its unit, or prefer mean_std normalisation"
            )
            yield sentence, ()


def _odd_lengths(inspected: Inspected) -> Found:
    episodes = inspected.survey.episodes
    of_task = episodes.groupby(["suite", "task"])["length"]
    median, count = of_task.transform("median"), of_task.transform("count")
    ratio = episodes["length"] / median
    stands_out = ((ratio > LENGTH_FACTOR) | (ratio < 1 / LENGTH_FACTOR)) & (count >= FEWEST_TO_COMPARE)
    odd = episodes.assign(median=median)[stands_out]
    if len(odd):
        examples = [f"{row.source}: {row.length} frames, median {row.median:g}" for row in odd.itertuples()]
        sentence = (
            f"{_count(odd)} {'are' if len(odd) > 1 else 'is'} more than {LENGTH_FACTOR:g} times longer or shorter than the "
            f"task's median ({_some(examples)}): look whether they were cut off or got stuck, and leave those out"
        )
        yield sentence, odd["source"]


def _shared_instructions(inspected: Inspected) -> Found:
    by_instruction = inspected.survey.episodes.groupby("instruction")["task"].unique()
    shared = by_instruction[by_instruction.map(len) > 1]
    if len(shared):
        examples = [f"{text!r} for {len(tasks)}" for text, tasks in shared.items()]
        sentence = (
            f"{len(shared)} instruction{'s' if len(shared) > 1 else ''} stand{'' if len(shared) > 1 else 's'} for several tasks "
            f"({_some(examples)}): a policy tells these apart by their scenes alone, so give each its own text where "
            "scenes are alike"
        )
        yield sentence, ()


def _many_instructions(inspected: Inspected) -> Found:
    by_task = inspected.survey.episodes.groupby(["suite", "task"])["instruction"].unique()
    many = by_task[by_task.map(len) > 1]
    if len(many):
        tasks = many.index.get_level_values("task")
        examples = [f"{task}: {_some(map(repr, texts))}" for task, texts in zip(tasks, many, strict=True)]
        sentence = (
            f"{len(many)} task{'s have' if len(many) > 1 else ' has'} several instructions ({'; '.join(examples[:3])}): keep "
            "them if they are paraphrases, though evaluation gives one text a task, and mend them if they are mistakes"
        )
        yield sentence, ()


CHECKS: Mapping[str, Callable[[Inspected], Found]] = {
    "actions within the limit": _outside_limit,
    "cameras move": _frozen_cameras,
    "cameras show something": _blank_cameras,
    "gripper sign": _gripper_sign,
    "gripper range": _gripper_range,
    "no duplicates": _duplicates,
    "no constant dimensions": _constant_dimensions,
    "lengths alike": _odd_lengths,
    "one task per instruction": _shared_instructions,
    "one instruction per task": _many_instructions,
}
"""What each makes sure of -> the check; it yields (sentence, sources of the episodes)."""


def not_checked(inspected: Inspected) -> dict[str, str]:
    """Checks that this cache gives nothing to, with the reason."""
    if not finger_dims(inspected.cache.robot):
        return {"gripper sign": "the state has no finger joints and no gripper_opening"}
    return {}


def _count(episodes: pd.DataFrame) -> str:
    return f"{len(episodes)} episode{'s' if len(episodes) != 1 else ''}"


def _some(names: Iterable[str]) -> str:
    """The first three, and how many more."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
