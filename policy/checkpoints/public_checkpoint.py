"""What a public checkpoint is once it is read, and what its readers share."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...data.episodes import DataError
from ...data.images import ImageRule, Orientation
from ...data.normalise import Statistics
from ...data.prompt import PromptStyle
from ..backbones.siglip import SiglipConfig
from ..config import PolicyConfig
from .renaming import Renaming

PALIGEMMA_TOKENIZER = "google/paligemma-3b-pt-224"
"""Gated: accept its licence on the hub, or give a local folder."""


@dataclass(frozen=True, kw_only=True)
class PublicOptions:
    """What a public checkpoint does not say about itself, or calls by other names."""

    cameras: tuple[str, ...] = ()
    """The robot's names for the checkpoint's cameras, in the checkpoint's order; fewer leave the last ones out. Empty: the
    checkpoint's own names."""
    orientation: Orientation = "raw"
    """How the robot's pictures are turned upright; LIBERO's need rot180."""
    tokenizer: str | None = None
    """Name or folder; None: the one that the checkpoint was trained with, from the hub."""
    statistics: Path | None = None
    """A normalisation.json or a cache's statistics.json, in place of the checkpoint's own."""
    asset_id: str | None = None
    """Which of several norm_stats.json of an openpi checkpoint."""
    prompt: PromptStyle | None = None
    """What is tokenised; openpi's π0.5 does not say (pi05, or newline for its LIBERO checkpoint)."""
    robot: str = "libero_panda"
    """The robot card's name."""
    control_hz: float = 20.0
    """Actions a second; RDT reads it."""

    vision: str = "google/siglip-so400m-patch14-384"
    """RDT's vision tower, which its checkpoint does not hold: a folder or the hub's name."""
    codec: str | None = None
    """RDT fine-tuned on LIBERO: by which of the mappings in data/unified_vector.py (libero_osc, libero_physical, libero_joints)."""
    state_slots: tuple[int, ...] = ()
    """RDT, any other robot: the places of the robot's state in the unified vector of 128."""
    action_slots: tuple[int, ...] = ()
    """The same for its actions."""


@dataclass(frozen=True, kw_only=True)
class PublicCheckpoint:
    """A public checkpoint under our names. What only acting needs may be missing: `build_policy` says so."""

    source: Path
    config: PolicyConfig
    weights: Mapping[str, Tensor]
    cameras: tuple[str, ...]
    """The checkpoint's own names; empty where it has none."""
    state_dim: int | None
    """The robot's; None where only statistics would tell."""
    action_dim: int | None
    image_rule: ImageRule
    statistics: Statistics | None
    why_no_statistics: str = ""
    """What acting would have to tell the user."""
    tokenizer: str = PALIGEMMA_TOKENIZER
    vocab_size: int = 0
    """Rows of the token table; 0 for a text encoder's tokens."""
    encoder_width: int | None = None
    vision: str | None = None
    """Where its vision tower is, if not among the weights."""


def given_statistics(options: PublicOptions) -> Statistics | None:
    return None if options.statistics is None else Statistics.load(options.statistics)


def under_our_names(table: Renaming, weights: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    ours, unknown = table.ours(weights)
    if unknown:
        raise DataError(
            f"{folder} has {len(unknown)} weights that its model does not know, the first is {min(unknown)}; it may be of another "
            "version or another model"
        )
    return ours


def siglip_sizes(sizes: Mapping[str, int]) -> SiglipConfig:
    return SiglipConfig(
        image_px=sizes["image_size"],
        patch_px=sizes["patch_size"],
        width=sizes["hidden_size"],
        mlp_dim=sizes["intermediate_size"],
        depth=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
    )


def depth_of(weights: Mapping[str, Tensor], layers: str) -> int:
    numbers = (re.match(re.escape(layers) + r"(\d+)\.", name) for name in weights)
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)
