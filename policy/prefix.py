"""What a backbone hands to an expert: an observation, encoded once."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .layers.gemma import KeysValues


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """An encoded observation. A backbone fills the parts that the bound expert reads; the rest stay None or empty."""

    mask_BP: Tensor
    """bool; True at prefix tokens that may be attended to."""
    layers_kv: tuple[KeysValues, ...] | None = None
    """Per layer: keys and values (B, num_kv_heads, P, head_dim), keys rotated to their positions."""
    tokens: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """kind (`image`, `language`, `state`) -> features (B, N, width) and mask (B, N)."""
    state_BTS: Tensor | None = None
    """Normalised proprioception."""
