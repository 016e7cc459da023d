"""Token ids to features, offline: frozen T5 encoders, run once per distinct instruction and never in training.

Shape letters: L tokens, E encoder width.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .episodes import DataError
from .files import quick_digest
from .tokenizer import hub_revision


class TextEncoder(Protocol):
    """A frozen encoder. `identity` and `width` are known without its weights."""

    width: int
    identity: Mapping[str, Any]
    """JSON: what makes two encoders give the same features."""

    def encode(self, ids: Sequence[int]) -> Tensor:
        """(L, E) in the identity's dtype, for one unpadded text: so that a text's features depend on nothing else."""


@dataclass(frozen=True, kw_only=True)
class SeededT5Config:
    """A small T5 encoder of random weights: tells instructions apart, knows no English. For machines without a hub."""

    vocab_size: int
    seed: int = 0
    d_model: int = 64
    d_kv: int = 16
    d_ff: int = 128
    num_layers: int = 2
    num_heads: int = 4


class SeededT5:
    """transformers' own T5 encoder class with weights drawn from a recorded seed (float32)."""

    def __init__(self, config: SeededT5Config, *, weights_sha256: str | None = None) -> None:
        """With `weights_sha256` (from a saved identity) the weights are drawn only when a new text comes, and compared."""
        self.config = config
        self.width = config.d_model
        self._expected_sha256 = weights_sha256 or _weights_sha256(self._model)
        self.identity: Mapping[str, Any] = {
            "kind": "seeded-t5",
            "dtype": "float32",
            "weights_sha256": self._expected_sha256,
            **asdict(config),
        }

    @classmethod
    def from_identity(cls, identity: Mapping[str, Any]) -> "SeededT5":
        names = SeededT5Config.__dataclass_fields__
        config = SeededT5Config(**{name: identity[name] for name in names})
        return cls(config, weights_sha256=identity["weights_sha256"])

    @torch.no_grad()
    def encode(self, ids: Sequence[int]) -> Tensor:
        if _weights_sha256(self._model) != self._expected_sha256:
            raise DataError(
                f"torch {torch.__version__} draws other weights for the seeded text encoder than the machine that prepared "
                "the cache: only its known instructions have embeddings here; use that torch, or prepare again"
            )
        features_LE: Tensor = self._model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0]
        return features_LE

    @cached_property
    def _model(self) -> Any:
        from transformers import T5Config, T5EncoderModel

        sizes = asdict(self.config)
        seed = sizes.pop("seed")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0))
        return model.eval()


class PretrainedT5:
    """A public T5 encoder (`google/t5-v1_1-xxl`, …) in bfloat16, by hub name (pinned to a revision) or from a local folder."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self.identity = identity
        self.width: int = identity["width"]

    @classmethod
    def from_name(cls, name: str) -> "PretrainedT5":
        """Reads the configuration only. Raises `DataError` when it cannot be reached or is not a T5."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise _unreachable(name, error) from error
        if config.model_type not in ("t5", "mt5", "umt5"):
            raise DataError(f"the text encoder {name!r} is a {config.model_type}; give a T5, or --encoder seeded-t5")
        local = Path(name).is_dir()
        weights = sorted(Path(name).glob("*.safetensors")) + sorted(Path(name).glob("*.bin")) if local else []
        identity = {
            "kind": "pretrained",
            "name": name,
            "revision": None if local else hub_revision(name, "config.json"),
            "files": {file.name: quick_digest(file) for file in weights},
            "width": config.d_model,
            "dtype": "bfloat16",
        }
        return cls(identity)

    @torch.no_grad()
    def encode(self, ids: Sequence[int]) -> Tensor:
        features_LE: Tensor = self._model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0]
        return features_LE

    @cached_property
    def _model(self) -> Any:
        from transformers import T5EncoderModel

        name = self.identity["name"]
        try:
            model = T5EncoderModel.from_pretrained(
                name, revision=self.identity["revision"] or "main", dtype=torch.bfloat16
            )
        except (OSError, ValueError) as error:
            raise _unreachable(name, error) from error
        return model.eval()


def build_encoder(name: str, tokenizer: str, vocab_size: int) -> TextEncoder | None:
    """`none`, `seeded-t5`, or a public T5's name or folder, which reads the tokens of its own tokenizer only."""
    if name == "none":
        return None
    if name == "seeded-t5":
        return SeededT5(SeededT5Config(vocab_size=vocab_size))
    if tokenizer != name:
        raise DataError(
            f"the text encoder {name!r} reads its own tokens, not those of tokenizer {tokenizer!r}; add --tokenizer {name}"
        )
    return PretrainedT5.from_name(name)


def load_encoder(identity: Mapping[str, Any] | None) -> TextEncoder | None:
    """From a saved identity, without loading or drawing any weight."""
    if identity is None:
        return None
    return SeededT5.from_identity(identity) if identity["kind"] == "seeded-t5" else PretrainedT5(identity)


def _weights_sha256(model: Any) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _unreachable(name: str, error: Exception) -> DataError:
    return DataError(
        f"the text encoder {name!r} cannot be loaded ({str(error).splitlines()[0]}); give a local folder, a name that the "
        "Hugging Face hub has and this machine can reach, or --encoder seeded-t5"
    )
