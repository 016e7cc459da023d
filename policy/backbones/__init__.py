"""Backbones: observation in, `Prefix` out. Adding one is a file here and its names in the lines below."""

from typing import Annotated, Any

from pydantic import Field

from .clip import Clip, ClipConfig
from .paligemma import PaliGemma, PaliGemmaConfig
from .siglip_t5 import SiglipT5, SiglipT5Config
from .smolvlm import SmolVLM, SmolVLMConfig

BackboneConfig = Annotated[PaliGemmaConfig | SmolVLMConfig | SiglipT5Config | ClipConfig, Field(discriminator="type")]
BACKBONES: dict[type, Any] = {
    PaliGemmaConfig: PaliGemma,
    SmolVLMConfig: SmolVLM,
    SiglipT5Config: SiglipT5,
    ClipConfig: Clip,
}
"""A config's class -> the `Backbone` that is built from it."""
