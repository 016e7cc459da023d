"""Caches -> batches: chunk windows in a deterministic order, read ahead by a thread.

All loaders share one rule: the samples form one endless sequence, a function of the seed alone. Of the `batch_size * world_size` that
follow the first sample of a micro-step, rank r takes the r-th part. So nothing is dropped, nothing comes twice
within an epoch, and whoever goes on at the number of samples consumed so far sees exactly what is left, on
whatever number of ranks and in whatever batch size.

Shape letters as in `batch.py`; M samples of a cache's split.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from .batch import Batch, Observation
from .cache import Cache
from .normalise import NEAR_CONSTANT, NormaliserMode, Statistics
from .order import EndlessOrder
from .picture_memory import PictureMemory
from .prompt import PromptStyle
from .read_ahead import NUM_READ_AHEAD, read_ahead
from .vision_features import FeatureStore
from .windows import CacheWindows, concatenate_prompts


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


class Loader(ABC):
    """Batches of one rank. Every frame of the split is a sample: its observation and the chunk that begins there."""

    num_samples: int
    """Of all ranks' epoch."""

    def __init__(
        self, config: LoaderConfig, image_px: int, features: FeatureStore | None, *, rank: int, world_size: int
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size}; it must be 0 to {world_size - 1}")
        self.config, self.rank, self.world_size = config, rank, world_size
        self._global_batch = config.batch_size * world_size
        # The thread fills one more than it keeps ready, and the consumer may hold one while it asks for the next.
        num_alive = NUM_READ_AHEAD + 3
        row, dtype = ((image_px, image_px, 3), torch.uint8) if features is None else (features.shape, features.dtype)
        shape = (config.batch_size, len(config.observation_offsets), *row)
        self._memory = PictureMemory(shape, most=num_alive * len(config.cameras), dtype=dtype)
        self._is_of_features = features is not None

    @abstractmethod
    def _samples(self, first: int, count: int) -> Sequence[tuple[CacheWindows, np.ndarray]]:
        """What stands at `first` … `first + count - 1` of the endless sequence, cache by cache."""

    @property
    def steps_per_epoch(self) -> int:
        """Micro-steps after which every sample has been seen (rounded up)."""
        return -(-self.num_samples // self._global_batch)

    def batch(self, step: int) -> Batch:
        """The batch of this rank at micro-step `step`: a function of (seed, step, rank, world size) and nothing else."""
        return self._read(step * self._global_batch)

    def iterate(self, first_sample: int, *, device: torch.device | None = None) -> Iterator[Batch]:
        """Batches without end, prepared ahead by a thread; all ranks together have consumed `first_sample` samples before.

        A batch stays valid for as long as it is held. On a CUDA `device` it is there already, all but `sample_index_B`; otherwise it is on
        the CPU. An error in the thread is raised here; closing or dropping the iterator ends the thread. Raises `ValueError` for a
        negative `first_sample`."""
        if first_sample < 0:
            raise ValueError(f"first_sample is {first_sample}; it is the number of samples consumed before, 0 or more")
        pinned = device is not None and device.type == "cuda"
        return read_ahead(self._batches(first_sample, pinned=pinned), device)

    def _batches(self, first_sample: int, *, pinned: bool) -> Iterator[Batch]:
        self._announce(first_sample)
        while True:
            # While the disk fetches the next batch, this one is put together.
            self._announce(first_sample + self._global_batch)
            yield self._read(first_sample, pinned=pinned)
            first_sample += self._global_batch

    def _announce(self, first_sample: int) -> None:
        for windows, sample_B in self._of_this_rank(first_sample):
            windows.announce(sample_B)

    def _read(self, first_sample: int, *, pinned: bool = False) -> Batch:
        pictures = {camera: self._memory.lend(pinned=pinned) for camera in self.config.cameras}
        parts: list[Batch] = []
        row = 0
        for windows, sample_B in self._of_this_rank(first_sample):
            rows = slice(row, row + len(sample_B))
            parts.append(windows.read(sample_B, {camera: all_rows[rows] for camera, all_rows in pictures.items()}))
            row = rows.stop
        batch = _joined(parts)
        images, features = ({}, pictures) if self._is_of_features else (pictures, None)
        batch = replace(batch, observation=replace(batch.observation, images=images, features=features))
        return _with_pinned_embeddings(batch) if pinned else batch

    def _of_this_rank(self, first_sample: int) -> Sequence[tuple[CacheWindows, np.ndarray]]:
        return self._samples(first_sample + self.rank * self.config.batch_size, self.config.batch_size)


class ChunkLoader(Loader):
    """Of one cache, in the order of `EndlessOrder`."""

    def __init__(
        self,
        cache: Cache,
        config: LoaderConfig,
        *,
        features: FeatureStore | None = None,
        statistics: Statistics | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`features` of the cache's pictures are read in their place. `statistics`: the policy's, for prompts that spell out the state;
        None: the cache's. Raises `ValueError` for what the cache cannot give, and `DataError` for features of another cache."""
        super().__init__(config, cache.image_rule.size_px, features, rank=rank, world_size=world_size)
        self._windows = CacheWindows(cache, config, statistics, features)
        self.num_samples = self._windows.num_samples
        if self._global_batch > self.num_samples:
            raise ValueError(
                f"a batch of {config.batch_size} on {world_size} ranks is more than the {self.num_samples} {config.split} samples "
                f"of {cache.path}; give at most {self.num_samples // world_size}"
            )
        self._order = EndlessOrder(self.num_samples, (config.seed,))

    def _samples(self, first: int, count: int) -> Sequence[tuple[CacheWindows, np.ndarray]]:
        return [(self._windows, self._order.samples(first, count))]


def _joined(parts: list[Batch]) -> Batch:
    """All rows of `parts`, but for the pictures, whose place is known."""
    if len(parts) == 1:
        return parts[0]
    observations = [part.observation for part in parts]
    there_BT = torch.cat([next(iter(observation.image_mask.values())) for observation in observations])
    return Batch(
        observation=Observation(
            images={},
            image_mask=dict.fromkeys(observations[0].image_mask, there_BT),
            state_BTS=torch.cat([observation.state_BTS for observation in observations]),
            prompts=concatenate_prompts([observation.prompts for observation in observations]),
        ),
        actions_BHA=torch.cat([part.actions_BHA for part in parts]),
        valid_BH=torch.cat([part.valid_BH for part in parts]),
        sample_index_B=torch.cat([part.sample_index_B for part in parts]),
    )


def _with_pinned_embeddings(batch: Batch) -> Batch:
    """Next to the pictures the only large tensor; the rest is copied as well from memory that can be paged."""
    prompts = batch.observation.prompts
    if prompts.embedding_BLE is None:
        return batch
    prompts = replace(prompts, embedding_BLE=prompts.embedding_BLE.pin_memory())
    return replace(batch, observation=replace(batch.observation, prompts=prompts))
