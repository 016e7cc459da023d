"""Objectives. Adding one is a file here and its name in the union below."""

from typing import Annotated

from pydantic import Field

from .diffusion import Diffusion
from .flow import Flow
from .one_step import OneStep
from .regression import Regression
from .rs_imle import RSIMLE
from .shortcut import Shortcut

ObjectiveConfig = Annotated[Flow | OneStep | Shortcut | Regression | Diffusion | RSIMLE, Field(discriminator="type")]
"""The union of all objectives: each is its own config. A stored one is told by its `type`."""
