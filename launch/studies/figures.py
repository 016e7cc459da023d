"""How figures of studies look, and where they are written: PNGs in the report's colours."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from ...data.files import write_whole
from ...data.plotting import BLUE, GREY, RED, png

VALID, INVALID, SHADE, MUTED = BLUE, RED, "#dfe4ea", GREY


def save_figure(path: Path, size_in: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    """Draw and write the PNG, whole or not at all; equal numbers give equal bytes."""
    write_whole(path, png(draw, size_in, dpi=160))
