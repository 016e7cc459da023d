"""What every backbone is."""

from collections.abc import Collection
from typing import Protocol

from torch import Tensor, nn

from ...data.batch import Observation
from ..prefix import Prefix, PrefixShape


class BackboneSizes(Protocol):
    """What a backbone's config tells before the backbone exists."""

    @property
    def type(self) -> str: ...
    @property
    def image_px(self) -> int:
        """Side of the square images it reads."""

    @property
    def num_observations(self) -> int:
        """How many observation offsets a decision reads."""

    @property
    def reads_embeddings(self) -> bool:
        """Whether prompts must carry the text encoder's features."""


class Backbone(Protocol):
    """Observation in, `Prefix` out. A module, built as

    `PaliGemma(config, vocab_size=…, encoder_width=…, state_dim=…, cameras=…, reads=…)`: the tokenizer's size, the width of
    cached text embeddings (None: there are none), S, the cameras in order, and the one part of the prefix that the expert
    reads: a backbone computes no more than that."""

    shape: PrefixShape

    def __call__(self, observation: Observation, state_BTS: Tensor) -> Prefix:
        """`state_BTS` is the normalised state; images are uint8 as `Observation` holds them, or floats already in [-1, 1]."""

    def picture_features(self, images: Tensor) -> Tensor:
        """What its vision tower gives of each picture, before anything else of the backbone touches it: (M, px, px, 3) -> (M, N, D).
        Computed once, it can stand in for the picture (`Observation.features`), for as long as the tower stays as it is."""

    def unread_parameters(self) -> Collection[nn.Parameter]:
        """Parameters that no output depends on, or that are never trained: kept in checkpoints, without gradients."""
