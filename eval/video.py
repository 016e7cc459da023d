"""An episode as an mp4: all cameras side by side, upright, with the instruction, the step and the outcome written on it."""

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .benchmarks.benchmark import SimObservation

PANE_PX = 256
"""Cameras are shown at this size, whatever was rendered: small text stays readable."""
CAPTION_PX = 48
END_S = 1.0
"""How long the last frame stays, with the outcome on it."""
GREEN, RED, WHITE = (74, 190, 110), (226, 86, 78), (240, 240, 240)


class VideoRecorder:
    """Collects an episode's frames as it runs (`on_step` and `on_end` are hooks of `roll_out`, rendering every step).

    Frames go straight to the encoder, into a hidden file; `finish` gives it its name, which says the outcome."""

    def __init__(self, stem: Path, *, instruction: str, fps: float) -> None:
        self._stem = stem
        self._instruction = instruction
        self._fps = fps
        # the process id: the encoder of a killed worker may live on for a moment beside its successor's
        self._partial = stem.with_name(f".partial-{os.getpid()}-{stem.name}.mp4")
        self._writer: Any = None
        self._last: SimObservation | None = None
        self._num_steps = 0

    def on_step(self, step: int, observation: SimObservation, state: np.ndarray, action_A: np.ndarray) -> None:
        self._write(frame(observation, self._instruction, f"step {step}"))
        self._num_steps = step + 1

    def on_end(self, observation: SimObservation) -> None:
        self._last = observation

    def finish(self, success: bool, failure_mode: str) -> Path:
        """Write the outcome on a last second of video and return the file: `<stem>__success.mp4` or `<stem>__failure.mp4`.

        The last frame lies beside it as a JPEG, for pages that show many."""
        assert self._last is not None, "the episode has not ended"
        word = "success" if success else "failure" + (f": {failure_mode.replace('_', ' ')}" if failure_mode else "")
        last = frame(
            self._last, self._instruction, f"step {self._num_steps}", outcome=word, colour=GREEN if success else RED
        )
        for _ in range(max(1, round(END_S * self._fps))):
            self._write(last)
        self._close()
        path = self._stem.with_name(f"{self._stem.name}__{'success' if success else 'failure'}.mp4")
        Image.fromarray(last).save(path.with_suffix(".jpg"), quality=85)
        return self._partial.replace(path)

    def abandon(self) -> None:
        """Drop what is unfinished; nothing happens after `finish`."""
        self._close()
        with contextlib.suppress(FileNotFoundError):
            self._partial.unlink()

    def _write(self, frame_RC3: np.ndarray) -> None:
        if self._writer is None:
            import imageio.v2 as imageio

            self._partial.parent.mkdir(parents=True, exist_ok=True)
            # yuv420p and faststart: what browsers play, from the first byte on
            self._writer = imageio.get_writer(
                self._partial,
                format="FFMPEG",
                fps=self._fps,
                codec="libx264",
                quality=7,
                pixelformat="yuv420p",
                ffmpeg_params=["-movflags", "+faststart", "-threads", "1", "-preset", "veryfast"],
            )
        self._writer.append_data(frame_RC3)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def frame(
    observation: SimObservation, instruction: str, note: str, outcome: str = "", colour: tuple[int, int, int] = WHITE
) -> np.ndarray:
    """(rows, columns, 3) uint8: the cameras from left to right over a caption; sides are multiples of 16 for the encoder."""
    panes = [_pane(image) for image in observation.images.values()]
    canvas = Image.new("RGB", (PANE_PX * len(panes), PANE_PX + CAPTION_PX), (24, 26, 30))
    for column, pane in enumerate(panes):
        canvas.paste(pane, (column * PANE_PX, 0))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=15)
    draw.text((8, PANE_PX + 5), _shortened(instruction, draw, font, canvas.width - 16), fill=WHITE, font=font)
    draw.text((8, PANE_PX + 26), note, fill=(160, 165, 172), font=font)
    if outcome:
        draw.text((canvas.width - 8, PANE_PX + 26), outcome, fill=colour, font=font, anchor="ra")
        draw.rectangle((0, 0, canvas.width - 1, PANE_PX - 1), outline=colour, width=4)
    return np.asarray(canvas)


def _pane(image: np.ndarray) -> Image.Image:
    """A camera's image the right way up. OpenGL's rows run from the bottom, so turning their order gives the scene as it is;
    the policy's own convention (`rot180`, openpi's and OpenVLA's) turns the columns too and so sees its mirror image."""
    upright = np.ascontiguousarray(image[::-1])
    return Image.fromarray(upright).resize((PANE_PX, PANE_PX), Image.Resampling.BICUBIC)


def _shortened(text: str, draw: ImageDraw.ImageDraw, font: Any, width_px: int) -> str:
    if draw.textlength(text, font=font) <= width_px:
        return text
    while text and draw.textlength(text + "…", font=font) > width_px:
        text = text[:-1]
    return text + "…"


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed sweep left in `folder`."""
    for path in folder.glob(".partial-*.mp4"):
        path.unlink()
