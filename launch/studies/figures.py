"""How figures of studies look, and where they are written: PNGs in the report's colours."""

import io
from collections.abc import Callable
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from ...data.files import write_whole
from ...eval.report.figures import GREY, INK, STYLE

VALID, INVALID, SHADE, MUTED = "#2b6cb0", "#c8483f", "#dfe4ea", GREY
__all__ = ["DPI", "INK", "INVALID", "MUTED", "SHADE", "VALID", "save_figure"]
DPI = 160


def save_figure(path: Path, size_in: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    """Draw and write the PNG, whole or not at all; equal numbers give equal bytes."""
    with rc_context(STYLE):
        figure = Figure(figsize=size_in, layout="constrained")
        draw(figure)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=DPI, metadata={"Software": None})
    write_whole(path, image.getvalue())
