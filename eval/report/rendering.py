"""What both pages share: how templates are filled, and numbers are written in them."""

from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from .markdown import number, p_value, whole

HERE = Path(__file__).parent


def render(template: str, **values: object) -> bytes:
    """The page of a template in this folder, style included. A name that a template uses and nobody gave is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.globals |= {
        "style": (HERE / "style.css").read_text(),
        "percent": lambda share: f"{100 * share:.0f} %",
        "percent1": lambda share: f"{100 * share:.1f}",
        "points": lambda share: f"{100 * share:+.1f}",
        "p_value": p_value,
        "number": number,
        "whole": whole,
        "duration": duration,
        "breakable": breakable,
    }
    return environment.get_template(template).render(**values).encode()


def breakable(name: str) -> Markup:
    """The name, which may be broken after an underscore, so that long ones leave a table its width."""
    return Markup(escape(name).replace("_", Markup("_<wbr>")))


def duration(seconds: float) -> str:
    """`48 s`, `12 min`, `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
