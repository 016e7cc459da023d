"""Token ids to features, offline: frozen T5 encoders, run once per distinct instruction and never in training.

Shape letters: L tokens, E encoder width.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .episodes import DataError
from .files import quick_digest
from .t5_by_layers import T5ByLayers, reads_by_layers
from .tokenizer import hub_revision

Dtype = Literal["bfloat16", "float32"]
"""Not float16: T5's activations are too large for it."""


class TextEncoder(Protocol):
    """A frozen encoder. `identity` and `width` are known without its weights."""

    width: int
    identity: Mapping[str, Any]
    """JSON: what makes two encoders give the same features; but for the last bits, which a device may round its own way."""

    def encode_each(self, texts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Token ids of texts -> (L, E) of each, in the identity's dtype, on the CPU. No text is padded or sees another one: its features
        depend on nothing else."""


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
    """transformers' own T5 encoder class with weights drawn from a recorded seed (float32, on the CPU)."""

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

    def encode_each(self, texts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        if _weights_sha256(self._model) != self._expected_sha256:
            raise DataError(
                f"torch {torch.__version__} draws other weights for the seeded text encoder than the machine that prepared "
                "the cache: only its known instructions have embeddings here; use that torch, or prepare again"
            )
        return _one_by_one(self._model, texts, torch.device("cpu"))

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
    """A public T5 encoder (`google/t5-v1_1-xxl`, …), whole in memory: 9.5 GB for the XXL in bfloat16."""

    def __init__(self, identity: Mapping[str, Any], device: torch.device | None = None) -> None:
        """On the CPU unless a `device` is given: where a trained policy meets a new text, the GPU is the policy's."""
        self.identity = identity
        self.width: int = identity["width"]
        self._device = device or torch.device("cpu")

    def encode_each(self, texts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        return _one_by_one(self._model, texts, self._device)

    @cached_property
    def _model(self) -> Any:
        from safetensors import SafetensorError
        from transformers import AutoModelForTextEncoding

        name = self.identity["name"]
        try:
            model, loading = AutoModelForTextEncoding.from_pretrained(
                name,
                revision=self.identity["revision"] or "main",
                dtype=getattr(torch, self.identity["dtype"]),
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise _unreachable(name, error) from error
        # transformers draws both kinds at random and goes on.
        wrong = sorted({*loading["missing_keys"], *(names[0] for names in loading["mismatched_keys"])})
        if wrong:
            raise DataError(
                f"the weights of {name!r} lack {len(wrong)} of the encoder's tensors or have other sizes than its config.json, the "
                f"first is {wrong[0]}; copy the whole folder again"
            )
        return model.eval().to(self._device)


def build_encoder(
    name: str,
    tokenizer: str,
    vocab_size: int,
    *,
    dtype: Dtype = "bfloat16",
    device: torch.device | None = None,
    layer_by_layer: bool = False,
    show_progress: bool = False,
) -> TextEncoder | None:
    """`none`, `seeded-t5` (float32), or a public T5's name or folder, which reads the tokens of its own tokenizer only.

    Loads no weights but the seeded ones. `layer_by_layer` holds one block of a public T5 at a time (t5_by_layers.py), with the same
    features. Raises `DataError` when it cannot be reached, is no T5, or `tokenizer` (with `vocab_size` ids) is not its own."""
    if name == "none":
        return None
    if name == "seeded-t5":
        return SeededT5(SeededT5Config(vocab_size=vocab_size))
    if tokenizer != name:
        raise DataError(
            f"the text encoder {name!r} reads its own tokens, not those of tokenizer {tokenizer!r}; add --tokenizer {name}"
        )
    device = device or torch.device("cpu")
    config = _t5_config(name)
    if vocab_size > config.vocab_size:
        raise DataError(
            f"the tokenizer in {name!r} has {vocab_size} tokens and its text encoder {config.vocab_size}: they are of different models; "
            "copy the whole folder again"
        )
    identity = _identity(name, config, dtype, device)
    if not layer_by_layer:
        return PretrainedT5(identity, device)
    if not reads_by_layers(config):
        raise DataError(f"--layer-by-layer reads T5's blocks, and {name!r} is a {config.model_type}; leave it out")
    return T5ByLayers(identity, config, device, show_progress=show_progress)


def load_encoder(identity: Mapping[str, Any] | None) -> TextEncoder | None:
    """From a saved identity, without loading or drawing any weight."""
    if identity is None:
        return None
    return SeededT5.from_identity(identity) if identity["kind"] == "seeded-t5" else PretrainedT5(identity)


def encoder_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """`auto` is CUDA where there is one; of several, the launcher's local rank says which. Raises `ValueError` if there is none."""
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise ValueError("--device is cuda, and this machine has no CUDA device that torch sees; give --device cpu")
    if device == "cpu" or not there:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@torch.no_grad()
def _one_by_one(model: Any, texts: Sequence[Sequence[int]], device: torch.device) -> Iterator[Tensor]:
    for ids in texts:
        features_LE: Tensor = model(input_ids=torch.tensor([list(ids)], device=device)).last_hidden_state[0]
        yield features_LE.cpu()


def _t5_config(name: str) -> Any:
    """Raises `DataError` when it cannot be reached or is not a T5."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _unreachable(name, error) from error
    if config.model_type not in ("t5", "mt5", "umt5"):
        raise DataError(f"the text encoder {name!r} is a {config.model_type}; give a T5, or --encoder seeded-t5")
    return config


def _identity(name: str, config: Any, dtype: Dtype, device: torch.device) -> dict[str, Any]:
    """Weights are named by their digests in a local folder, by the revision on the hub."""
    local = Path(name).is_dir()
    weights = sorted(Path(name).glob("*.safetensors")) + sorted(Path(name).glob("*.bin")) if local else []
    if local and not weights:
        raise DataError(f"the text encoder {name!r} has no weights (*.safetensors or *.bin); copy the whole folder")
    return {
        "kind": "pretrained",
        "name": name,
        "revision": None if local else hub_revision(name, "config.json"),
        "files": {file.name: quick_digest(file) for file in weights},
        "width": config.d_model,
        "dtype": dtype,
        "device": device.type,
    }


def _weights_sha256(model: Any) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _unreachable(name: str, error: Exception) -> DataError:
    return DataError(
        f"the text encoder {name!r} cannot be loaded ({next(iter(str(error).splitlines()), repr(error))}); give a local folder, a name "
        "that the Hugging Face hub has and this machine can reach, or --encoder seeded-t5"
    )
