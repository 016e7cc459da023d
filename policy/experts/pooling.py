"""A prefix's tokens as one vector, for experts that take their condition whole.

Shape letters: B batch, N tokens of one kind, P tokens of all kinds, C features of the condition, S state.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..prefix import Prefix, PrefixShape

PoolingKind = Literal["average", "attention", "typed_attention"]


@dataclass(frozen=True, kw_only=True)
class PoolingConfig:
    """How image, language and state tokens become one condition."""

    kind: PoolingKind = "attention"
    """The mean of all tokens, in which a lone state token weighs as little as one patch; attention of a learned query; the
    same after adding a learned vector per kind of token."""
    width: int = 512
    """Features of the condition."""
    num_heads: int = 8
    """Heads of the attention: so many looks at the tokens."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"pooling.width is {self.width}; it must be a multiple of num_heads, {self.num_heads}")


def read_tokens(prefix: Prefix, kinds: Collection[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """kind -> layer-normed features (B, N, width), zero where masked, and mask (B, N).

    Without the norm the hidden states of a language model, tens of times larger than a projected state, would drown it and
    saturate an attention. It has no weights: a learned shift would be one vector per kind. Its statistics are torch's, float32
    for any dtype. Raises ValueError if there is no kind, or the prefix lacks one."""
    missing = [kind for kind in kinds if kind not in prefix.tokens]
    if missing or not kinds:
        named = f"{missing[0]} tokens" if missing else "tokens"
        raise ValueError(
            f"this expert reads {named}, and the backbone hands over none; choose a backbone that does: paligemma or clip"
        )
    tokens = {}
    for kind in kinds:
        features_BND, mask_BN = prefix.tokens[kind]
        normed_BND = functional.layer_norm(features_BND, features_BND.shape[-1:])
        tokens[kind] = (normed_BND.masked_fill(~mask_BN[..., None], 0.0), mask_BN)
    return tokens


def newest_state(prefix: Prefix) -> Tensor:
    """(B, S); raises ValueError if the prefix carries no proprioception."""
    if prefix.state_BTS is None:
        raise ValueError("this expert reads proprioception, and the prefix carries none")
    return prefix.state_BTS[:, -1]


class TokenPooling(nn.Module):
    """`Prefix` -> condition. Where the backbone has no state token, the newest state is projected to one here.

    The projections have no bias: it would be the learned vector per kind that sets typed attention apart."""

    def __init__(self, config: PoolingConfig, prefix: PrefixShape) -> None:
        super().__init__()
        self.config = config
        self.kinds = tuple(prefix.tokens)
        widths = {"state": prefix.state_dim, **prefix.tokens}
        self.projections = nn.ModuleDict(
            {kind: nn.Linear(width, config.width, bias=False) for kind, width in widths.items()}
        )
        if config.kind == "average":
            return
        # Vectors rather than tables of one row: the optimizer decays what has two dimensions.
        self.query = nn.Parameter(torch.randn(config.width))
        self.k_proj = nn.Linear(config.width, config.width, bias=False)
        self.v_proj = nn.Linear(config.width, config.width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width)
        if config.kind == "typed_attention":
            self.kind_vectors = nn.ParameterDict(
                {kind: nn.Parameter(0.1 * torch.randn(config.width)) for kind in widths}
            )

    def forward(self, prefix: Prefix) -> Tensor:
        """(B, C) in the parameters' dtype; raises ValueError if the prefix lacks what is read."""
        tokens = read_tokens(prefix, self.kinds)
        if "state" not in tokens:
            state_B1S = newest_state(prefix)[:, None]
            tokens["state"] = (state_B1S, torch.ones_like(state_B1S[..., 0], dtype=torch.bool))
        dtype = next(self.parameters()).dtype
        mask_BP = torch.cat([mask for _, mask in tokens.values()], dim=1)
        projected = {kind: self.projections[kind](features.to(dtype)) for kind, (features, _) in tokens.items()}
        if self.config.kind == "average":
            # Masked tokens are zero, and projections without a bias keep them so.
            sum_BC = torch.cat(list(projected.values()), dim=1).sum(dim=1, dtype=torch.float32)
            return (sum_BC / mask_BP.sum(dim=1, keepdim=True)).to(dtype)
        if self.config.kind == "typed_attention":
            projected = {kind: x_BNC + self.kind_vectors[kind] for kind, x_BNC in projected.items()}
        return self._attended(torch.cat(list(projected.values()), dim=1), mask_BP)

    def _attended(self, x_BPC: Tensor, mask_BP: Tensor) -> Tensor:
        num_heads = self.config.num_heads

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

        queries = heads(self.query.expand(x_BPC.shape[0], 1, -1))
        attended = functional.scaled_dot_product_attention(
            queries, heads(self.k_proj(x_BPC)), heads(self.v_proj(x_BPC)), attn_mask=mask_BP[:, None, None]
        )
        condition_BC: Tensor = self.o_proj(attended.flatten(1))
        return condition_BC
