"""Acting with an exported policy: onnxruntime computes it, none of the policy's own modules is imported.

torch runs the sampling loop around the graphs, which is the objective's own, and the tokenizer is the checkpoint's. Shape letters as in
`data/batch.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from ...data.episodes import DataError
from ...data.language import Language
from ...data.raw_observation import RawObservation
from ..objectives.objective import Objective
from ..preparation import Reading, prepared
from . import graph_inputs as inputs
from .buckets import Bucket, fitting
from .description import LANGUAGE, BucketGraphs, Description, Graph
from .packages import needed

PROVIDERS = ("CPUExecutionProvider",)


class BoundOnnxExpert:
    """A step graph and the prefix that it reads; see `BoundExpert`."""

    def __init__(self, session: Any, prefix: Mapping[str, np.ndarray]) -> None:
        self.session = session
        self.prefix = prefix

    def __call__(self, x_BHA: Tensor, noise_level_B: Tensor, second_level_B: Tensor | None = None) -> Tensor:
        feeds = {**self.prefix, inputs.NOISY_ACTIONS: x_BHA.numpy(), inputs.NOISE_LEVEL: noise_level_B.numpy()}
        if second_level_B is not None:
            feeds[inputs.SECOND_LEVEL] = second_level_B.numpy()
        return torch.from_numpy(self.session.run(None, feeds)[0])

    def fan_out(self, num_candidates: int) -> "BoundOnnxExpert":
        raise ValueError(
            f"{num_candidates} candidates were asked for, and an exported policy samples one chunk an observation; act with the checkpoint"
        )


class OnnxPolicy:
    """The exported counterpart of `ActingPolicy`: raw observations in, raw action chunks out."""

    def __init__(self, folder: Path | str, *, providers: Sequence[str] = PROVIDERS, num_threads: int = 0) -> None:
        """`providers` are onnxruntime's, `num_threads` its threads within an operator (0: as many as there are cores). A graph is loaded
        when it is first needed.

        Raises DataError if the folder is no export, and ValueError if onnxruntime or a provider is missing."""
        self._onnxruntime = needed("onnxruntime")
        missing = [name for name in providers if name not in self._onnxruntime.get_available_providers()]
        if missing:
            raise ValueError(
                f"onnxruntime has no {missing[0]} here; it has {', '.join(self._onnxruntime.get_available_providers())}"
            )
        self.folder = Path(folder)
        self.description = Description.read(self.folder)
        self.language = Language.load(self.folder / LANGUAGE)
        self.cameras = self.description.cameras
        self.image_rule = self.description.image_rule
        self.robot = self.description.robot
        self.observation_offsets = self.description.observation_offsets
        self.weights_hash = self.description.weights_hash
        self.horizon, self.action_dim = self.description.horizon, self.description.action_dim
        self.objective: Objective = self.description.objective
        self._providers, self._num_threads = list(providers), num_threads
        self._sessions: dict[str, Any] = {}
        self._random = np.random.default_rng()

    @property
    def noise_shape(self) -> tuple[int, int]:
        """(H, A), of the noise that `act` takes for an observation."""
        return self.horizon, self.description.action_width

    @overload
    def act(
        self, observations: RawObservation, noise: np.ndarray | None = None, *, objective: Objective | None = None
    ) -> np.ndarray: ...
    @overload
    def act(
        self,
        observations: Sequence[RawObservation],
        noise: np.ndarray | None = None,
        *,
        objective: Objective | None = None,
    ) -> np.ndarray: ...
    def act(
        self,
        observations: RawObservation | Sequence[RawObservation],
        noise: np.ndarray | None = None,
        *,
        objective: Objective | None = None,
    ) -> np.ndarray:
        """(B, H, robot's action dims) float32 actions in raw units; (H, dims) for one observation that is no sequence.

        `noise` is standard normal, (B, *noise_shape); None draws it. `objective` samples in place of the policy's own, for instance with
        another number of steps: the loop is outside of the graphs. Raises ValueError if the observations do not fit the graphs."""
        if isinstance(observations, RawObservation):
            chunk: np.ndarray = self.act([observations], noise, objective=objective)[0]
            return chunk
        if noise is None:
            noise = self._random.standard_normal((len(observations), *self.noise_shape), dtype=np.float32)
        return self.sample(self.prepared(observations), noise, objective=objective)

    def sample(
        self, named: Mapping[str, np.ndarray], noise_BHA: np.ndarray, *, objective: Objective | None = None
    ) -> np.ndarray:
        """As `act`, of inputs that `prepared` gave; prompts of any length up to the graphs'."""
        rows, num_tokens = named[inputs.PROMPT_IDS].shape
        cameras = [name.removeprefix(inputs.IMAGE) for name in named if name.startswith(inputs.IMAGE)]
        by_bucket = {graphs.bucket: graphs for graphs in self.description.graphs}
        graphs = by_bucket[fitting(list(by_bucket), batch=rows, num_tokens=num_tokens, cameras=cameras)]
        chunks = [
            self.sampled(
                graphs,
                {name: value[start : start + graphs.bucket.batch] for name, value in named.items()},
                noise_BHA[start : start + graphs.bucket.batch],
                objective or self.objective,
            )
            for start in range(0, rows, graphs.bucket.batch)
        ]
        return self.description.actions.raw(np.concatenate(chunks))

    def prefix(self, graphs: BucketGraphs, named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The prefix graph's outputs for at most as many rows as its bucket has, padded here."""
        padded = filled_up(named, graphs.bucket)
        names = [output.name for output in graphs.prefix.outputs]
        feeds = {tensor.name: padded[tensor.name] for tensor in graphs.prefix.inputs}
        return dict(zip(names, self.session(graphs.prefix).run(names, feeds), strict=True))

    def bound(self, graphs: BucketGraphs, prefix: Mapping[str, np.ndarray]) -> BoundOnnxExpert:
        return BoundOnnxExpert(self.session(graphs.step), prefix)

    def sampled(
        self, graphs: BucketGraphs, named: Mapping[str, np.ndarray], noise_BHA: np.ndarray, objective: Objective
    ) -> np.ndarray:
        """Chunks (B, H, A) as the model reads them, by one bucket's graphs, of at most as many rows as it has."""
        noise = torch.from_numpy(_more_rows(noise_BHA.astype(np.float32), graphs.bucket.batch))
        with torch.inference_mode():
            chunks_BHA = objective.sample(self.bound(graphs, self.prefix(graphs, named)), noise)
        sampled: np.ndarray = chunks_BHA.float().numpy()[: len(noise_BHA)]
        return sampled

    def session(self, graph: Graph) -> Any:
        """onnxruntime's, loaded once. Raises DataError if the graph or its weights cannot be loaded."""
        if graph.file not in self._sessions:
            options = self._onnxruntime.SessionOptions()
            options.intra_op_num_threads = self._num_threads
            options.log_severity_level = 3  # it warns of every weight that it folds away
            try:
                self._sessions[graph.file] = self._onnxruntime.InferenceSession(
                    self.folder / graph.file, options, providers=self._providers
                )
            except Exception as error:  # its exceptions have no common class of their own
                raise DataError(
                    f"{self.folder / graph.file} cannot be loaded ({error}); copy the whole folder again"
                ) from error
        return self._sessions[graph.file]

    def prepared(self, observations: Sequence[RawObservation]) -> dict[str, np.ndarray]:
        """Inputs of the prefix graph, as `graph_inputs.py` names them, for the cameras that all observations have. Prompts are padded to
        the longest.

        Raises ValueError if a state has another shape."""
        described = self.description
        reading = Reading(
            cameras=tuple(camera for camera in self.cameras if all(camera in raw.images for raw in observations)),
            image_rule=self.image_rule,
            num_offsets=len(described.observation_offsets),
            state_dim=len(described.state.centre),
            prompt=described.prompt,
            reads_embeddings=described.reads_embeddings,
            prompt_bucket=1,  # graphs have lengths of their own
        )
        observation = prepared(observations, reading, self.language, described.state.normalise)
        return {name: tensor.numpy() for name, tensor in inputs.named_inputs(observation).items()}


def filled_up(named: Mapping[str, np.ndarray], bucket: Bucket) -> dict[str, np.ndarray]:
    """Rows repeated and prompts padded until they have the bucket's shapes. Raises ValueError for prompts that are longer."""
    num_tokens = named[inputs.PROMPT_IDS].shape[1]
    if num_tokens > bucket.prompt_tokens:
        raise ValueError(f"the prompts have {num_tokens} tokens, and this graph reads {bucket.prompt_tokens}")
    filled = {}
    for name, value in named.items():
        if name.startswith("prompt_"):
            missing = bucket.prompt_tokens - value.shape[1]
            value = np.pad(value, [(0, 0), (0, missing), *[(0, 0)] * (value.ndim - 2)])
        filled[name] = np.ascontiguousarray(_more_rows(value, bucket.batch))
    return filled


def _more_rows(value: np.ndarray, rows: int) -> np.ndarray:
    """The last row repeated until there are `rows`."""
    return np.concatenate([value, np.repeat(value[-1:], rows - len(value), axis=0)])
