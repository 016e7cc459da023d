"""Looking something up by a name that a person typed."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

Thing = TypeVar("Thing")


def named(kind: str, name: str, things: Mapping[str, Thing]) -> Thing:
    """`things[name]`; ValueError with the nearest name, and with all of them, if there is none."""
    if name not in things:
        near = difflib.get_close_matches(name, things, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no {kind} {name!r}; {hint}There are: {', '.join(things)}")
    return things[name]
