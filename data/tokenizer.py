"""Text to token ids: a sentencepiece model trained on the instructions at hand, or any public tokenizer.

Both end a text with their end-of-sequence token where they have one, and use no padding: `language.py` pads.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

from .episodes import DataError
from .files import quick_digest, write_whole

MAX_TRAINED_VOCABULARY = 2048
"""Upper bound; a few dozen instructions give about 350 pieces, 256 of them the bytes that any other text falls back to."""


class Tokenizer(Protocol):
    """Text to token ids. Id 0 may be padding or not: a mask tells real tokens."""

    vocab_size: int
    identity: Mapping[str, Any]
    """JSON: what makes two tokenizers give the same ids."""

    def encode(self, text: str) -> list[int]: ...

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` needs beside `identity`."""


class TrainedTokenizer:
    """A sentencepiece BPE model (pad 0, end 1, unknown 2, then 256 bytes) trained on the instructions: deterministic."""

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.vocab_size()
        self.identity: Mapping[str, Any] = {
            "kind": "trained",
            "vocab_size": self.vocab_size,
            "sentencepiece_sha256": hashlib.sha256(model).hexdigest(),
        }

    @classmethod
    def train(cls, texts: Iterable[str]) -> Self:
        """The same texts, in any order, give the same bytes."""
        import sentencepiece

        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sorted(set(texts))),
            model_writer=model,
            model_type="bpe",  # whole words from a handful of sentences, where unigram keeps single letters
            vocab_size=MAX_TRAINED_VOCABULARY,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",  # the NFKC table alone would be 240 KB in every checkpoint
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text, add_eos=True)
        return ids

    def save(self, folder: Path) -> None:
        write_whole(folder / "tokenizer.model", self._model)


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
            "vocab_size": len(tokenizer),
        }
        return cls(identity, tokenizer)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def save(self, folder: Path) -> None:
        """A local tokenizer travels along; one from the hub is pinned by its revision and fetched when a new text comes."""
        if self.identity["revision"] is None:
            self._tokenizer.save_pretrained(folder / "tokenizer")

    @cached_property
    def _tokenizer(self) -> Any:
        return _auto_tokenizer(str(self._folder or self.identity["name"]), self.identity["revision"])


def build_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """`trained`, a public tokenizer's name or folder, or the `language` folder of a cache or a checkpoint: its tokenizer again."""
    if name == "trained":
        return TrainedTokenizer.train(texts)
    language = Path(name) / "language.json"
    if language.is_file():
        return load_tokenizer(json.loads(language.read_text())["identity"]["tokenizer"], language.parent)
    return PretrainedTokenizer.from_name(name)


def load_tokenizer(identity: Mapping[str, Any], folder: Path) -> Tokenizer:
    """What `save` wrote. Needs no network; a tokenizer from the hub is fetched when it is first asked for a new text."""
    if identity["kind"] == "pretrained":
        saved = folder / "tokenizer"
        return PretrainedTokenizer(identity, folder=saved if saved.is_dir() else None)
    file = folder / "tokenizer.model"
    if not file.is_file():
        raise DataError(f"the language in {folder} lacks tokenizer.model; copy the whole folder")
    model = file.read_bytes()
    if hashlib.sha256(model).hexdigest() != identity["sentencepiece_sha256"]:
        raise DataError(f"{file} was altered: its sha256 is not the recorded one; copy it again")
    return TrainedTokenizer(model)


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
