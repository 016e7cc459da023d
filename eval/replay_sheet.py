"""What a replay compared, for a person to look at: stored pictures, rendered ones, and where they differ.

Shape letters: P moments, H rows, W columns, C = 3 colours.
"""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .replay_episode import Replayed

PICTURE_PX = 144
LINE_PX = 22
GAP_PX = 4
MOST_MOMENTS = 8
AMPLIFIED = 8
"""Differences are shown so many times stronger: those of pictures that agree are a level or less."""
INK, SOFT, PAPER, RED = "#2d3440", "#6b7583", "#ffffff", "#b03a2e"


def sheet_of(replayed: Replayed) -> bytes:
    """A PNG: for each camera a row of stored pictures, one of rendered, one of differences; upright, as a person would see them."""
    chosen_P = np.unique(np.linspace(0, len(replayed.rows) - 1, MOST_MOMENTS).round().astype(int))
    lines = [(f"{replayed.recording.where}", INK)]
    lines += [(f"{finding.check}: {finding.sentence}", RED) for finding in replayed.findings]
    font = ImageFont.load_default(13)
    width = max(len(chosen_P) * (PICTURE_PX + GAP_PX), *(int(font.getlength(words)) + 2 * GAP_PX for words, _ in lines))
    height = LINE_PX * len(lines) + len(replayed.pictures) * (LINE_PX + 3 * (PICTURE_PX + GAP_PX))
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    for k, (words, colour) in enumerate(lines):
        draw.text((GAP_PX, k * LINE_PX + 3), words, fill=colour, font=font)
    top = LINE_PX * len(lines)
    for camera, (stored_PHWC, rendered_PHWC) in replayed.pictures.items():
        rows = ", ".join(str(row) for row in replayed.rows[chosen_P])
        words = f"{camera}, rows {rows}: stored, rendered, difference x {AMPLIFIED}"
        draw.text((GAP_PX, top + 3), words, fill=SOFT, font=font)
        top += LINE_PX
        apart_PHWC = np.abs(stored_PHWC.astype(np.int16) - rendered_PHWC.astype(np.int16))
        strong_PHWC = np.minimum(apart_PHWC * AMPLIFIED, 255).astype(np.uint8)
        for pictures_PHWC in (stored_PHWC, rendered_PHWC, strong_PHWC):
            for column, moment in enumerate(chosen_P):
                upright = Image.fromarray(np.ascontiguousarray(pictures_PHWC[moment, ::-1]))
                page.paste(upright.resize((PICTURE_PX, PICTURE_PX)), (column * (PICTURE_PX + GAP_PX), top))
            top += PICTURE_PX + GAP_PX
    content = io.BytesIO()
    page.save(content, format="png")
    return content.getvalue()
