"""Instructions as policies read them: token ids and, where a policy wants them, a text encoder's features.

A `Language` is a tokenizer, an optional encoder and a table of the instructions that were known when it was made. Its folder is
part of the cache, or stands beside it (`embed.py`), and is copied into every checkpoint; reading it needs neither pickle nor
a network. New texts are tokenised as they come.

    language.json        the identity of tokenizer and encoder, the texts, and the table's checksum
    table.safetensors    every text's ids and features; with an encoder also those of the empty text, which stands for an instruction
                         that training hides (`condition_dropout.py`)
    tokenizer.model      or tokenizer/: the tokenizer, unless the hub has it

Shape letters: B batch, L tokens, E encoder width.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .batch import Prompts
from .compact_tokenizer import CompactTokenizer
from .episodes import DataError
from .files import json_bytes, write_whole
from .prompt import PromptStyle
from .text_encoder import TextEncoder, build_encoder, load_encoder
from .tokenizer import Tokenizer, build_tokenizer, load_tokenizer

FORMAT_VERSION = 1
MAX_NEW_TEXTS = 256
"""Encoded texts that are kept beside those of the table, the latest: a server meets ever new ones."""
EMPTY_TEXT = ""
"""No instruction is blank, so that it can stand for one that training hides."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One text."""

    ids_L: Tensor
    """int64."""
    embedding_LE: Tensor | None
    """The encoder's output in its dtype; None where it has not been computed."""


def check_available(tokenizer: str, encoder: str) -> None:
    """Raises `DataError` if `Language.build` could not reach one of them; loads no encoder weights."""
    build_encoder(encoder, tokenizer, build_tokenizer(tokenizer, ["a text"]).vocab_size)


def distinct_texts(texts: Iterable[str]) -> list[str]:
    """In order, each once. Raises `DataError` if one is blank, or there is none."""
    distinct = sorted(set(texts))
    if not distinct or any(not text.strip() for text in distinct):
        raise DataError("an instruction is blank (or there is none at all); every episode needs a text")
    return distinct


