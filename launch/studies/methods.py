"""What the studies compare: every objective under a short name, with the settings that are the same in all of them."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...policy.objectives import ObjectiveConfig
from ...policy.objectives.diffusion import Diffusion
from ...policy.objectives.flow import Flow
from ...policy.objectives.one_step import OneStep
from ...policy.objectives.regression import Regression
from ...policy.objectives.rs_imle import RSIMLE
from ...policy.objectives.shortcut import Shortcut


@dataclass(frozen=True, kw_only=True)
class Method:
    """An objective as the studies use it."""

    label: str
    """As figures and findings call it."""
    colour: str
    make: Callable[[int], ObjectiveConfig]
    """From the number of noise draws per observation, which those that draw one noise at a time share."""


METHODS: dict[str, Method] = {
    "flow": Method(label="flow", colour="#2b6cb0", make=lambda draws: Flow(num_draws=draws)),
    "diffusion": Method(label="diffusion", colour="#2f9e63", make=lambda draws: Diffusion(num_draws=draws)),
    "rs_imle": Method(label="RS-IMLE", colour="#8a56ac", make=lambda draws: RSIMLE()),
    "shortcut": Method(label="shortcut", colour="#1aa5a5", make=lambda draws: Shortcut(num_draws=draws)),
    "high_noise": Method(
        label="high-noise flow",
        colour="#d69e2e",
        make=lambda draws: Flow(num_draws=draws, level_shift=4.0, num_sampling_steps=1),
    ),
    "one_step": Method(label="one-step flow", colour="#c77d2b", make=lambda draws: OneStep(num_draws=draws)),
    "l1": Method(label="L1", colour="#c8483f", make=lambda draws: Regression(error="l1")),
    "mse": Method(label="MSE", colour="#7d3c3c", make=lambda draws: Regression(error="mse")),
}
"""Short name -> method, in the order of figures. Each acts in the number of steps that is its objective's default, high-noise
flow in the one that it is made for."""


def check_methods(names: Sequence[str], option: str = "--objectives") -> None:
    """Raises `ValueError` naming the first that is not there, the nearest and all."""
    if not names:
        raise ValueError(f"{option} names none; there are {', '.join(METHODS)}")
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{option} {name}: there is no such objective; {hint}There are {', '.join(METHODS)}")
