"""CLIP as a frozen backbone: its image tower over the cameras, its text tower over the instruction.

The small baseline reads one projected embedding per picture and per text, a U-Net all patches and text tokens. Embeddings
keep their length, as transformers gives them: their readers norm them.

Shape letters: C cameras, B batch, L text tokens, N image tokens, D width.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ...data.batch import Observation, Prompts
from ..prefix import Prefix, PrefixPart, PrefixShape
from .siglip import as_pixels, camera_tokens, newest_features, present_cameras

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Red, green and blue of pixels in [0, 1], as CLIP was trained."""
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class ClipVisionConfig:
    """Sizes of the image tower; ViT-B/16's by default."""

    image_px: int = 224
    """Side of the square images; the cache's must be the same."""
    patch_px: int = 16
    """Side of one image token's patch."""
    width: int = 768
    """Features of an image token."""
    mlp_dim: int = 3072
    """Hidden features of the feed-forward."""
    depth: int = 12
    """Layers."""
    num_heads: int = 12
    """Attention heads."""


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """Sizes of the text tower; ViT-B/16's by default."""

    vocab_size: int | None = None
    """Rows of the token table, 49408 in public checkpoints; None: as many as the tokenizer has."""
    max_tokens: int = 77
    """Longest prompt, its padding included."""
    width: int = 512
    """Features of a text token."""
    mlp_dim: int = 2048
    """Hidden features of the feed-forward."""
    depth: int = 12
    """Layers."""
    num_heads: int = 8
    """Attention heads."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Both towers of CLIP, never trained. Prompts need CLIP's own tokenizer where its weights are read."""

    type: Literal["clip"] = "clip"
    vision: ClipVisionConfig = field(default_factory=ClipVisionConfig)
    text: ClipTextConfig = field(default_factory=ClipTextConfig)
    embedding_width: int = 512
    """Features of the space in which pictures and texts are compared."""
    features: Literal["pooled", "patches"] = "pooled"
    """One projected embedding per camera and one for the text, or the last layer's features of all patches and text tokens."""

    @property
    def image_px(self) -> int:
        return self.vision.image_px

    @property
    def num_observations(self) -> int:
        return 1

    @property
    def reads_embeddings(self) -> bool:
        return False


def make_vision_tower(config: ClipConfig) -> CLIPVisionModelWithProjection:
    vision = config.vision
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            image_size=vision.image_px,
            patch_size=vision.patch_px,
            hidden_size=vision.width,
            intermediate_size=vision.mlp_dim,
            num_hidden_layers=vision.depth,
            num_attention_heads=vision.num_heads,
            projection_dim=config.embedding_width,
            attn_implementation="sdpa",
        )
    )


def make_text_tower(config: ClipConfig, vocab_size: int) -> CLIPTextModelWithProjection:
    text = config.text
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=text.vocab_size or vocab_size,
            max_position_embeddings=text.max_tokens,
            hidden_size=text.width,
            intermediate_size=text.mlp_dim,
            num_hidden_layers=text.depth,
            num_attention_heads=text.num_heads,
            projection_dim=config.embedding_width,
            attn_implementation="sdpa",
        )
    )


def as_clip_pixels(images: Tensor) -> Tensor:
    """(…, px, px, 3), uint8 or floats in [-1, 1] -> (…, 3, px, px) float32, normalised as CLIP was trained."""
    channels = as_pixels(images, torch.float32).unbind(dim=-3)
    # The constants are not buffers: those would be rounded with a policy in bfloat16.
    return torch.stack(
        [((channel + 1) / 2 - mean) / std for channel, mean, std in zip(channels, PIXEL_MEAN, PIXEL_STD, strict=True)],
        dim=-3,
    )


