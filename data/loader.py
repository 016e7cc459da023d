"""Cache -> batches: chunk windows in a deterministic order, read ahead by a thread.

Order: the permutations of epoch 0, 1, 2, … (each a function of seed and epoch alone) laid end to end are one endless
sequence of samples. Global micro-step k takes the next `batch_size * world_size` of them, and rank r the r-th part. So nothing is
dropped, nothing comes twice within an epoch, and the same samples come in the same order whatever the number of ranks.

Shape letters as in `batch.py`; N frames of the cache, M samples of the split.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .batch import Batch, Observation
from .cache import Cache
from .normalise import NEAR_CONSTANT, Normaliser, NormaliserMode
from .prompt import PromptStyle, prompt_text

NUM_READ_AHEAD = 3
"""Batches that the thread keeps ready."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Which samples, in which shape."""

    batch_size: int
    """Samples per rank and micro-step."""
    horizon: int
    """Actions in a chunk."""
    observation_offsets: tuple[int, ...] = (0,)
    """Control steps, relative to the sample's frame, whose observations a policy reads; 0 or negative."""
    cameras: tuple[str, ...]
    """Which of the cache's cameras."""
    embeddings: bool = False
    """Whether prompts carry the text encoder's features."""
    prompt: PromptStyle = "instruction"
    """What is tokenised."""
    state_normalisation: NormaliserMode = "identity"
    """Of the state that the prompt spells out; the batch's own stays raw."""
    near_constant: float = NEAR_CONSTANT
    """As the policy's."""
    split: str = "train"
    """`train` or `validation`."""
    seed: int = 0
    """Of the order."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.horizon < 1:
            raise ValueError(f"batch_size is {self.batch_size} and horizon {self.horizon}; both must be at least 1")
        if not self.observation_offsets or max(self.observation_offsets) > 0:
            raise ValueError(f"observation_offsets is {self.observation_offsets}; it must be numbers of 0 or less")


class ChunkLoader:
    """Batches of one rank. Every frame of the split is a sample: its observation and the chunk that begins there.

    Offsets before the episode's start read its first frame, and their pictures are masked; actions beyond its end repeat the last one and are not valid."""

    def __init__(self, cache: Cache, config: LoaderConfig, *, rank: int = 0, world_size: int = 1) -> None:
        """Raises `ValueError` for what the cache cannot give."""
        self.cache, self.config, self.rank, self.world_size = cache, config, rank, world_size
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size}; it must be 0 to {world_size - 1}")
        missing = [camera for camera in config.cameras if camera not in cache.images]
        if missing:
            raise ValueError(f"the cache {cache.path} has no camera {missing[0]!r}; it has {', '.join(cache.images)}")
        if config.embeddings and cache.language.embedding_width is None:
            raise ValueError(
                f"the cache {cache.path} has no text embeddings; prepare it again with --encoder seeded-t5 or a T5"
            )
        of_split = cache.episodes[cache.episodes["split"] == config.split]
        if of_split.empty:
            there = ", ".join(sorted(cache.episodes["split"].unique()))
            raise ValueError(f"the cache {cache.path} has no {config.split!r} episodes; it has {there}")
        self._start_E = cache.episodes["start"].to_numpy()
        self._last_E = self._start_E + cache.episodes["length"].to_numpy() - 1
        self._instructions = list(cache.episodes["instruction"])
        self._frames_M = np.concatenate(
            [np.arange(s, s + n) for s, n in zip(of_split["start"], of_split["length"], strict=True)]
        )
        self.num_samples = len(self._frames_M)
        self._global_batch = config.batch_size * world_size
        if self._global_batch > self.num_samples:
            raise ValueError(
                f"a batch of {config.batch_size} on {world_size} ranks is more than the {self.num_samples} {config.split} samples "
                f"of {cache.path}; give at most {self.num_samples // world_size}"
            )
        self._state_normaliser = Normaliser(cache.statistics.state, config.state_normalisation, config.near_constant)
        self._permutations: dict[int, np.ndarray] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Micro-steps after which every sample has been seen (rounded up)."""
        return -(-self.num_samples // self._global_batch)

    def batch(self, step: int) -> Batch:
        """The batch of this rank at micro-step `step`: a function of (seed, step, rank, world size) and nothing else."""
        first = step * self._global_batch + self.rank * self.config.batch_size
        return self._gather(self._samples(first, self.config.batch_size))

    def iterate(self, first_step: int) -> Iterator[Batch]:
        """`batch(first_step)`, `batch(first_step + 1)`, … without end, prepared ahead by a thread.

        An error in the thread is raised here; closing or dropping the iterator ends the thread."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(NUM_READ_AHEAD)
        stop = threading.Event()

        def offer(item: Batch | BaseException) -> None:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return
                except queue.Full:
                    continue

        def read_ahead() -> None:
            step = first_step
            try:
                while not stop.is_set():
                    offer(self.batch(step))
                    step += 1
            except BaseException as error:  # noqa: BLE001  it is raised in the consumer's thread
                offer(error)

        thread = threading.Thread(target=read_ahead, name="read-ahead", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _samples(self, first: int, count: int) -> np.ndarray:
        """(count,) frame indices: places `first` … of the endless sequence; they may span epochs."""
        parts: list[np.ndarray] = []
        while count > 0:
            epoch, place = divmod(first, self.num_samples)
            part = self._permutation(epoch)[place : place + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        """(M,) the split's frames in the order of `epoch`."""
        order_M = self._permutations.get(epoch)
        if order_M is None:
            order_M = np.random.default_rng((self.config.seed, epoch)).permutation(self._frames_M)
            kept = {e: p for e, p in self._permutations.items() if e == epoch - 1}  # a batch spans at most two
            self._permutations = {**kept, epoch: order_M}
        return order_M

    def _gather(self, frame_B: np.ndarray) -> Batch:
        config, cache = self.config, self.cache
        episode_B = np.searchsorted(self._start_E, frame_B, side="right") - 1
        seen_BT = frame_B[:, None] + np.array(config.observation_offsets)
        there_BT = seen_BT >= self._start_E[episode_B, None]
        seen_BT = np.maximum(seen_BT, self._start_E[episode_B, None])
        acted_BH = frame_B[:, None] + np.arange(config.horizon)
        valid_BH = acted_BH <= self._last_E[episode_B, None]
        acted_BH = np.minimum(acted_BH, self._last_E[episode_B, None])
        state_BTS = torch.from_numpy(cache.state_NS[seen_BT])
        normalised_BS = self._state_normaliser(state_BTS[:, -1]).numpy()
        texts = [
            prompt_text(config.prompt, self._instructions[episode], state_S)
            for episode, state_S in zip(episode_B, normalised_BS, strict=True)
        ]
        observation = Observation(
            images={camera: torch.from_numpy(cache.images[camera][seen_BT]) for camera in config.cameras},
            image_mask=dict.fromkeys(config.cameras, torch.from_numpy(there_BT)),
            state_BTS=state_BTS,
            prompts=cache.language.prompts(texts, embeddings=config.embeddings),
        )
        return Batch(
            observation=observation,
            actions_BHA=torch.from_numpy(cache.actions_NA[acted_BH]),
            valid_BH=torch.from_numpy(valid_BH),
            sample_index_B=torch.from_numpy(frame_B),
        )
