"""SmolVLM-shaped backbone, as SmolVLA cuts it: a SigLIP tower, a pixel shuffle with one linear map, and the lower layers of
a SmolLM2 prefix over image, prompt and state tokens.

Image and prompt tokens attend to one another in both directions. The state token comes last: it sees everything before it
and nothing before sees it.

Shape letters: C cameras, B batch, N image tokens, P prefix tokens, D width."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...data.batch import Observation
from ..layers.decoder import DecoderConfig
from ..prefix import Prefix, PrefixPart, PrefixShape
from .language_model import LanguageModel, table_rows
from .siglip import SiglipConfig, camera_tokens, encode_cameras, make_vision_tower, picture_features, present_cameras

SIGLIP_BASE_512 = SiglipConfig(image_px=512, patch_px=16, width=768, mlp_dim=3072, depth=12, num_heads=12)
SMOLLM2_360M_LOWER_HALF = DecoderConfig(
    family="llama", width=960, depth=16, mlp_dim=2560, num_heads=15, num_kv_heads=5, head_dim=64, norm_eps=1e-5
)
"""SmolVLA keeps 16 of SmolVLM2-500M's 32 text layers."""


@dataclass(frozen=True, kw_only=True)
class SmolVLMConfig:
    """A SigLIP tower in front of a Llama-style prefix that ends with a state token."""

    type: Literal["smolvlm"] = "smolvlm"
    vision: SiglipConfig = SIGLIP_BASE_512
    scale_factor: int = 4
    """Side of the squares of patches that become one image token."""
    text: DecoderConfig = SMOLLM2_360M_LOWER_HALF
    vocab_size: int | None = 49_280
    """Rows of the token table, where a pretrained one is larger than the tokenizer; None: as many as the tokenizer has."""

    def __post_init__(self) -> None:
        side = self.vision.image_px // self.vision.patch_px
        if self.scale_factor < 1 or side % self.scale_factor:
            raise ValueError(
                f"backbone.scale_factor is {self.scale_factor}, and an image has {side} x {side} patches; "
                f"choose a divisor of {side}"
            )

    @property
    def image_px(self) -> int:
        return self.vision.image_px

    @property
    def num_observations(self) -> int:
        return 1

    @property
    def reads_embeddings(self) -> bool:
        return False


class SmolVLM(nn.Module):
    """See `Backbone`."""

    def __init__(
        self,
        config: SmolVLMConfig,
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
        self.shape = PrefixShape(
            kv=config.text.kv_shape, tokens=dict.fromkeys(("image", "language", "state"), width), state_dim=state_dim
        )
        # SmolVLM's tower picks position embeddings by the bucket that a patch's fractional coordinates fall into. For square
        # images of the tower's own size, with a power of two patches a side (32 here), the fractions are exact in float32
        # and every patch gets its own bucket: plain row-major order, which is what SigLIP has.
        self.vision_tower = make_vision_tower(config.vision)
        self.connector = nn.Linear(config.scale_factor**2 * config.vision.width, width, bias=False)
        self.language_model = LanguageModel(config.text, table_rows(config.vocab_size, vocab_size))
        self.state_proj = nn.Linear(state_dim, width)

    def unread_parameters(self) -> list[nn.Parameter]:
        return self.language_model.unread_parameters(self.reads)

    def picture_features(self, images: Tensor) -> Tensor:
        return picture_features(self.vision_tower, images)

    def forward(self, observation: Observation, state_BTS: Tensor) -> Prefix:
        prompts = observation.prompts
        state_B1D = self.state_proj(state_BTS[:, -1:].to(self.state_proj.weight.dtype))
        # SmolVLA scales image and language tokens by the root of the width; the state token is not scaled.
        scale = self.config.text.width**0.5
        present = present_cameras(observation, self.cameras)
        patches = encode_cameras(self.vision_tower, observation, present)
        image_CBND = self.connector(merge_patches(patches, self.config.scale_factor)) * scale
        parts = {
            "image": camera_tokens(image_CBND, observation, present),
            "language": (self.language_model.embed_tokens(prompts.ids_BL) * scale, prompts.mask_BL),
            "state": (state_B1D, torch.ones_like(state_B1D[..., 0], dtype=torch.bool)),
        }
        return self.language_model.prefix(parts, self.reads, self.attention_mask)

    @staticmethod
    def attention_mask(mask_BP: Tensor) -> Tensor:
        """Validity of the prefix tokens, the state's last -> (B, 1, P, P), True where a query (row) sees a key (column)."""
        is_state_P = torch.arange(mask_BP.shape[1], device=mask_BP.device) == mask_BP.shape[1] - 1
        visible_PP = is_state_P[:, None] | ~is_state_P
        return mask_BP[:, None, None, :] & visible_PP


def merge_patches(patches: Tensor, factor: int) -> Tensor:
    """Idefics3's pixel shuffle: (…, side * side, D) -> (…, (side / factor)**2, factor**2 * D).

    Both are row-major; a merged token holds its square's features patch after patch, row-major too."""
    side = math.isqrt(patches.shape[-2]) // factor
    squares = patches.unflatten(-2, (side, factor, side, factor)).transpose(-4, -3)
    return squares.flatten(-3).flatten(-3, -2)
