"""The inspection's tables: by task, by instruction, and the warnings."""

from collections.abc import Sequence

import pandas as pd

from ..cache import Cache
from .concerns import Concern
from .survey import Survey


def by_task(survey: Survey) -> pd.DataFrame:
    """One row a task; lengths in frames, shares of frames."""
    episodes = survey.episodes.assign(validation=survey.episodes["split"] == "validation")
    grouped = episodes.groupby(["suite", "task"], sort=True)
    table = grouped.agg(
        instruction=("instruction", lambda texts: " | ".join(sorted(set(texts)))),
        episodes=("length", "size"),
        validation=("validation", "sum"),
        frames=("length", "sum"),
        length_mean=("length", "mean"),
        length_min=("length", "min"),
        length_max=("length", "max"),
        closed_frames=("closed_frames", "sum"),
        idle_frames=("idle_frames", "sum"),
    ).reset_index()
    table.insert(4, "train", table["episodes"] - table["validation"])
    table["gripper_closed_share"] = table.pop("closed_frames") / table["frames"]
    table["idle_share"] = table.pop("idle_frames") / table["frames"]
    return table


def by_instruction(cache: Cache) -> pd.DataFrame:
    """One row a text: its tokens as they are (a policy's prompt may add some), and who uses it."""
    grouped = cache.episodes.groupby("instruction", sort=True)
    table = grouped.agg(episodes=("length", "size"), tasks=("task", "nunique")).reset_index()
    masks_BL = cache.language.prompts(list(table["instruction"])).mask_BL
    table.insert(1, "tokens", masks_BL.sum(dim=1).numpy())
    return table


def of_concerns(found: Sequence[Concern]) -> pd.DataFrame:
    """One row a warning; `episodes` are separated by a semicolon."""
    return pd.DataFrame(
        [(concern.check, concern.sentence, ";".join(concern.episodes)) for concern in found],
        columns=["check", "sentence", "episodes"],
    )
