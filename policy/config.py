"""What a policy is made of, and what it is tied to; both are stored in every checkpoint and rebuild it without a recipe."""

from dataclasses import dataclass, field
from typing import Literal

from ..data.images import ImageRule
from .backbones import BackboneConfig
from .backbones.paligemma import PaliGemmaConfig
from .experts import ExpertConfig
from .experts.gemma import GemmaExpertConfig
from .objectives import ObjectiveConfig
from .objectives.flow import Flow

NormalisationMode = Literal["mean_std", "quantile", "min_max", "identity"]


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """A policy: backbone, expert, objective and how numbers are normalised."""

    backbone: BackboneConfig = field(default_factory=PaliGemmaConfig)
    expert: ExpertConfig = field(default_factory=GemmaExpertConfig)
    objective: ObjectiveConfig = field(default_factory=Flow)
    horizon: int = 10
    """Steps of an action chunk."""
    state_normalisation: NormalisationMode = "quantile"
    """How proprioception is scaled: by mean and deviation, 1 % to 99 % quantiles onto [-1, 1], extremes onto [-1, 1], or not."""
    action_normalisation: NormalisationMode = "quantile"
    """The same for actions."""
    observation_offsets: tuple[int, ...] = (0,)
    """Which observations a decision reads, in control steps relative to now."""

    def __post_init__(self) -> None:
        if len(self.observation_offsets) != self.backbone.num_observations:
            raise ValueError(
                f"policy.observation_offsets is {self.observation_offsets}, and the backbone {self.backbone.type!r} reads "
                f"{self.backbone.num_observations} observation a decision; give as many offsets"
            )


@dataclass(frozen=True, kw_only=True)
class Embodiment:
    """The data side of a policy: fixed by the cache it was trained on."""

    robot: str
    state_dim: int
    action_dim: int
    cameras: tuple[str, ...]
    image_rule: ImageRule
    """How a camera's picture is turned upright, padded and resized: the same in training and in acting."""
    vocab_size: int
    encoder_width: int | None
    """Width of the cached text embeddings; None where the cache holds none."""