class Clip(nn.Module):
    """See `Backbone`."""

    def __init__(
        self,
        config: ClipConfig,
        *,
        vocab_size: int,
        encoder_width: int | None,
        state_dim: int,
        cameras: tuple[str, ...],
        reads: PrefixPart,
    ) -> None:
        """Raises ValueError for an expert that reads keys and values."""
        super().__init__()
        if reads == "kv":
            raise ValueError(
                "the backbone 'clip' hands over tokens, and the expert reads keys and values; "
                "choose an expert that reads tokens: mlp or unet"
            )
        self.config = config
        self.cameras = cameras
        pooled = config.features == "pooled"
        self.shape = PrefixShape(
            kv=None,
            tokens={
                "image": config.embedding_width if pooled else config.vision.width,
                "language": config.embedding_width if pooled else config.text.width,
            },
            state_dim=state_dim,
        )
        self.vision_tower = make_vision_tower(config)
        self.text_tower = make_text_tower(config, vocab_size)

    def unread_parameters(self) -> list[nn.Parameter]:
        """All: CLIP stays as it is."""
        return list(self.parameters())

    @torch.no_grad()
    def picture_features(self, images: Tensor) -> Tensor:
        """Pooled, N is 1."""
        pixels = as_clip_pixels(images)
        if self.config.features == "pooled":
            embeddings_MD: Tensor = self.vision_tower(pixel_values=pixels).image_embeds
            return embeddings_MD[:, None]
        tower = self.vision_tower.vision_model
        # transformers norms the class token alone; without the norm a few features of a patch outweigh all others.
        patches_MND: Tensor = tower.post_layernorm(tower(pixel_values=pixels).last_hidden_state[:, 1:])
        return patches_MND

    @torch.no_grad()
    def forward(self, observation: Observation, state_BTS: Tensor) -> Prefix:
        return Prefix(
            tokens={"image": self._image_tokens(observation), "language": self._language_tokens(observation.prompts)}
        )

    def _image_tokens(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Features (B, N, D) and mask: pooled, one token per camera of the policy; else the patches of those present."""
        present = present_cameras(observation, self.cameras)
        features_CBND = newest_features(observation, present, self.picture_features)
        masks = {camera: observation.image_mask[camera][:, -1] for camera in present}
        if self.config.features == "pooled":
            found = dict(zip(present, features_CBND[:, :, 0], strict=True))
            # An absent camera keeps its place, so that the next one is not taken for it.
            nothing_BD, absent_B = torch.zeros_like(features_CBND[0, :, 0]), torch.zeros_like(masks[present[0]])
            return (
                torch.stack([found.get(camera, nothing_BD) for camera in self.cameras], dim=1),
                torch.stack([masks.get(camera, absent_B) for camera in self.cameras], dim=1),
            )
        return camera_tokens(features_CBND, observation, present)

    def _language_tokens(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Features (B, L, D) and mask; pooled, L is 1. Raises ValueError if the prompts are too long."""
        num_tokens, limit = prompts.ids_BL.shape[1], self.config.text.max_tokens
        if num_tokens > limit:
            raise ValueError(
                f"the longest prompt is padded to {num_tokens} tokens, and CLIP's text tower reads {limit}; shorten the "
                "instruction"
            )
        if prompts.repeats is None:
            return self._encoded(prompts.ids_BL, prompts.mask_BL)
        # A task's samples share their instruction, and the tower is the larger part of a step where pictures come as features.
        row_R, which_B = prompts.repeats.row_R, prompts.repeats.which_B
        features_RLD, mask_RL = self._encoded(prompts.ids_BL[row_R], prompts.mask_BL[row_R])
        return features_RLD[which_B], mask_RL[which_B]

    def _encoded(self, ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        # The tower is causal: padding on the right needs no mask.
        features_BLD = self.text_tower.text_model(input_ids=ids_BL).last_hidden_state
        if self.config.features == "patches":
            return features_BLD, mask_BL
        # CLIP pools where the text ends, which the mask says for every tokenizer.
        last_B = (mask_BL.sum(dim=-1) - 1).clamp(min=0)
        ending_BD = features_BLD.take_along_dim(last_B[:, None, None], dim=1)[:, 0]
        return self.text_tower.text_projection(ending_BD)[:, None], mask_BL.any(dim=-1, keepdim=True)
