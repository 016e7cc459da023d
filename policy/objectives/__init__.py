"""Objectives. Adding one is a file here and its name in the union below."""

from typing import Annotated

from pydantic import Field

from .diffusion import Diffusion
from .flow import Flow

ObjectiveConfig = Annotated[Flow | Diffusion, Field(discriminator="type")]
"""The union of all objectives: each is its own config. A stored one is told by its `type`."""
