"""Recorded episodes for a page: failures by mode first, then successes, so many of each and no more."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Clip:
    src: str
    """The mp4, relative to the page."""
    poster: str
    """Its last frame as a JPEG, relative to the page; empty where it is not there."""
    row: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ClipGroup:
    title: str
    clips: list[Clip]
    num_more: int
    """Recorded, too, and not shown."""


def gallery(rows: pd.DataFrame, page_folder: Path, *, by: str, most: int = 6) -> list[ClipGroup]:
    """The videos that are there, a group for each failure mode (the most frequent among `rows` first) and one for successes.

    `rows` has the column `folder`, which their `video` is relative to. Of each value of the column `by` (`variant`, or `actor`) the
    first is shown before the second of any."""
    modes = (
        rows["failure_mode"].str.replace("_", " ").where(rows["outcome"] == "failure", "success").replace("", "failure")
    )
    recorded = rows.assign(title=modes)[rows["video"] != ""]
    recorded = recorded.loc[[is_there(row) for row in recorded.to_dict("records")]]
    recorded = recorded.sort_values([by, "step", "suite", "task_id", "init_state"], kind="stable")
    recorded = recorded.assign(turn=recorded.groupby(["title", by]).cumcount()).sort_values(["turn", by], kind="stable")
    order = [mode for mode in modes.value_counts(sort=True).index if mode != "success"] + ["success"]
    groups = []
    for title in order:
        of_mode = recorded[recorded["title"] == title].to_dict("records")
        if of_mode:
            clips = [_clip(row, page_folder) for row in of_mode[:most]]
            groups.append(ClipGroup(title=title, clips=clips, num_more=len(of_mode) - len(clips)))
    return groups


def is_there(row: Mapping[Any, Any]) -> bool:
    """Whether the row's video lies where the CSV says: a CSV may travel without its videos."""
    return (Path(row["folder"]) / row["video"]).is_file()


def num_missing(rows: pd.DataFrame) -> int:
    """Videos that rows name and that are not there."""
    return sum(not is_there(row) for row in rows[rows["video"] != ""].to_dict("records"))


def _clip(row: Mapping[Any, Any], page_folder: Path) -> Clip:
    video = Path(row["folder"]) / row["video"]
    poster = video.with_suffix(".jpg")
    return Clip(
        src=_relative(video, page_folder), poster=_relative(poster, page_folder) if poster.is_file() else "", row=row
    )


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
