"""Backbones: observation in, `Prefix` out. Adding one is a file here and its names in the two lines below."""

from .paligemma import PaliGemma, PaliGemmaConfig

BackboneConfig = PaliGemmaConfig
BACKBONES = {PaliGemmaConfig: PaliGemma}
