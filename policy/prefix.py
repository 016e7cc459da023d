"""What a backbone hands to an expert: an observation, encoded once.

Shape letters: B batch, P prefix tokens, N tokens of one kind, T observation offsets, S and A the widths of state and action
as the expert reads them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from .layers.decoder import KeysValues

PrefixPart = Literal["kv", "tokens"]
"""What an expert reads: every layer's keys and values, or the features of the last layer."""

TOKEN_KINDS = ("image", "language", "state")


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """An encoded observation. A backbone fills the parts that its expert reads; the rest stay None or empty."""

    mask_BP: Tensor | None = None
    """bool; True at prefix tokens whose keys and values may be attended to."""
    layers_kv: tuple[KeysValues, ...] | None = None
    """Per layer: keys and values (B, num_kv_heads, P, head_dim), keys rotated to their positions."""
    tokens: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """kind (one of TOKEN_KINDS) -> features (B, N, width) and mask (B, N)."""
    state_BTS: Tensor | None = None
    """Normalised proprioception, laid out as the expert reads it; set by the policy, as are the two below."""
    action_mask_BA: Tensor | None = None
    """bool; True at entries of the action vector that this robot has; where state and actions share one, entries of either."""
    control_hz_B: Tensor | None = None
    """float32; how many actions a second the robot takes."""


@dataclass(frozen=True, kw_only=True)
class PrefixShape:
    """What a backbone will hand over, known before there is a weight: experts size themselves by it."""

    kv: tuple[int, int, int] | None
    """(layers, key and value heads, features of a head) of `layers_kv`; None if the backbone writes none."""
    tokens: Mapping[str, int]
    """kind -> width of its features."""
    state_dim: int
    """S."""
