"""Contact sheets: a few episodes of every task, first, middle and last picture of every camera; and each camera turned in every
way that `prepare --orientation` offers, so that the upright one is seen at once.

Shape letters: H rows, W columns, C = 3 colours.
"""

from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from ..cache import Cache
from ..images import ImageRule, Orientation

INK, SOFT, PAPER, BLUE = "#2d3440", "#6b7583", "#ffffff", "#2b6cb0"
GAP_PX, GROUP_GAP_PX = 4, 22
LINE_PX = 20
"""Of one line of text."""
MOMENTS = ("first", "middle", "last")


@dataclass(frozen=True, kw_only=True)
class TaskSheet:
    """One task's part of the contact sheet."""

    suite: str
    task: str
    instruction: str
    num_shown: int
    num_episodes: int
    image: Image.Image


def choose_episodes(episodes: pd.DataFrame, per_task: int, most: int) -> pd.DataFrame:
    """At most `per_task` episodes of a task and `most` in all: one of each task before the second of any; evenly spread over a
    task's episodes, and over the tasks where even one of each is too many."""
    tasks = [of_task for _, of_task in episodes.groupby(["suite", "task"], sort=True)]
    tasks = [tasks[k] for k in _spread(len(tasks), most)]
    wanted = [0] * len(tasks)
    for turn in range(per_task):
        for k, of_task in enumerate(tasks):
            if turn < len(of_task) and sum(wanted) < most:
                wanted[k] += 1
    return pd.concat([of_task.iloc[_spread(len(of_task), n)] for of_task, n in zip(tasks, wanted, strict=True)])


def task_sheets(cache: Cache, chosen: pd.DataFrame, picture_px: int) -> list[TaskSheet]:
    """One sheet for each task that `chosen` has episodes of."""
    num_episodes = cache.episodes.groupby(["suite", "task"])["task"].transform("size")
    return [
        TaskSheet(
            suite=of_task["suite"].iloc[0],
            task=of_task["task"].iloc[0],
            instruction=of_task["instruction"].iloc[0],
            num_shown=len(of_task),
            num_episodes=int(num_episodes[of_task.index[0]]),
            image=_sheet(cache, of_task, picture_px),
        )
        for _, of_task in chosen.groupby(["suite", "task"], sort=True)
    ]


def orientation_sheet(cache: Cache, frame: int, picture_px: int) -> Image.Image:
    """One frame as every orientation would have it; a row a camera. The cache's own comes first."""
    own = cache.image_rule.orientation
    ways: list[Orientation] = [own, *(way for way in get_args(Orientation) if way != own)]
    cameras = cache.manifest.cameras
    left = _text_width(max(cameras, key=len)) + 12
    sheet = _Sheet(
        width=left + len(ways) * (picture_px + GROUP_GAP_PX) - GROUP_GAP_PX,
        height=LINE_PX + len(cameras) * (picture_px + GAP_PX) - GAP_PX,
    )
    for row, camera in enumerate(cameras):
        top = LINE_PX + row * (picture_px + GAP_PX)
        sheet.text(0, top + picture_px // 2 - LINE_PX // 2, camera, SOFT)
        for column, way in enumerate(ways):
            place = left + column * (picture_px + GROUP_GAP_PX)
            if row == 0:
                sheet.text(place, 0, f"{way} (this cache)" if way == own else way, BLUE if way == own else SOFT)
            sheet.picture(place, top, turned(cache.images[camera][frame], cache.image_rule, way), picture_px)
    return sheet.image


def turned(picture_HWC: np.ndarray, rule: ImageRule, orientation: Orientation) -> np.ndarray:
    """A prepared picture as it would be if the same camera's picture had been turned by `orientation`; padding that is not the
    same on both sides turns along with it."""
    raw = replace(rule, size_px=len(picture_HWC)).prepare(picture_HWC[None])  # every turn is its own inverse
    return replace(rule, size_px=len(picture_HWC), orientation=orientation).prepare(raw)[0]


def _sheet(cache: Cache, episodes: pd.DataFrame, picture_px: int) -> Image.Image:
    """A row for each episode, under its name; a group of columns for each camera."""
    cameras = cache.manifest.cameras
    group = len(MOMENTS) * (picture_px + GAP_PX) - GAP_PX
    row_height = LINE_PX + picture_px + GAP_PX
    sheet = _Sheet(
        width=len(cameras) * (group + GROUP_GAP_PX) - GROUP_GAP_PX, height=LINE_PX + len(episodes) * row_height - GAP_PX
    )
    for k, camera in enumerate(cameras):
        sheet.text(k * (group + GROUP_GAP_PX), 0, f"{camera}: {', '.join(MOMENTS)}", BLUE)
    for row, episode in enumerate(episodes.itertuples()):
        top = LINE_PX + row * row_height
        sheet.text(0, top, _caption(episode, sheet.image.width), SOFT)
        for k, camera in enumerate(cameras):
            for column, frame in enumerate(_moments(episode)):
                place = k * (group + GROUP_GAP_PX) + column * (picture_px + GAP_PX)
                sheet.picture(place, top + LINE_PX, cache.images[camera][frame], picture_px)
    return sheet.image


class _Sheet:
    """An empty page that pictures and words are put on."""

    def __init__(self, *, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def text(self, left: int, top: int, words: str, colour: str) -> None:
        self._draw.text((left, top + 2), words, fill=colour, font=_font())

    def picture(self, left: int, top: int, picture_HWC: np.ndarray, side_px: int) -> None:
        picture = Image.fromarray(np.ascontiguousarray(picture_HWC))
        # Pixels of a small picture stay pixels: a person sees what the policy sees.
        way = Image.Resampling.NEAREST if picture.width < side_px else Image.Resampling.LANCZOS
        self.image.paste(picture.resize((side_px, side_px), way), (left, top))


def _moments(episode: Any) -> tuple[int, int, int]:
    """The cache's frames for `MOMENTS`."""
    start, length = int(episode.start), int(episode.length)
    return start, start + length // 2, start + length - 1


def _caption(episode: Any, width: int) -> str:
    """Shortened from its left where it is too long: the end of the name tells episodes apart."""
    name, rest = episode.source, f"  {episode.length} frames, {episode.split}"
    while len(name) > 1 and _text_width(f"…{name}{rest}") > width:
        name = name[1:]
    return (name if name == episode.source else f"…{name}") + rest


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of 0 … count - 1, from the first to the last."""
    return list(dict.fromkeys(np.linspace(0, count - 1, min(wanted, count)).round().astype(int).tolist()))


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)


def _text_width(words: str) -> int:
    return int(_font().getlength(words)) + 1