class Language:
    """Tokenizer, encoder and the table of known texts."""

    def __init__(self, tokenizer: Tokenizer, encoder: TextEncoder | None, table: Mapping[str, Entry]) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._table = dict(table)
        self.table_texts: tuple[str, ...] = tuple(table)
        self.known_texts: tuple[str, ...] = tuple(text for text in table if text != EMPTY_TEXT)
        """The instructions in it."""

    @classmethod
    def build(cls, texts: Sequence[str], tokenizer: str = "trained", encoder: str = "seeded-t5") -> Self:
        """Tokenise and encode the distinct `texts`; their order does not matter.

        `tokenizer`: `trained` (sentencepiece, on these texts) or what AutoTokenizer loads by name or folder. `encoder`:
        `seeded-t5` (small, random, recorded), `none`, or a T5 by name or folder. Raises `DataError` when a text is blank or
        something cannot be reached."""
        distinct = distinct_texts(texts)
        ids = build_tokenizer(tokenizer, distinct)
        features = build_encoder(encoder, tokenizer, ids.vocab_size)
        language = cls(ids, features, {})
        if features is None:
            return language.with_texts(distinct)
        texts = language.texts_to_keep(distinct)
        return language.with_texts(texts, features.encode_each([ids.encode(text) for text in texts]))

    def texts_to_keep(self, instructions: Sequence[str]) -> list[str]:
        """What its table is to hold: with an encoder the empty text, too, if that has a token (as T5's end of text) to be encoded."""
        if self._encoder is None or not self._tokenizer.encode(EMPTY_TEXT):
            return list(instructions)
        return [*instructions, EMPTY_TEXT]

    def with_texts(self, texts: Sequence[str], embeddings: Iterable[Tensor] | None = None) -> Self:
        """The same tokenizer and encoder with these texts as its table. `embeddings`: (L, E) each, what the encoder gives for them; None
        without an encoder. Raises `ValueError` if one is not as long as its text."""
        if (embeddings is None) != (self._encoder is None):
            raise ValueError("a language has embeddings of its texts if it has an encoder, and none otherwise")
        each: Iterable[Tensor | None] = [None] * len(texts) if embeddings is None else embeddings
        entries: dict[str, Entry] = {}
        for text, embedding_LE in zip(texts, each, strict=True):
            entry = self._tokenised(text)
            if embedding_LE is not None and len(embedding_LE) != len(entry.ids_L):
                raise ValueError(f"{text!r} has {len(entry.ids_L)} tokens and features of {len(embedding_LE)}")
            entries[text] = Entry(ids_L=entry.ids_L, embedding_LE=embedding_LE)
        return type(self)(self._tokenizer, self._encoder, entries)

    @classmethod
    def without_texts(cls, tokenizer: str, encoder: str = "none") -> Self:
        """A public tokenizer (and T5), for texts that are not known yet. Raises `DataError` when one cannot be reached."""
        ids = build_tokenizer(tokenizer, ())
        return cls(ids, build_encoder(encoder, tokenizer, ids.vocab_size), {})

    @property
    def identity(self) -> dict[str, Any]:
        """JSON: what makes two languages give the same ids and features for any text."""
        return {
            "tokenizer": dict(self._tokenizer.identity),
            "encoder": None if self._encoder is None else dict(self._encoder.identity),
        }

    @property
    def tokenizer_name(self) -> str | None:
        """A public tokenizer's name or folder; None for one that was trained on the instructions, a sentencepiece file, a compact one."""
        name: str | None = self._tokenizer.identity.get("name")
        return name

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    @property
    def kept_ids(self) -> tuple[int, ...] | None:
        """Rows of the base tokenizer's table that a policy's table has, ascending: its row r is their kept_ids[r]. None: all, in order."""
        return self._tokenizer.kept_ids if isinstance(self._tokenizer, CompactTokenizer) else None

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """Of each known text."""
        return tuple(len(self._table[text].ids_L) for text in self.known_texts)

    def pieces(self, text: str) -> list[str]:
        """What `text` becomes, for a person."""
        return [self._tokenizer.piece(token) for token in self._tokenizer.encode(text)]

    def check_covers(self, instructions: Iterable[str], *, prompt: PromptStyle, folder: Path, cache: Path) -> None:
        """Raises `DataError` unless every instruction of the `cache` is in this language's table (that of `folder`), and it was made for
        prompts of this style."""
        missing = [text for text in dict.fromkeys(instructions) if text not in self._table]
        again = f"make it again: rm -r {folder} && vlatune embed {cache} --out {folder} {self._options()}"
        if missing:
            raise DataError(
                f"the language {folder} lacks {missing[0]!r}, an instruction of {cache} ({len(missing)} missing in all; it has "
                f"{len(self.known_texts)} texts), so a text was changed or added since; {again}"
            )
        if isinstance(self._tokenizer, CompactTokenizer) and self._tokenizer.style != prompt:
            raise DataError(
                f"the language {folder} keeps the tokens of {self._tokenizer.style!r} prompts, and this policy's are {prompt!r}; "
                f"{again.replace(f'--compact {self._tokenizer.style}', f'--compact {prompt}')}"
            )

    @property
    def empty_text(self) -> Prompts | None:
        """Tokens and features of the empty text, one row and unpadded; None where the table lacks it: it has no encoder, or is older."""
        entry = self._table.get(EMPTY_TEXT)
        if entry is None or entry.embedding_LE is None:
            return None
        return Prompts(
            ids_BL=entry.ids_L[None],
            mask_BL=torch.ones(1, len(entry.ids_L), dtype=torch.bool),
            embedding_BLE=entry.embedding_LE.float()[None],
        )

    def check_has_empty_text(self, *, folder: Path, cache: Path) -> None:
        """Raises `DataError` if there is an encoder, and the table (that of `folder`, for `cache`) lacks the empty text's features."""
        if self._encoder is None or self.empty_text is not None:
            return
        if not self.texts_to_keep(()):
            raise DataError(
                f"the tokenizer of {folder} makes no token of an empty text, so that nothing can stand for a hidden instruction; type vlatune "
                f"embed {cache} with a T5 as --tokenizer and --encoder, or set conditions.dropout to 0"
            )
        raise DataError(
            f"the language {folder} was made before the features of the empty text were kept, which stand for a hidden instruction; type "
            f"vlatune embed {cache} --out LANGUAGE {self._options()} and train with --language LANGUAGE, delete the cache and "
            "prepare it again, or set conditions.dropout to 0"
        )

    def _options(self) -> str:
        """What `vlatune embed` was told."""
        tokenizer, options = self.identity["tokenizer"], ""
        if tokenizer["kind"] == "compact":
            tokenizer, options = tokenizer["base"], f" --compact {tokenizer['style']}"
        name = {"trained": "trained", "sentencepiece": "FILE.model"}.get(tokenizer["kind"]) or tokenizer["name"]
        encoder = self.identity["encoder"]
        if encoder is None:
            return f"--tokenizer {name} --encoder none{options}"
        if encoder["kind"] == "seeded-t5":
            return f"--tokenizer {name} --encoder seeded-t5{options}"
        return f"--tokenizer {name} --encoder {encoder['name']} --dtype {encoder['dtype']}{options}"

    @property
    def embedding_width(self) -> int | None:
        """E; None without an encoder."""
        return None if self._encoder is None else self._encoder.width

    def prompts(self, texts: Sequence[str], *, embeddings: bool = False, bucket: int = 8) -> Prompts:
        """Tokenised `texts`, padded on the right to a multiple of `bucket` tokens.

        Unknown texts are tokenised (and, with `embeddings`, encoded) on the spot. Raises `ValueError` without texts or
        when `embeddings` are asked of a language without an encoder, and `DataError` when a text is blank, or its encoder
        cannot be reached or rebuilt."""
        if not texts or bucket < 1:
            raise ValueError(f"{len(texts)} texts and a bucket of {bucket}; there must be at least one of each")
        if embeddings and self._encoder is None:
            raise ValueError(
                "this language has no text encoder; prepare the cache again with --encoder seeded-t5 or a T5"
            )
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        entries = [self._entry(text, embedded=embeddings) for text in rows]
        longest = max(len(entry.ids_L) for entry in entries)
        padded = -(-longest // bucket) * bucket
        ids_RL = torch.zeros(len(rows), padded, dtype=torch.int64)  # R distinct texts
        mask_RL = torch.zeros(len(rows), padded, dtype=torch.bool)
        for row, entry in enumerate(entries):
            ids_RL[row, : len(entry.ids_L)] = entry.ids_L
            mask_RL[row, : len(entry.ids_L)] = True
        row_B = torch.tensor([rows[text] for text in texts])
        embedding_BLE = None
        if embeddings:
            embedding_RLE = torch.zeros(len(rows), padded, self.embedding_width or 0)
            for row, entry in enumerate(entries):
                assert entry.embedding_LE is not None  # _entry saw to it
                embedding_RLE[row, : len(entry.ids_L)] = entry.embedding_LE.float()
            embedding_BLE = embedding_RLE[row_B]
        return Prompts(ids_BL=ids_RL[row_B], mask_BL=mask_RL[row_B], embedding_BLE=embedding_BLE)

    def save(self, folder: Path) -> None:
        """`language.json` (last), `table.safetensors` and the tokenizer's files. Equal languages give equal bytes."""
        from safetensors.torch import save

        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(folder)
        known = [self._table[text] for text in self.table_texts]
        tensors = {"ids": torch.cat([torch.empty(0, dtype=torch.int64), *(entry.ids_L for entry in known)])}
        if self._encoder is not None and known:
            tensors["embeddings"] = torch.cat([e.embedding_LE for e in known if e.embedding_LE is not None])
        table = save(tensors)
        write_whole(folder / "table.safetensors", table)
        index = {
            "format_version": FORMAT_VERSION,
            "identity": self.identity,
            "texts": [
                {"text": text, "num_tokens": len(entry.ids_L)}
                for text, entry in zip(self.table_texts, known, strict=True)
            ],
            "table_sha256": hashlib.sha256(table).hexdigest(),
        }
        write_whole(folder / "language.json", json_bytes(index))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What `save` wrote; raises `DataError` when it is missing or of another format version."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            index = json.loads((folder / "language.json").read_text())
            if index["format_version"] != FORMAT_VERSION:
                raise DataError(
                    f"{folder} has language format {index['format_version']}, this vlatune reads {FORMAT_VERSION}; make it again"
                )
            stored = (folder / "table.safetensors").read_bytes()
            sha256 = hashlib.sha256(stored).hexdigest()
            if index.get("table_sha256", sha256) != sha256:  # older folders have none
                raise DataError(
                    f"{folder}/table.safetensors was altered: its sha256 is not the recorded one; copy it again"
                )
            tensors = load(stored)
            lengths = [text["num_tokens"] for text in index["texts"]]
            ids = torch.split(tensors["ids"], lengths)
            features = torch.split(tensors["embeddings"], lengths) if "embeddings" in tensors else [None] * len(lengths)
            table = {
                text["text"]: Entry(ids_L=ids_L, embedding_LE=embedding_LE)
                for text, ids_L, embedding_LE in zip(index["texts"], ids, features, strict=True)
            }
            tokenizer, encoder = index["identity"]["tokenizer"], index["identity"]["encoder"]
            return cls(load_tokenizer(tokenizer, folder), load_encoder(encoder), table)
        except (FileNotFoundError, NotADirectoryError) as error:
            missing = Path(error.filename).name
            raise DataError(f"there is no whole language in {folder} (no {missing}); copy the whole folder") from None
        except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise DataError(f"the language in {folder} is damaged ({error!r}); copy the whole folder again") from error

    def _entry(self, text: str, *, embedded: bool) -> Entry:
        if not text.strip():
            raise DataError("an instruction is blank; give a text")
        entry = self._table.get(text)
        if entry is None:
            entry = self._tokenised(text)
        if embedded and entry.embedding_LE is None:
            assert self._encoder is not None  # `prompts` saw to it
            entry = Entry(ids_L=entry.ids_L, embedding_LE=next(self._encoder.encode_each([entry.ids_L.tolist()])))
            self._table[text] = entry  # costly; a tokenised text is cheap, and with the state in it never comes again
            if len(self._table) > len(self.table_texts) + MAX_NEW_TEXTS:
                del self._table[next(itertools.islice(self._table, len(self.table_texts), None))]
        return entry

    def _tokenised(self, text: str) -> Entry:
        return Entry(ids_L=torch.from_numpy(np.array(self._tokenizer.encode(text), np.int64)), embedding_LE=None)
