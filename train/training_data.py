"""What a run reads: its caches, opened and checked together, and batches of them."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..data.batch import Batch, Prompts
from ..data.cache import Cache
from ..data.loader import ChunkLoader, Loader, LoaderConfig
from ..data.mixture import MixtureLoader, mixture_statistics
from ..data.normalise import Statistics
from ..data.vision_features import FeatureStore
from ..policy.config import Embodiment
from .config import TrainConfig


@dataclass(frozen=True)
class TrainingData:
    """A run's caches; loaders belong to one rank."""

    config: TrainConfig
    caches: tuple[Cache, ...]
    loader_config: LoaderConfig
    rank: int
    world_size: int
    features: tuple[FeatureStore, ...] | None
    """What is read in place of pictures, one store per cache."""

    @classmethod
    def open(cls, config: TrainConfig, *, rank: int, world_size: int) -> "TrainingData":
        """Raises `DataError` or `ValueError` for caches that are not there, or do not fit the policy or one another."""
        caches = (Cache.open(config.cache, config.language), *map(Cache.open, config.more_caches))
        policy = config.policy
        first = caches[0]
        first.language.check_covers(
            first.episodes["instruction"], prompt=policy.prompt, folder=first.language_path, cache=first.path
        )
        if config.conditions.dropout:
            first.language.check_has_empty_text(folder=first.language_path, cache=first.path)
        loader_config = LoaderConfig(
            batch_size=config.micro_batch_size(world_size),
            horizon=policy.horizon,
            observation_offsets=policy.observation_offsets,
            cameras=tuple(caches[0].images),
            embeddings=policy.backbone.reads_embeddings,
            prompt=policy.prompt,
            state_normalisation=policy.state_normalisation,
            near_constant=policy.near_constant,
            seed=config.seed,
        )
        return cls(config, caches, loader_config, rank, world_size, _open_features(config, caches))

    @cached_property
    def loader(self) -> Loader:
        """Of the training episodes."""
        return self._loader(self.loader_config, range(len(self.caches)), self.config.cache_weights)

    @cached_property
    def validation(self) -> Loader | None:
        """Of the validation episodes, in smaller batches where there are few; None where the caches keep none. With `overfit_batches` what
        is trained on: there it is to be seen whether a policy can learn its data at all."""
        if self.config.overfit_batches is not None:
            return self.loader
        num_frames = [
            int(cache.episodes.loc[cache.episodes["split"] == "validation", "length"].sum()) for cache in self.caches
        ]
        members = [place for place, frames in enumerate(num_frames) if frames]
        batch_size = min(self.loader_config.batch_size, sum(num_frames) // self.world_size)
        if batch_size == 0:
            return None
        config = replace(self.loader_config, split="validation", batch_size=batch_size)
        return self._loader(config, members, None)

    def _loader(
        self, config: LoaderConfig, members: Sequence[int], weights: Sequence[float] | None
    ) -> ChunkLoader | MixtureLoader:
        """Of the caches at these places."""
        # Statistics are those of all training data, also where a prompt spells out the state of a validation episode.
        place: dict[str, Any] = {"statistics": self.statistics, "rank": self.rank, "world_size": self.world_size}
        caches = [self.caches[member] for member in members]
        features = None if self.features is None else [self.features[member] for member in members]
        if len(caches) == 1:
            return ChunkLoader(caches[0], config, features=None if features is None else features[0], **place)
        return MixtureLoader(caches, weights, config, features=features, **place)

    def first_samples(self, count: int) -> Batch:
        """Of the training order, the same on every rank; all where there are fewer."""
        config = replace(self.loader_config, batch_size=min(count, self.loader.num_samples))
        alone = replace(self, rank=0, world_size=1)
        return alone._loader(config, range(len(self.caches)), self.config.cache_weights).batch(0)

    def batches(self, first_step: int, device: torch.device) -> Iterator[Batch]:
        """Micro-batches without end from optimizer step `first_step` on, on the `device` if that is a GPU."""
        num_first = self.config.overfit_batches
        accumulated = self.config.num_accumulation_steps
        if num_first is None:
            return self.loader.iterate(first_step * self.config.batch_size, device=device)
        batches = [self.loader.batch(index) for index in range(num_first * accumulated)]
        return itertools.islice(itertools.cycle(batches), first_step % num_first * accumulated, None)

    @cached_property
    def statistics(self) -> Statistics:
        return self.caches[0].statistics if len(self.caches) == 1 else mixture_statistics(self.caches)

    @property
    def embodiment(self) -> Embodiment:
        """What a policy trained on this data is tied to."""
        cache = self.caches[0]
        return Embodiment(
            robot=cache.robot.name,
            state_dim=cache.state_NS.shape[1],
            action_dim=cache.actions_NA.shape[1],
            control_hz=cache.robot.control_hz,
            gripper_action=cache.robot.gripper_action,
            cameras=tuple(cache.images),
            image_rule=cache.image_rule,
            vocab_size=cache.language.vocab_size,
            encoder_width=cache.language.embedding_width,
        )

    @property
    def kept_ids(self) -> tuple[int, ...] | None:
        """Which rows of the public tokenizer's table the policy's table has; None: all."""
        return self.caches[0].language.kept_ids

    @property
    def empty_text(self) -> Prompts | None:
        """What stands for an instruction that training hides; None where the language has no features of it."""
        return self.caches[0].language.empty_text

    @property
    def action_names(self) -> tuple[str, ...]:
        return self.caches[0].robot.action_names

    @property
    def language_path(self) -> Path:
        return self.caches[0].language_path

    @cached_property
    def digest(self) -> str:
        """Of all that is read: another one is another run."""
        if len(self.caches) == 1:
            return self.caches[0].digest
        return hashlib.sha256("".join(cache.digest for cache in self.caches).encode()).hexdigest()

    @property
    def language_digest(self) -> str:
        return self.caches[0].language_digest


def _open_features(config: TrainConfig, caches: Sequence[Cache]) -> tuple[FeatureStore, ...] | None:
    if config.vision_features is None:
        return None
    paths = (config.vision_features, *config.more_vision_features)
    if len(paths) != len(caches):
        raise ValueError(
            f"there are vision features for {len(paths)} of {len(caches)} caches; give --more-vision-features as many as --more-caches, or "
            "train on pictures"
        )
    return tuple(FeatureStore.open(path, cache) for path, cache in zip(paths, caches, strict=True))
