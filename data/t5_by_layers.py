"""A T5 encoder that is never whole in memory: its blocks are read from disk one after another, and all texts go through each.

The XXL is 19 GB in float32 and 9.5 in bfloat16; one of its 24 blocks is 0.4 GB in bfloat16, plus 0.8 of float32 while it is read. Blocks and norms
are transformers' own, filled and emptied. Every text goes alone and unpadded, so that its features are those of the whole
model, bit for bit on the same device.

Shape letters: L tokens, E width, V rows of the token table.
"""

import json
import pickle
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .episodes import DataError

MAX_TOKENS = 2**15
"""Of the texts that go through the blocks together: their activations are 0.27 GB for the XXL in bfloat16."""
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What is looked for, in this order."""
TOKEN_TABLES = ("shared.weight", "encoder.embed_tokens.weight")
"""What the token table is called; files hold one of them or both."""


def reads_by_layers(config: Any) -> bool:
    """Whether it is a T5 of the kind whose first block holds the relative positions of all."""
    return bool(config.model_type == "t5")


class T5ByLayers:
    """A `TextEncoder` with the features of `PretrainedT5`, for one block's memory.

    Reading all weights takes the disk's time, so many texts should come at once."""

    def __init__(
        self, identity: Mapping[str, Any], config: Any, device: torch.device, *, show_progress: bool = False
    ) -> None:
        self.identity = identity
        self.width: int = identity["width"]
        self._config = config
        self._device = device
        self._dtype: torch.dtype = getattr(torch, identity["dtype"])
        self._show_progress = show_progress

    def encode_each(self, texts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Raises `DataError` when the weights are missing or damaged."""
        weights = WeightsOnDisk(self.identity["name"], self.identity["revision"])
        for group in grouped(texts):
            yield from self._through_all_blocks(group, weights)

    @torch.no_grad()
    def _through_all_blocks(self, texts: Sequence[Sequence[int]], weights: "WeightsOnDisk") -> list[Tensor]:
        from transformers import T5EncoderModel

        with torch.device("meta"):
            encoder = T5EncoderModel(self._config).eval().encoder
        used = sorted({token for ids in texts for token in ids})
        table_VE = weights.rows(TOKEN_TABLES, used).to(self._device, self._dtype)
        row = {token: number for number, token in enumerate(used)}
        features = [table_VE[[row[token] for token in ids]][None] for ids in texts]  # (1, L, E) each
        positions: dict[
            int, Tensor
        ] = {}  # L -> bias of the attention scores; the first block computes it for all blocks
        for number, block in enumerate(tqdm(encoder.block, "blocks", leave=False, disable=not self._show_progress)):
            self._fill(block, f"encoder.block.{number}.", weights)
            for index, ids in enumerate(texts):
                features[index], positions[len(ids)], _ = block(features[index], position_bias=positions.get(len(ids)))
            block.to("meta")
        self._fill(encoder.final_layer_norm, "encoder.final_layer_norm.", weights)
        return [encoder.final_layer_norm(x_1LE)[0].cpu() for x_1LE in features]

    def _fill(self, module: torch.nn.Module, prefix: str, weights: "WeightsOnDisk") -> None:
        """Read the module's parameters from disk."""
        own = module.state_dict()
        read = weights.read([prefix + name for name in own], self._dtype, self._device)
        try:
            module.load_state_dict({name: read[prefix + name] for name in own}, assign=True)
        except RuntimeError as error:
            raise DataError(
                f"the weights of {self.identity['name']!r} have other sizes than its config.json ({error}); copy the whole folder again"
            ) from error


class WeightsOnDisk:
    """The tensors of a checkpoint by their names, in safetensors or torch's files, one or sharded. Files are mapped into memory while
    something is read from them, and no longer."""

    def __init__(self, name: str, revision: str | None) -> None:
        """A folder, or a hub name with the revision to take. Raises `DataError` if there are no weights."""
        self._name, self._revision = name, revision
        found = next((file for file in map(self._reached, WEIGHT_FILES) if file is not None), None)
        if found is None:
            raise DataError(f"there are no weights of {name!r}; looked for {', '.join(WEIGHT_FILES)}")
        self._only = None if found.name.endswith(".index.json") else found
        self._shard_of: dict[str, str] = {}
        if self._only is None:
            try:
                self._shard_of = dict(json.loads(found.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{found} does not list shards ({error!r}); copy it again") from error

    def read(self, names: Collection[str], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """All of them; raises `DataError` if one is not there."""
        tensors: dict[str, Tensor] = {}
        for file in dict.fromkeys(map(self._file_of, names)):
            with opened(file) as there:
                tensors |= {name: there[name]() for name in names if name in there}
            # Only now is anything read: until here the tensors are addresses in the mapped file.
            tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
        for name in names:
            if name not in tensors:
                raise self._lacks(name)
        return tensors

    def rows(self, names: Sequence[str], rows: Sequence[int]) -> Tensor:
        """Some rows of a table that goes by one of several names; no others are read from disk."""
        for name in names:
            if self._only is not None or name in self._shard_of:
                with opened(self._file_of(name)) as there:
                    if name in there:
                        return there[name]()[list(rows)]
        raise self._lacks(names[0])

    def _file_of(self, name: str) -> Path:
        if self._only is not None:
            return self._only
        if name not in self._shard_of:
            raise self._lacks(name)
        shard = self._reached(self._shard_of[name])
        if shard is None:
            raise DataError(
                f"{self._name!r} names the shard {self._shard_of[name]} and does not have it; copy the whole folder"
            )
        return shard

    def _lacks(self, name: str) -> DataError:
        return DataError(f"the weights of {self._name!r} lack {name}; copy them again")

    def _reached(self, file: str) -> Path | None:
        from transformers.utils.hub import cached_file

        path = cached_file(
            self._name, file, revision=self._revision or "main", _raise_exceptions_for_missing_entries=False
        )
        return None if path is None else Path(path)


@contextmanager
def opened(file: Path) -> Iterator[Mapping[str, Callable[[], Tensor]]]:
    """Name -> what gives its tensor, mapped into memory. Raises `DataError` if the file is damaged or cannot be mapped."""
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        try:
            if file.suffix == ".safetensors":
                archive = stack.enter_context(safe_open(file, framework="pt"))
                content = {name: partial(archive.get_tensor, name) for name in archive.keys()}  # noqa: SIM118  no dict
            elif zipfile.is_zipfile(file):  # torch's format since 1.6; only it can be mapped
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                content = {name: partial(loaded.__getitem__, name) for name in loaded}
            else:
                raise DataError(
                    f"{file} is no archive of torch 1.6 or later, and cannot be read in parts; copy it again, save it as "
                    "safetensors, or leave out --layer-by-layer"
                )
        except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = next(iter(str(error).splitlines()), repr(error))
            raise DataError(f"{file} cannot be read as weights ({reason}); copy it again") from error
        yield content


def grouped(texts: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """In order, at most MAX_TOKENS together (or one longer text)."""
    first = num_tokens = 0
    for number, ids in enumerate(texts):
        if number > first and num_tokens + len(ids) > MAX_TOKENS:
            yield texts[first:number]
            first, num_tokens = number, 0
        num_tokens += len(ids)
    if first < len(texts):
        yield texts[first:]
