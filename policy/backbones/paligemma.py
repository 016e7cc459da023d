"""PaliGemma-shaped backbone: a SigLIP tower, a linear projector and a Gemma prefix over image and prompt tokens.

From the sizes of PaliGemma-2B down to a few hundred thousand parameters it is the same code. Prefix tokens attend to one
another in both directions; their keys and values, layer by layer, are what an expert reads. The last layer computes only
those: its queries, output and feed-forward (and the final norm) have no reader here and stay frozen.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from ...data.batch import Observation
from ..layers.gemma import GEMMA_2B, GemmaBlock, GemmaConfig
from ..layers.norms import RMSNorm
from ..layers.rotary import rotary_angles
from ..prefix import Prefix


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


@dataclass(frozen=True, kw_only=True)
class PaliGemmaConfig:
    """A SigLIP tower in front of a Gemma prefix."""

    type: Literal["paligemma"] = "paligemma"
    vision: SiglipConfig = field(default_factory=SiglipConfig)
    text: GemmaConfig = GEMMA_2B
    language: Literal["tokens", "encoder"] = "tokens"
    """What the prefix reads of the instruction: token ids through its own table, or the cached text-encoder embedding."""
    state: Literal["token", "none"] = "none"
    """Whether proprioception enters the prefix, as one linear token."""
    camera_embedding: bool = False
    """A learned vector per camera; public checkpoints have none."""

    @property
    def num_observations(self) -> int:
        """How many observation offsets a decision reads."""
        return 1

    @property
    def reads_embeddings(self) -> bool:
        """Whether prompts must carry the text encoder's features."""
        return self.language == "encoder"

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """The cache of keys and values that it writes."""
        return self.text.kv_shape


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


class LanguageModel(nn.Module):
    """Gemma without its vocabulary head: token table, layers, final norm."""

    def __init__(self, config: GemmaConfig, vocab_size: int | None) -> None:
        super().__init__()
        if vocab_size is not None:
            self.embed_tokens = nn.Embedding(vocab_size, config.width)
            nn.init.normal_(self.embed_tokens.weight, std=config.width**-0.5)
        self.layers = nn.ModuleList(GemmaBlock(config, adaptive=False) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)

    @property
    def blocks(self) -> list[GemmaBlock]:
        return [block for block in self.layers if isinstance(block, GemmaBlock)]


class PaliGemma(nn.Module):
    """Observation -> `Prefix` of keys and values."""

    def __init__(
        self,
        config: PaliGemmaConfig,
        *,
        vocab_size: int,
        encoder_width: int | None,
        state_dim: int,
        cameras: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.config = config
        self.cameras = cameras
        width = config.text.width
        self.vision_tower = make_vision_tower(config.vision)
        self.multi_modal_projector = nn.Linear(config.vision.width, width)
        self.language_model = LanguageModel(config.text, vocab_size if config.language == "tokens" else None)
        if config.reads_embeddings:
            if encoder_width is None:
                raise ValueError(
                    "backbone.language is 'encoder' but the cache holds no text embeddings; prepare it with --encoder"
                )
            self.language_projector = nn.Linear(encoder_width, width)
        if config.state == "token":
            self.state_proj = nn.Linear(state_dim, width)
        if config.camera_embedding:
            self.camera_embedding = nn.Embedding(len(cameras), width)

    def unread_parameters(self) -> list[nn.Parameter]:
        """Parameters that no output depends on: they are kept in checkpoints but not trained."""
        unread = (*self.language_model.blocks[-1].output_only_modules(), self.language_model.norm)
        return [parameter for module in unread for parameter in module.parameters()]

    def forward(self, observation: Observation, state_BTS: Tensor) -> Prefix:
        """`state_BTS` is the normalised state; images are uint8 as `Observation` holds them, or floats already in [-1, 1]."""
        parts = [*self._image_tokens(observation), self._language_tokens(observation)]
        if self.config.state == "token":
            token_B1D = self.state_proj(state_BTS[:, -1:].to(self.state_proj.weight.dtype))
            parts.append((token_B1D, torch.ones_like(token_B1D[..., 0], dtype=torch.bool)))
        x_BPD = torch.cat([features for features, _ in parts], dim=1)
        mask_BP = torch.cat([mask for _, mask in parts], dim=1)

        positions_BP = (mask_BP.cumsum(-1) - 1).clamp(min=0)
        angles = rotary_angles(positions_BP, self.config.text.head_dim)
        mask_B1PP = mask_BP[:, None, None, :].expand(-1, 1, mask_BP.shape[1], -1)
        layers_kv = []
        *blocks, last = self.language_model.blocks
        for block in blocks:
            x_BPD, keys_values = block(x_BPD, angles, mask_B1PP)
            layers_kv.append(keys_values)
        layers_kv.append(last.keys_values(x_BPD, angles))
        return Prefix(mask_BP=mask_BP, layers_kv=tuple(layers_kv), state_BTS=state_BTS)

    def _image_tokens(self, observation: Observation) -> list[tuple[Tensor, Tensor]]:
        """Per present camera: (features (B, N, D), mask (B, N)). All cameras pass the tower in one call."""
        present = [camera for camera in self.cameras if camera in observation.images]
        if not present:
            raise ValueError(f"the observation has none of this policy's cameras: {', '.join(self.cameras)}")
        pixels = torch.stack([observation.images[camera][:, -1] for camera in present])  # (C, B, px, px, 3) uint8
        num_cameras, batch = pixels.shape[:2]
        dtype = self.multi_modal_projector.weight.dtype
        pixels = pixels.flatten(0, 1).permute(0, 3, 1, 2)
        pixels = pixels.to(dtype) if pixels.is_floating_point() else pixels.to(dtype) / 127.5 - 1
        features = self.multi_modal_projector(self.vision_tower(pixels).last_hidden_state)
        features = features.unflatten(0, (num_cameras, batch))
        if self.config.camera_embedding:
            index = torch.tensor([self.cameras.index(camera) for camera in present], device=features.device)
            features = features + self.camera_embedding(index)[:, None, None]
        num_tokens = features.shape[2]
        return [
            (features[i], observation.image_mask[camera][:, None].expand(-1, num_tokens))
            for i, camera in enumerate(present)
        ]

    def _language_tokens(self, observation: Observation) -> tuple[Tensor, Tensor]:
        prompts = observation.prompts
        if self.config.reads_embeddings:
            if prompts.embedding_BLE is None:
                raise ValueError("this policy reads cached text embeddings, but the batch has only token ids")
            return self.language_projector(
                prompts.embedding_BLE.to(self.language_projector.weight.dtype)
            ), prompts.mask_BL
        # Gemma scales token embeddings by the root of its width; image features are not scaled.
        return self.language_model.embed_tokens(prompts.ids_BL) * self.config.text.width**0.5, prompts.mask_BL
