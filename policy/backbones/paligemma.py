"""PaliGemma-shaped backbone: a SigLIP tower, a linear projector and a Gemma prefix over image and prompt tokens.

From the sizes of PaliGemma-2B down to a few hundred thousand parameters it is the same code. Prefix tokens attend to one
another in both directions.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ...data.batch import Observation
from ..layers.decoder import GEMMA_2B, DecoderConfig
from ..prefix import Prefix, PrefixPart, PrefixShape
from .language_model import LanguageModel, table_rows
from .siglip import SiglipConfig, camera_tokens, encode_cameras, make_vision_tower, picture_features, present_cameras


@dataclass(frozen=True, kw_only=True)
class PaliGemmaConfig:
    """A SigLIP tower in front of a Gemma prefix."""

    type: Literal["paligemma"] = "paligemma"
    vision: SiglipConfig = field(default_factory=SiglipConfig)
    text: DecoderConfig = GEMMA_2B
    vocab_size: int | None = None
    """Rows of the token table, where a pretrained one is larger than the tokenizer; None: as many as the tokenizer has."""
    language: Literal["tokens", "encoder"] = "tokens"
    """What the prefix reads of the instruction: token ids through its own table, or the cached text-encoder embedding."""
    state: Literal["token", "none"] = "none"
    """Whether proprioception enters the prefix, as one linear token."""
    camera_embedding: bool = False
    """A learned vector per camera; public checkpoints have none."""

    @property
    def image_px(self) -> int:
        return self.vision.image_px

    @property
    def num_observations(self) -> int:
        return 1

    @property
    def reads_embeddings(self) -> bool:
        return self.language == "encoder"


class PaliGemma(nn.Module):
    """See `Backbone`."""

    def __init__(
        self,
        config: PaliGemmaConfig,
        *,
        vocab_size: int,
        encoder_width: int | None,
        state_dim: int,
        cameras: tuple[str, ...],
        reads: PrefixPart,
    ) -> None:
        super().__init__()
        self.config = config
        self.cameras = cameras
        self.reads = reads
        width = config.text.width
        kinds = ("image", "language", "state") if config.state == "token" else ("image", "language")
        self.shape = PrefixShape(kv=config.text.kv_shape, tokens=dict.fromkeys(kinds, width), state_dim=state_dim)
        self.vision_tower = make_vision_tower(config.vision)
        self.multi_modal_projector = nn.Linear(config.vision.width, width)
        rows = table_rows(config.vocab_size, vocab_size) if config.language == "tokens" else None
        self.language_model = LanguageModel(config.text, rows)
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
        return self.language_model.unread_parameters(self.reads)

    def picture_features(self, images: Tensor) -> Tensor:
        return picture_features(self.vision_tower, images)

    def forward(self, observation: Observation, state_BTS: Tensor) -> Prefix:
        parts = {"image": self._image_tokens(observation), "language": self._language_tokens(observation)}
        if self.config.state == "token":
            token_B1D = self.state_proj(state_BTS[:, -1:].to(self.state_proj.weight.dtype))
            parts["state"] = (token_B1D, torch.ones_like(token_B1D[..., 0], dtype=torch.bool))
        return self.language_model.prefix(parts, self.reads)

    def _image_tokens(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Features (B, C * N, D) and mask of all present cameras."""
        present = present_cameras(observation, self.cameras)
        features_CBND = self.multi_modal_projector(encode_cameras(self.vision_tower, observation, present))
        if self.config.camera_embedding:
            # Row by row: an index made here would be copied to the device, which a CUDA graph cannot hold.
            rows_CD = torch.stack([self.camera_embedding.weight[self.cameras.index(camera)] for camera in present])
            features_CBND = features_CBND + rows_CD[:, None, None]
        return camera_tokens(features_CBND, observation, present)

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
