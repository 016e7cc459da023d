"""The decoder behind PaliGemma and SmolVLM: tokens of all kinds in, a `Prefix` out.

Where the expert reads keys and values, layer by layer, the last layer computes only those: its queries, output and feed-forward
(and the final norm) have no reader and stay frozen. An expert that reads the last layer's features keeps them alive.

Shape letters: B batch, N tokens of one kind, P prefix tokens of all kinds, D width."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..layers.decoder import DecoderBlock, DecoderConfig, KeysValues, make_norm
from ..layers.rotary import rotary_angles
from ..prefix import Prefix, PrefixPart


def bidirectional_mask(mask_BP: Tensor) -> Tensor:
    """Every token sees every valid one: (B, 1, P, P) without its memory."""
    return mask_BP[:, None, None, :].expand(-1, 1, mask_BP.shape[1], -1)


def table_rows(configured: int | None, tokenizer_size: int) -> int:
    """Rows of the token table. Raises ValueError if the tokenizer has more."""
    if configured is not None and configured < tokenizer_size:
        raise ValueError(
            f"the tokenizer has {tokenizer_size} tokens and policy.backbone.vocab_size is {configured}; prepare the cache with the "
            "tokenizer of these weights (--tokenizer), or give a larger table"
        )
    return configured or tokenizer_size


class LanguageModel(nn.Module):
    """A decoder without its vocabulary head: token table, layers, final norm."""

    def __init__(self, config: DecoderConfig, vocab_size: int | None) -> None:
        """Without a `vocab_size` it has no token table."""
        super().__init__()
        self.head_dim = config.head_dim
        if vocab_size is not None:
            self.embed_tokens = nn.Embedding(vocab_size, config.width)
            nn.init.normal_(self.embed_tokens.weight, std=config.width**-0.5)
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.norm = make_norm(config)

    def prefix(
        self,
        tokens: Mapping[str, tuple[Tensor, Tensor]],
        reads: PrefixPart,
        attention_mask: Callable[[Tensor], Tensor] = bidirectional_mask,
    ) -> Prefix:
        """`tokens`: kind -> features (B, N, D) and mask (B, N), in the order of the prefix. `attention_mask` turns the whole mask
        (B, P) into (B, 1, P, P), True where a query (row) sees a key (column)."""
        lengths = [mask.shape[1] for _, mask in tokens.values()]
        x_BPD = torch.cat([features for features, _ in tokens.values()], dim=1)
        mask_BP = torch.cat([mask for _, mask in tokens.values()], dim=1)
        angles = rotary_angles(mask_BP.cumsum(-1) - 1, self.head_dim)
        mask_B1PP = attention_mask(mask_BP)
        if reads == "kv":
            return Prefix(mask_BP=mask_BP, layers_kv=self._layers_kv(x_BPD, angles, mask_B1PP))
        for block in self.layers:
            x_BPD, _ = block(x_BPD, angles, mask_B1PP)
        by_kind = self.norm(x_BPD)[0].split(lengths, dim=1)
        return Prefix(
            tokens={kind: (features, mask) for (kind, (_, mask)), features in zip(tokens.items(), by_kind, strict=True)}
        )

    def _layers_kv(self, x_BPD: Tensor, angles: tuple[Tensor, Tensor], mask_B1PP: Tensor) -> tuple[KeysValues, ...]:
        layers_kv = []
        for block in self.layers[:-1]:
            x_BPD, keys_values = block(x_BPD, angles, mask_B1PP)
            layers_kv.append(keys_values)
        return (*layers_kv, self._last.keys_values(x_BPD, angles))

    def unread_parameters(self, reads: PrefixPart) -> list[nn.Parameter]:
        """What has no reader where only keys and values are read."""
        if reads == "tokens":
            return []
        unread = (*self._last.output_only_modules(), self.norm)
        return [parameter for module in unread for parameter in module.parameters()]

    @property
    def _last(self) -> DecoderBlock:
        last = self.layers[-1]
        assert isinstance(last, DecoderBlock)
        return last
