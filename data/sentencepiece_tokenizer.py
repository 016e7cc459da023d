"""A sentencepiece model as a tokenizer: trained on the instructions at hand, or a file such as PaliGemma's."""

import hashlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from .episodes import DataError
from .files import write_whole

MAX_TRAINED_VOCABULARY = 2048
"""Upper bound; a few dozen instructions give about 350 pieces, 256 of them the bytes that any other text falls back to."""
FILE = "tokenizer.model"
"""In a language's folder."""
TRANSFORMERS_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")
"""A folder with one of these says more about its tokenizer than the model does."""


class SentencePieceTokenizer:
    """A sentencepiece model and the token that its texts begin or end with.

    A model that has a beginning (Gemma, PaliGemma, Llama) begins every text with it and ends none, as openpi does; one without
    (T5, and those trained here) ends every text with its end."""

    def __init__(self, model: bytes, kind: Literal["trained", "sentencepiece"]) -> None:
        """Raises `RuntimeError` if `model` is none."""
        import sentencepiece

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._begins = self._processor.bos_id() >= 0
        self.vocab_size: int = self._processor.vocab_size()
        self.identity: Mapping[str, Any] = {
            "kind": kind,
            "vocab_size": self.vocab_size,
            "sentencepiece_sha256": hashlib.sha256(model).hexdigest(),
        }

    @classmethod
    def train(cls, texts: Iterable[str]) -> Self:
        """A BPE model (pad 0, end 1, unknown 2, then 256 bytes). The same texts, in any order, give the same bytes."""
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
        return cls(model.getvalue(), "trained")

    @classmethod
    def from_file(cls, file: Path) -> Self:
        """Raises `DataError` if it is no sentencepiece model."""
        try:
            return cls(file.read_bytes(), "sentencepiece")
        except RuntimeError as error:
            raise DataError(
                f"{file} is not a sentencepiece model; copy it again, or give another --tokenizer"
            ) from error

    @classmethod
    def load(cls, identity: Mapping[str, Any], folder: Path) -> Self:
        """What `save` wrote; raises `DataError` if it is missing or altered."""
        file = folder / FILE
        if not file.is_file():
            raise DataError(f"the language in {folder} lacks {FILE}; copy the whole folder")
        model = file.read_bytes()
        if hashlib.sha256(model).hexdigest() != identity["sentencepiece_sha256"]:
            raise DataError(f"{file} was altered: its sha256 is not the recorded one; copy it again")
        return cls(model, identity["kind"])

    @property
    def special_ids(self) -> tuple[int, ...]:
        ids = (self._processor.pad_id(), self._processor.bos_id(), self._processor.eos_id())
        return tuple(sorted({token for token in ids if token >= 0}))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text, add_bos=self._begins, add_eos=not self._begins)
        return ids

    def piece(self, token_id: int) -> str:
        piece: str = self._processor.id_to_piece(token_id)
        return piece

    def save(self, folder: Path) -> None:
        write_whole(folder / FILE, self._model)


def lone_model(path: Path) -> Path | None:
    """The sentencepiece file that `path` is, or that the folder `path` has without a word of how it is used.

    AutoTokenizer reads such a folder without complaint, and forgets that texts begin with a token."""
    if path.is_file():
        return path
    if not path.is_dir() or any((path / name).exists() for name in TRANSFORMERS_FILES):
        return None
    models = sorted(path.glob("*.model"))
    return models[0] if len(models) == 1 else None
