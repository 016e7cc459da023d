"""The transformer block that the language models of the backbones and the action experts on top of them share.

A block is used in two halves of one attention: a prefix computes its keys and values once, an expert's tokens attend to
them and to themselves. That is exactly joint attention, because prefix tokens never look at the expert's.

Shape letters: B batch, N own tokens, P prefix tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .norms import AdaRMSNorm, RMSNorm
from .rotary import rotate

KeysValues = tuple[Tensor, Tensor]
"""Two tensors (B, num_kv_heads, N, head_dim); the keys are already rotated to their positions."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gemma": partial(functional.gelu, approximate="tanh"),
    "llama": functional.silu,
}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of one transformer, and which family's details it has."""

    width: int
    """Features of a token."""
    depth: int
    """Layers."""
    mlp_dim: int
    """Hidden features of the feed-forward."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    """Features of a head."""
    family: Literal["gemma", "llama"] = "gemma"
    """Gemma: the feed-forward's gate is a GELU (tanh), a norm scales by 1 + weight. Llama: SiLU, and weight."""
    norm_eps: float = 1e-6
    """Added to the mean square."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads, {self.num_kv_heads}"
            )

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """(layers, key and value heads, features of a head): what a cache of keys and values looks like."""
        return self.depth, self.num_kv_heads, self.head_dim


GEMMA_2B = DecoderConfig(width=2048, depth=18, mlp_dim=16_384, num_heads=8, num_kv_heads=1, head_dim=256)
GEMMA_300M = DecoderConfig(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256)


def make_norm(config: DecoderConfig) -> RMSNorm:
    return RMSNorm(config.width, config.norm_eps, offset=1.0 if config.family == "gemma" else 0.0)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, split so that keys and values can be computed apart."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.width, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.width, bias=False)

    def heads(self, x_BND: Tensor) -> Tensor:
        """(B, N, heads * head_dim) -> (B, heads, N, head_dim)."""
        return x_BND.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def queries(self, x_BND: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        return rotate(self.heads(self.q_proj(x_BND)), angles)

    def keys_values(self, x_BND: Tensor, angles: tuple[Tensor, Tensor]) -> KeysValues:
        return rotate(self.heads(self.k_proj(x_BND)), angles), self.heads(self.v_proj(x_BND))

    def projected(self, x_BND: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, KeysValues]:
        """Queries, and keys and values, of the same tokens."""
        return self.queries(x_BND, angles), self.keys_values(x_BND, angles)

    def forward(self, queries: Tensor, keys_values: KeysValues, mask_B1NP: Tensor | None) -> Tensor:
        """Attend from `queries` to `keys_values`; `mask` is True where a query may look."""
        keys, values = keys_values
        attended = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask_B1NP, enable_gqa=queries.shape[1] != keys.shape[1]
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """The feed-forward: `down(activation(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.width, bias=False)
        self.activation = ACTIVATIONS[config.family]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class DecoderBlock(nn.Module):
    """One layer: norm, attention, norm, feed-forward. `adaptive` norms are conditioned and gate the residuals."""

    def __init__(self, config: DecoderConfig, *, adaptive: bool = False) -> None:
        super().__init__()
        self.input_layernorm = AdaRMSNorm(config.width, config.norm_eps) if adaptive else make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = AdaRMSNorm(config.width, config.norm_eps) if adaptive else make_norm(config)
        self.mlp = GatedMLP(config)

    def forward(
        self,
        x_BND: Tensor,
        angles: tuple[Tensor, Tensor],
        mask_B1NP: Tensor | None,
        *,
        prefix: KeysValues | None = None,
        modulations: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[Tensor, KeysValues]:
        """The layer's output and its own keys and values. With a `prefix`, attention runs over prefix and own tokens. `modulations` are
        those of its two norms, where they are adaptive."""
        normed_BND, gate = self.input_layernorm(x_BND, modulations[0])
        queries, own = self.self_attn.projected(normed_BND, angles)
        visible = own if prefix is None else appended(prefix, own)
        x_BND = _gated_residual(x_BND, self.self_attn(queries, visible, mask_B1NP), gate)
        normed_BND, gate = self.post_attention_layernorm(x_BND, modulations[1])
        return _gated_residual(x_BND, self.mlp(normed_BND), gate), own

    def cross(
        self, x_BND: Tensor, angles: tuple[Tensor, Tensor], keys_values: KeysValues, mask_B1NP: Tensor | None
    ) -> Tensor:
        """The layer's output where its tokens attend to `keys_values` alone."""
        queries = self.self_attn.queries(self.input_layernorm(x_BND)[0], angles)
        x_BND = x_BND + self.self_attn(queries, keys_values, mask_B1NP)
        return x_BND + self.mlp(self.post_attention_layernorm(x_BND)[0])

    def keys_values(self, x_BND: Tensor, angles: tuple[Tensor, Tensor]) -> KeysValues:
        """Only what a reader of this layer's cache needs: no queries, no output, no feed-forward."""
        return self.self_attn.keys_values(self.input_layernorm(x_BND)[0], angles)

    def output_only_modules(self) -> tuple[nn.Module, ...]:
        """What `keys_values` does without."""
        return self.self_attn.q_proj, self.self_attn.o_proj, self.post_attention_layernorm, self.mlp


def appended(prefix: KeysValues, own: KeysValues) -> KeysValues:
    """The keys and values of both, the prefix's first."""
    return torch.cat([prefix[0], own[0]], dim=2), torch.cat([prefix[1], own[1]], dim=2)


def repeated(layers_kv: tuple[KeysValues, ...], num_copies: int) -> tuple[KeysValues, ...]:
    """Row b of the batch becomes rows b * num_copies, …, b * num_copies + num_copies - 1."""
    return tuple(
        (keys.repeat_interleave(num_copies, dim=0), values.repeat_interleave(num_copies, dim=0))
        for keys, values in layers_kv
    )


def _gated_residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return x + branch if gate is None else x + branch * gate
