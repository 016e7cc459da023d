"""Objectives. Adding one is a file here and its name in the union below."""

from typing import Annotated

from pydantic import Field

from .diffusion import Diffusion
from .flow import Flow
from .one_step import OneStep
from .regression import Regression
from .rs_imle import RSIMLE
from .shortcut import Shortcut

AnyObjective = Flow | OneStep | Shortcut | Regression | Diffusion | RSIMLE
"""Each is its own config."""
ObjectiveConfig = Annotated[AnyObjective, Field(discriminator="type")]
"""A stored one is told by its `type`."""
