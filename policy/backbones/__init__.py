"""Backbones: observation in, `Prefix` out. Adding one is a file here and its names in the two lines below."""

from typing import Any

from .paligemma import PaliGemma, PaliGemmaConfig

BackboneConfig = PaliGemmaConfig
BACKBONES: dict[type, Any] = {PaliGemmaConfig: PaliGemma}
"""A config's class -> the `Backbone` that is built from it."""
