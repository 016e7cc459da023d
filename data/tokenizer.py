"""Text to token ids: what a tokenizer is, those of transformers, and which one a name means.

All end or begin a text as their model was trained, and use no padding: `language.py` pads.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

from .compact_tokenizer import CompactTokenizer
from .episodes import DataError
from .files import quick_digest
from .sentencepiece_tokenizer import SentencePieceTokenizer, lone_model


class Tokenizer(Protocol):
    """Text to token ids. Id 0 may be padding or not: a mask tells real tokens."""

    vocab_size: int
    """All ids are below it."""
    identity: Mapping[str, Any]
    """JSON: what makes two tokenizers give the same ids."""

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Padding, beginning and end, where it has them; ascending."""

    def encode(self, text: str) -> list[int]: ...

    def piece(self, token_id: int) -> str:
        """What a person reads for an id."""

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` needs beside `identity`."""


class PretrainedTokenizer:
    """One that transformers' AutoTokenizer loads, by hub name (pinned to a revision) or from a local folder."""

    def __init__(self, identity: Mapping[str, Any], tokenizer: Any = None, *, folder: Path | None = None) -> None:
        self.identity = identity
        self.vocab_size: int = identity["vocab_size"]
        self._folder = folder
        if tokenizer is not None:
            self.__dict__["_tokenizer"] = tokenizer  # fills the cached property

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Raises `DataError` when neither the hub nor the disk has it."""
        tokenizer = _auto_tokenizer(name, None)
        files = sorted(Path(name).glob("*token*")) + sorted(Path(name).glob("*.model")) if Path(name).is_dir() else []
        identity = {
            "kind": "pretrained",
            "name": name,
            "revision": None if files else hub_revision(name, "tokenizer_config.json"),
            "files": {file.name: quick_digest(file) for file in files},
            "vocab_size": _num_ids(tokenizer),
        }
        return cls(identity, tokenizer)

    @property
    def special_ids(self) -> tuple[int, ...]:
        return tuple(sorted(_beginning_and_end(self._tokenizer)))

    def encode(self, text: str) -> list[int]:
        """Raises `DataError` for a text that spells out a token of another kind than text, such as PaliGemma's <image>."""
        ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        if ids and max(ids) >= self.vocab_size:
            raise DataError(f"{text!r} has {self.piece(max(ids))!r}, which stands for no text; write it in other words")
        return ids

    def piece(self, token_id: int) -> str:
        piece: str = self._tokenizer.convert_ids_to_tokens(token_id)
        return piece

    def save(self, folder: Path) -> None:
        """A local tokenizer travels along; one from the hub is pinned by its revision and fetched when a new text comes."""
        if self.identity["revision"] is None:
            self._tokenizer.save_pretrained(folder / "tokenizer")

    @cached_property
    def _tokenizer(self) -> Any:
        return _auto_tokenizer(str(self._folder or self.identity["name"]), self.identity["revision"])


def build_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """`trained` (on `texts`), a sentencepiece file or a folder with nothing else, a public tokenizer's name or folder, or the folder
    of a language (a cache's or a checkpoint's `language`): its tokenizer again."""
    if name == "trained":
        return SentencePieceTokenizer.train(texts)
    language = Path(name) / "language.json"
    if language.is_file():
        return load_tokenizer(json.loads(language.read_text())["identity"]["tokenizer"], language.parent)
    model = lone_model(Path(name))
    return PretrainedTokenizer.from_name(name) if model is None else SentencePieceTokenizer.from_file(model)


def load_tokenizer(identity: Mapping[str, Any], folder: Path) -> Tokenizer:
    """What `save` wrote. Needs no network; a tokenizer from the hub is fetched when it is first asked for a new text."""
    if identity["kind"] == "compact":
        return CompactTokenizer(load_tokenizer(identity["base"], folder), identity["kept_ids"], identity["style"])
    if identity["kind"] == "pretrained":
        saved = folder / "tokenizer"
        return PretrainedTokenizer(identity, folder=saved if saved.is_dir() else None)
    return SentencePieceTokenizer.load(identity, folder)


def hub_revision(name: str, file: str) -> str | None:
    """The commit that the hub's cache holds of `name`; None for a local folder."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    revision: str | None = extract_commit_hash(
        cached_file(name, file, _raise_exceptions_for_missing_entries=False), None
    )
    return revision


def _auto_tokenizer(name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise DataError(
            f"no tokenizer {name!r} can be loaded ({str(error).splitlines()[0]}); give a local folder, a name that the "
            "Hugging Face hub has and this machine can reach, or --tokenizer trained"
        ) from error


def _beginning_and_end(tokenizer: Any) -> set[int]:
    named = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    return named | set(tokenizer("")["input_ids"])


def _num_ids(tokenizer: Any) -> int:
    """One more than the largest id that a text can become. PaliGemma's tokenizer also has an <image>, one row beyond π0's table."""
    of_text = _beginning_and_end(tokenizer) | {tokenizer.unk_token_id}
    other = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special} - of_text
    return 1 + max(token for token in tokenizer.get_vocab().values() if token not in other)
