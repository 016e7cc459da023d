"""RDT-1B's backbone: SigLIP's features of a short image history, and cached T5 features; no layer of its own.

Every observation offset has the same slots for cameras, in RDT's order: outside, right wrist, left wrist. What is missing, a
camera or a moment before the episode's start, is a grey picture, so that every sample has the same tokens.

Shape letters: B batch, T observation offsets, C cameras of the batch, N tokens of an image, D width.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ...data.batch import Observation
from ..prefix import Prefix, PrefixPart, PrefixShape
from .siglip import SiglipConfig, make_vision_tower, picture_features, present_cameras

BACKGROUND = 127
"""Grey value of a missing picture: int(0.5 * 255)."""


@dataclass(frozen=True, kw_only=True)
class SiglipT5Config:
    """A SigLIP tower over the images of the last observations, beside cached T5 features of the instruction."""

    type: Literal["siglip_t5"] = "siglip_t5"
    vision: SiglipConfig = field(default_factory=lambda: SiglipConfig(image_px=384))
    num_history: int = 2
    """Observations that a decision reads."""
    num_camera_slots: int = 3
    """Pictures of an observation; slots beyond the robot's cameras are grey."""
    train_vision: bool = False
    """Whether the tower is trained; RDT's is not."""

    @property
    def image_px(self) -> int:
        return self.vision.image_px

    @property
    def num_observations(self) -> int:
        return self.num_history

    @property
    def reads_embeddings(self) -> bool:
        return True


class SiglipT5(nn.Module):
    """See `Backbone`."""

    def __init__(
        self,
        config: SiglipT5Config,
        *,
        vocab_size: int,
        encoder_width: int | None,
        state_dim: int,
        cameras: tuple[str, ...],
        reads: PrefixPart,
    ) -> None:
        super().__init__()
        if reads == "kv":
            raise ValueError(
                "the backbone 'siglip_t5' has no layers whose keys and values could be read; choose an expert that reads "
                "tokens, such as 'dit'"
            )
        if encoder_width is None:
            raise ValueError(
                "the backbone 'siglip_t5' reads cached text embeddings but the cache holds none; prepare it with --encoder"
            )
        if len(cameras) > config.num_camera_slots:
            raise ValueError(
                f"the robot has {len(cameras)} cameras, {', '.join(cameras)}, but backbone.num_camera_slots is "
                f"{config.num_camera_slots}; prepare with fewer cameras"
            )
        self.config = config
        self.cameras = cameras
        self.shape = PrefixShape(
            kv=None, tokens={"image": config.vision.width, "language": encoder_width}, state_dim=state_dim
        )
        self.vision_tower = make_vision_tower(config.vision)

    def unread_parameters(self) -> list[nn.Parameter]:
        return [] if self.config.train_vision else list(self.vision_tower.parameters())

    def picture_features(self, images: Tensor) -> Tensor:
        return picture_features(self.vision_tower, images)

    def forward(self, observation: Observation, state_BTS: Tensor) -> Prefix:
        prompts = observation.prompts
        if prompts.embedding_BLE is None:
            raise ValueError("this policy reads cached text embeddings, but the batch has only token ids")
        return Prefix(
            tokens={
                "image": self._image_tokens(observation),
                "language": (prompts.embedding_BLE, prompts.mask_BL),
            }
        )

    def _image_tokens(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Features (B, T * slots * N, D), the oldest observation's slots first, and a mask that is True everywhere."""
        present = present_cameras(observation, self.cameras)
        batch, num_offsets = observation.image_mask[present[0]].shape
        if num_offsets != self.config.num_history:
            raise ValueError(
                f"the observation has {num_offsets} offsets, but backbone.num_history is {self.config.num_history}; "
                "give policy.observation_offsets as many"
            )
        seen_BTCND, empty_ND = self._seen(observation, present)
        empty_BTND = empty_ND.expand(batch, num_offsets, -1, -1)
        slots = [
            seen_BTCND[:, :, present.index(camera)] if camera in present else empty_BTND for camera in self.cameras
        ]
        slots += [empty_BTND] * (self.config.num_camera_slots - len(self.cameras))
        tokens_BND = torch.stack(slots, dim=2).flatten(1, 3)
        return tokens_BND, torch.ones_like(tokens_BND[..., 0], dtype=torch.bool)

    def _seen(self, observation: Observation, present: list[str]) -> tuple[Tensor, Tensor]:
        """Features of what the present cameras see, (B, T, C, N, D), and of an empty slot (where none is empty: any), (N, D)."""
        image_px = self.config.image_px
        masks_BT = [observation.image_mask[camera] for camera in present]
        grey = torch.full((image_px, image_px, 3), BACKGROUND, dtype=torch.uint8, device=masks_BT[0].device)
        if observation.features is not None:
            grey_ND = self.picture_features(grey[None])[0]
            features = [observation.features[camera] for camera in present]
            shown = [torch.where(m[..., None, None], f, grey_ND) for m, f in zip(masks_BT, features, strict=True)]
            return torch.stack(shown, dim=2), grey_ND
        images = [observation.images[camera] for camera in present]
        if images[0].is_floating_point():
            grey = grey.to(images[0].dtype) / 127.5 - 1
        shown = [torch.where(m[..., None, None, None], i, grey) for m, i in zip(masks_BT, images, strict=True)]
        pictures = torch.stack(shown, dim=2)
        is_one_empty = len(present) < self.config.num_camera_slots
        # One picture stands for all empty slots.
        rows = torch.cat([pictures.flatten(0, 2), grey[None]]) if is_one_empty else pictures.flatten(0, 2)
        features_MND = self.picture_features(rows)
        seen_BTCND = features_MND[: len(features_MND) - is_one_empty].unflatten(0, pictures.shape[:3])
        return seen_BTCND, features_MND[-1]
