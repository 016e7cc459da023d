"""What a replay says: sentences about one demonstration, and about a file, where what its demonstrations share is said once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..data.robots.libero_panda import LIBERO_PANDA
from .replay_checks import FINEST_LAG, Looks

if TYPE_CHECKING:
    from .replay_rows import ReplayRow

DISOBEYED = -0.2
"""Fingers that go where they are told score about 1, at random 0, and -1 with the sign turned."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that does not agree. Its sentence has no measured number: demonstrations with the same defect say the same."""

    check: Literal["pictures", "state", "gripper", "timing"]
    sentence: str


def about_pictures(looks: Mapping[str, Looks], tolerance: float) -> list[Finding]:
    """Of every camera. `tolerance`: grey levels."""
    found = []
    for camera, seen in looks.items():
        if seen.better:
            sentence = f"against what this benchmark renders, the file's pictures of camera {camera} are {seen.better}"
            found.append(Finding(check="pictures", sentence=sentence))
        elif seen.difference > tolerance:
            sentence = (
                f"the file's pictures of camera {camera} differ from what this benchmark renders by more than {tolerance:g} grey "
                "levels, however they are turned: other assets, another camera, or another MuJoCo"
            )
            found.append(Finding(check="pictures", sentence=sentence))
    return found


def about_timing(lag: float | None, observed_before: bool) -> list[Finding]:
    """`lag` as `fit_lag` gives it. What was observed just before an action, or just after the one before it, is the same moment."""
    if lag is None or (lag < FINEST_LAG / 2 if observed_before else lag > -FINEST_LAG / 2):
        return []
    said, shown = ("before", "after") if observed_before else ("after", "before")
    sentence = (
        f"the file says that a row was observed {said} its action, and its proprioception is of a moment {shown} the action began "
        f"(read it with --observation-timing {shown}_action)"
    )
    return [Finding(check="timing", sentence=sentence)]


def about_gripper(agreement: float | None) -> list[Finding]:
    """`agreement` as `gripper_agreement` gives it."""
    if agreement is None or agreement >= DISOBEYED:
        return []
    sentence = (
        "the fingers close where the gripper's action asks them to open, and open where it asks them to close: its sign is turned "
        f"({LIBERO_PANDA.gripper_open:g} opens and {LIBERO_PANDA.gripper_closed:g} closes here)"
    )
    return [Finding(check="gripper", sentence=sentence)]


def about_file(
    name: str, rows: Sequence["ReplayRow"], sentences: Sequence[Sequence[str]], min_success: float
) -> list[str]:
    """One sentence for each thing that does not agree. `rows` are those of the demonstrations that could be replayed; `sentences`
    has those of every one."""
    found = []
    successes = sum(row.success for row in rows)
    if successes < min_success * len(rows):
        found.append(
            f"{name}: of {len(rows)} demonstrations {successes} succeed when their actions are run again from the recorded state, and "
            f"{100 * min_success:g} % should"
        )
    for sentence in dict.fromkeys(sentence for of_demo in sentences for sentence in of_demo):
        count = sum(sentence in of_demo for of_demo in sentences)
        found.append(f"{name}: {sentence} ({count} of {len(sentences)} demonstrations)")
    return found


def drift_note(name: str, rows: Sequence["ReplayRow"]) -> list[str]:
    """Where replayed states leave the recorded ones: said, and no failure, as a replay that succeeds in spite of it has passed."""
    drifted = [row for row in rows if row.drifted_from is not None]
    if not drifted:
        return []
    first = min(row.drifted_from for row in drifted if row.drifted_from is not None)
    note = (
        f"{name}: {len(drifted)} of {len(rows)} replays leave the recorded states by more than 1 cm or 0.01 rad (the first in row "
        f"{first}): other physics, or actions that are not the ones that were executed"
    )
    return [note]
