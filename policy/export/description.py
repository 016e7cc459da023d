"""export.json: all that is known of an export beside its graphs. The file is this type."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from ...data.episodes import DataError
from ...data.files import json_bytes, write_whole
from ...data.images import ImageRule
from ...data.prompt import PromptStyle
from ...data.vector_encodings import ENCODINGS, EncodingName
from ..objectives import ObjectiveConfig
from .buckets import Bucket

FORMAT_VERSION: Literal[1] = 1
FILE, WEIGHTS, LANGUAGE = "export.json", "weights.bin", "language"


@dataclass(frozen=True, kw_only=True)
class TensorShape:
    """An input or output of a graph."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """numpy's name."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    file: str
    inputs: tuple[TensorShape, ...]
    outputs: tuple[TensorShape, ...]


@dataclass(frozen=True, kw_only=True)
class Differences:
    """max |onnxruntime - torch| / max |torch|, in float32, as measured when it was exported."""

    prefix: float
    """Of all outputs of the prefix graph, on random inputs, cameras missing."""
    output: float
    """Of the step graph after the prefix graph, on random inputs."""
    actions: float
    """Of whole chunks in raw units, on observations like recorded ones."""

    @property
    def largest(self) -> float:
        return float(np.max([self.prefix, self.output, self.actions]))  # NaN if one is


@dataclass(frozen=True, kw_only=True)
class BucketGraphs:
    bucket: Bucket
    prefix: Graph
    step: Graph
    """Its inputs are noisy_actions (B, H, A), noise_level (B,), for some objectives second_level (B,), and the prefix graph's outputs."""
    differences: Differences | None = None


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """normalised = (raw - centre) / scale, in float32."""

    centre: tuple[float, ...]
    scale: tuple[float, ...]

    def normalise(self, raw: np.ndarray) -> np.ndarray:
        normalised: np.ndarray = (raw.astype(np.float32) - np.asarray(self.centre, np.float32)) / np.asarray(
            self.scale, np.float32
        )
        return normalised

    def undo(self, normalised: np.ndarray) -> np.ndarray:
        raw: np.ndarray = normalised * np.asarray(self.scale, np.float32) + np.asarray(self.centre, np.float32)
        return raw


@dataclass(frozen=True, kw_only=True)
class ActionReading:
    """From a sampled chunk (B, H, A) to the robot's actions (B, H, D): chunk[..., slots], decoded, times scale, plus centre."""

    slots: tuple[int, ...]
    encoding: EncodingName
    """What the numbers at `slots` are; as_is but for RDT (vlatune's data/vector_encodings.py)."""
    scaling: Scaling

    def raw(self, chunks_BHA: np.ndarray) -> np.ndarray:
        encoding = ENCODINGS.get(self.encoding)
        actions = chunks_BHA[..., list(self.slots)]
        if encoding is not None:
            actions = encoding.decode(torch.from_numpy(actions).float()).numpy()
        return self.scaling.undo(actions)


@dataclass(frozen=True, kw_only=True)
class Description:
    format_version: Literal[1]
    checkpoint: str
    weights_hash: str
    """As in evaluations of the checkpoint itself."""
    versions: Mapping[str, str]
    """Of what it was written with."""
    robot: str
    cameras: tuple[str, ...]
    """All of the policy's."""
    image_rule: ImageRule
    """How a camera's picture becomes the uint8 square that goes in."""
    observation_offsets: tuple[int, ...]
    """T: which observations a decision reads, in control steps."""
    state: Scaling
    """The graphs take raw states and need this not; the prompt of π0.5 has the normalised state in it."""
    prompt: PromptStyle
    reads_embeddings: bool
    """Whether prompts go in with a text encoder's features."""
    horizon: int
    action_dim: int
    """D, the robot's."""
    action_width: int
    """A, of noise and of the step graph."""
    actions: ActionReading
    objective: ObjectiveConfig
    sampling: str
    """What the loop does with the step graph's output."""
    noise_levels: tuple[float, ...]
    """At which the step graph is called, in order, with the objective's own number of steps; 1 is pure noise."""
    second_levels: tuple[float, ...]
    graphs: tuple[BucketGraphs, ...]
    tolerance: float
    """Which no difference exceeds."""

    def write(self, folder: Path) -> None:
        write_whole(folder / FILE, json_bytes(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> "Description":
        """Raises DataError if the folder is no export of this format."""
        file = folder / FILE
        if not file.is_file():
            raise DataError(
                f"there is no {FILE} in {folder}; give a folder that `vlatune export CHECKPOINT FOLDER` wrote"
            )
        try:
            return TypeAdapter(cls).validate_json(file.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(
                f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}; use the vlatune that wrote it, or export the checkpoint again"
            ) from error
