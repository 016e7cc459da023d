"""The SigLIP vision tower that PaliGemma, SmolVLM and RDT share, and the one call that takes all cameras through it.

Shape letters: C cameras, B batch, N image tokens, D width."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from ...data.batch import Observation


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """Sizes of the vision tower."""

    image_px: int = 224
    """Side of the square images; the cache's must be the same."""
    patch_px: int = 14
    """Side of one image token's patch."""
    width: int = 1152
    """Features of an image token."""
    mlp_dim: int = 4304
    """Hidden features of the feed-forward."""
    depth: int = 27
    """Layers."""
    num_heads: int = 16
    """Attention heads."""
    stem: Literal["patch", "conv"] = "patch"
    """How pixels become tokens: SigLIP's one linear patch embedding, or strided 3 x 3 convolutions, which learn from far
    fewer images when nothing is pretrained."""


class ConvStem(nn.Module):
    """Halves the image with 3 x 3 convolutions until one position stands for `patch_px` pixels."""

    def __init__(self, width: int, patch_px: int) -> None:
        super().__init__()
        halvings = int(math.log2(patch_px))
        if 2**halvings != patch_px:
            raise ValueError(f"a convolutional stem needs patch_px to be a power of two, not {patch_px}")
        widths = [3, *(max(width // 4, width >> (halvings - 1 - i)) for i in range(halvings))]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1), nn.GELU(approximate="tanh")]
        self.layers = nn.Sequential(*layers[:-1])

    @property
    def weight(self) -> Tensor:
        """SiglipVisionModel asks its patch embedding for a dtype."""
        return next(self.parameters())

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


def make_vision_tower(config: SiglipConfig) -> SiglipVisionModel:
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            image_size=config.image_px,
            patch_size=config.patch_px,
            hidden_size=config.width,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            vision_use_head=False,
            attn_implementation="sdpa",
        )
    )
    if config.stem == "conv":
        tower.embeddings.patch_embedding = ConvStem(config.width, config.patch_px)
    return tower


def present_cameras(observation: Observation, cameras: Sequence[str]) -> list[str]:
    """Those of `cameras` that the batch has, in order, as pictures or as features; raises ValueError if it has none."""
    there = observation.images if observation.features is None else observation.features
    present = [camera for camera in cameras if camera in there]
    if not present:
        raise ValueError(f"the observation has none of this policy's cameras: {', '.join(cameras)}")
    return present


def as_pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """(…, px, px, 3), uint8 or floats already in [-1, 1] -> (…, 3, px, px) in [-1, 1]."""
    pixels = images.movedim(-1, -3)
    return pixels.to(dtype) if pixels.is_floating_point() else pixels.to(dtype) / 127.5 - 1


def picture_features(tower: SiglipVisionModel, images: Tensor) -> Tensor:
    """(M, px, px, 3), uint8 or floats already in [-1, 1] -> (M, N, D)."""
    features: Tensor = tower(as_pixels(images, tower.dtype)).last_hidden_state
    return features


def encode_cameras(tower: SiglipVisionModel, observation: Observation, cameras: Sequence[str]) -> Tensor:
    """The newest image of `cameras`, through the tower in one call or as the features that stand in for it: (C, B, N, D)."""
    return newest_features(observation, cameras, lambda images: picture_features(tower, images))


def newest_features(observation: Observation, cameras: Sequence[str], encode: Callable[[Tensor], Tensor]) -> Tensor:
    """As `encode_cameras`, of any tower: `encode` takes (M, px, px, 3) to (M, N, D)."""
    if observation.features is not None:
        return torch.stack([observation.features[camera][:, -1] for camera in cameras])
    images = torch.stack([observation.images[camera][:, -1] for camera in cameras])
    return encode(images.flatten(0, 1)).unflatten(0, (len(cameras), -1))


def camera_tokens(features_CBND: Tensor, observation: Observation, cameras: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Camera after camera: features (B, C * N, D) and mask (B, C * N)."""
    mask_BC = torch.stack([observation.image_mask[camera][:, -1] for camera in cameras], dim=1)
    mask_BN = mask_BC.repeat_interleave(features_CBND.shape[2], dim=1)
    return features_CBND.transpose(0, 1).flatten(1, 2), mask_BN
