"""How every figure looks, and its PNG. Equal numbers give equal bytes."""

import io
from collections.abc import Callable

from matplotlib import rc_context
from matplotlib.figure import Figure

BLUE, GREY, GREEN, RED, AMBER, INK = "#2b6cb0", "#a3acb9", "#2f9e63", "#c8483f", "#d69e2e", "#2d3440"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#c5ccd6",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8ecf1",
    "axes.axisbelow": True,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "svg.hashsalt": "vlatune",  # without it an SVG's names are drawn anew each time
}


def png(
    draw: Callable[[Figure], None], size_in: tuple[float, float], *, dpi: int = 130, font_size: float = 10
) -> bytes:
    """`draw` fills an empty figure of width and height `size_in` (inches)."""
    with rc_context({**STYLE, "font.size": font_size}):
        figure = Figure(figsize=size_in, layout="constrained")
        draw(figure)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=dpi, metadata={"Software": None})
    return image.getvalue()
