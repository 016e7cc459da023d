"""Weights on disk, of whatever format, and putting them strictly into a module. Nothing is ever unpickled but tensors."""

import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...data.episodes import DataError

DEEPSPEED_FILE = "mp_rank_00_model_states.pt"
NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    DEEPSPEED_FILE,
    f"pytorch_model/{DEEPSPEED_FILE}",
)
"""What is looked for in a folder, in this order."""
GATHER = "gather them with the zero_to_fp32.py that DeepSpeed left beside them"
LFS_POINTER = b"version https://git-lfs"


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a weight file, or of the folder that holds one (or its shards); on the CPU, in the file's dtypes.

    A DeepSpeed checkpoint gives the module's weights (for averaged ones give its folder `ema`). Raises DataError if there is none,
    or it is damaged, or it holds more than unpickling tensors may give."""
    file = path if path.is_file() else next((path / name for name in NAMES if (path / name).is_file()), None)
    if file is None:
        partitioned = next(path.rglob("zero_pp_rank_0_mp_rank_00_model_states.pt"), None)
        if partitioned is not None:
            raise DataError(f"{partitioned} was written under ZeRO-3 and holds no whole weights; {GATHER}")
        raise DataError(f"there are no weights in {path}; looked for {', '.join(NAMES)}")
    if not file.name.endswith(".index.json"):
        return _read_file(file)
    try:
        shards = sorted(set(json.loads(file.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} does not list shards ({error!r}); copy it again") from error
    return {name: tensor for shard in shards for name, tensor in _read_file(file.parent / shard).items()}


def _read_file(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise DataError(f"{file.parent} names the shard {file.name} and does not have it; copy the whole folder")
    with file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise DataError(f"{file} is a Git LFS pointer and not the weights; type: git lfs pull")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        archive = zipfile.is_zipfile(file)  # torch's format since 1.6; only it can be mapped into memory
        if archive and (others := torch.serialization.get_unsafe_globals_in_checkpoint(file)):
            raise DataError(
                f"{file} holds Python objects besides tensors ({', '.join(sorted(others))}), which could run code when read; "
                "save its weights as safetensors where you trust them"
            )
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), repr(error))
        raise DataError(f"{file} cannot be read as weights ({reason}); copy it again") from error
    if not isinstance(content, Mapping):
        raise DataError(f"{file} holds no named weights but a {type(content).__name__}")
    if file.name.endswith("_model_states.pt"):
        content = _deepspeed_module(content, file)
    weights = {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    if not weights:
        raise DataError(f"{file} holds no tensors at its top; it has {', '.join(map(str, list(content)[:5]))}")
    return weights


def _deepspeed_module(content: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    module: Mapping[str, Any] | None = content.get("module")
    if not module:
        raise DataError(f"{file} has no 'module'; give DeepSpeed's model states, {DEEPSPEED_FILE}")
    empty = next((name for name, tensor in module.items() if isinstance(tensor, Tensor) and tensor.numel() == 0), None)
    if empty is not None:
        raise DataError(f"{file} was written under ZeRO-3 and holds no whole weights ({empty} is empty); {GATHER}")
    return module


def load_strict(module: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Every weight into its place. Parameters on the meta device take the tensor itself, others its values.

    Raises DataError, before anything is loaded, naming the first weight that is missing, unexpected or of another shape."""
    own = module.state_dict()
    problems = described_problems(
        missing=sorted(own.keys() - weights.keys()),
        unexpected=sorted(weights.keys() - own.keys()),
        misshapen=[
            f"{name} is {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    )
    if problems:
        raise DataError(f"{source} does not fit its config.json: {problems}")
    module.load_state_dict(weights, assign=any(tensor.is_meta for tensor in own.values()))


def described_problems(*, missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str]) -> str:
    """Empty if there are none."""
    kinds = ((missing, "missing"), (unexpected, "unexpected"), (misshapen, "of another shape"))
    return ", ".join(f"{len(names)} {what} (first: {names[0]})" for names, what in kinds if names)
