"""A large tokenizer cut down to the ids that a dataset's prompts use, so that training holds as many rows of its table.

Gemma's table has 257,152 rows of 2,048 numbers, more than half a billion; LIBERO's prompts use a few hundred of them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from .episodes import DataError
from .prompt import NUM_STATE_BINS, PromptStyle, prompt_text

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

BIN_CENTRES = (2 * np.arange(-1, NUM_STATE_BINS) + 1) / NUM_STATE_BINS - 1
"""States that are written as -1, 0, … 255; -1 is below the range."""
NUM_NEIGHBOURS = 32
"""State numbers beside which a template writes one."""


class CompactTokenizer:
    """A base tokenizer whose ids k_0 < k_1 < … that were kept become 0, 1, …: row r of the policy's table is the base table's row k_r.

    Exact while that table is frozen. Where it is trained, its rows stay the base table's rows k_r, and the rows that were left out keep
    their values, as they would in a run with the whole table: no prompt reads them."""

    def __init__(self, base: "Tokenizer", kept_ids: Sequence[int], style: PromptStyle) -> None:
        """`kept_ids` ascend. `style` is that of the prompts whose tokens were kept."""
        self.base = base
        self.kept_ids = tuple(kept_ids)
        self.style: PromptStyle = style
        self.vocab_size = len(self.kept_ids)
        self._row = {token: row for row, token in enumerate(self.kept_ids)}
        self.identity: Mapping[str, Any] = {
            "kind": "compact",
            "base": dict(base.identity),
            "style": style,
            "kept_ids": list(self.kept_ids),
            "vocab_size": self.vocab_size,
        }

    @classmethod
    def for_prompts(cls, base: "Tokenizer", style: PromptStyle, instructions: Iterable[str]) -> Self:
        """Keeps what any prompt of these instructions can become, padding, beginning and end. Raises `ValueError` if `base` is compact."""
        if base.identity["kind"] == "compact":
            raise ValueError("this tokenizer is compact already; leave --compact out, or give the whole one")
        kept = set(base.special_ids)
        for text in every_prompt(style, sorted(set(instructions))):
            kept.update(base.encode(text))
        return cls(base, sorted(kept), style)

    @property
    def special_ids(self) -> tuple[int, ...]:
        return tuple(self._row[token] for token in self.base.special_ids)

    def encode(self, text: str) -> list[int]:
        """Raises `DataError` for a text with a token that was not kept."""
        ids = self.base.encode(text)
        unknown = next((token for token in ids if token not in self._row), None)
        if unknown is not None:
            raise DataError(
                f"the compact token table has no row for {self.base.piece(unknown)!r} of {text!r}; write the instruction into a file and "
                f"embed again with it (vlatune embed … --compact {self.style} --texts FILE), or train with the whole table (without "
                "--compact)"
            )
        return [self._row[token] for token in ids]

    def piece(self, token_id: int) -> str:
        return self.base.piece(self.kept_ids[token_id])

    def save(self, folder: Path) -> None:
        self.base.save(folder)


def every_prompt(style: PromptStyle, instructions: Sequence[str]) -> Iterator[str]:
    """Texts that together have every token of every prompt: the bare instructions (a language keeps their ids), their prompts, and for
    `pi05` each state number first, last and beside every other, whatever pieces the tokenizer cuts them into."""
    yield from instructions
    if style != "pi05":
        for instruction in instructions:
            yield prompt_text(style, instruction, np.zeros(0))
        return
    for instruction in instructions:
        yield prompt_text(style, instruction, BIN_CENTRES)
    for centre in BIN_CENTRES:
        for first in range(0, len(BIN_CENTRES), NUM_NEIGHBOURS):
            others = BIN_CENTRES[first : first + NUM_NEIGHBOURS]
            walk = np.full(2 * len(others) + 1, centre)
            walk[1::2] = others
            yield prompt_text(style, instructions[0], walk)
