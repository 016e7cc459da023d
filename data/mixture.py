"""Several caches as one: a loader that draws from them by weight, and their statistics together.

Which cache a sample comes from is decided without chance. Of the first n samples the first cache gives n * weight, rounded; of those
it leaves, the second gives its share likewise, and so on: counts in closed form, so that any place in the sequence can be
reached at once. After any number of samples each of K caches has given its share to within (K - 1) / 2 samples.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from .cache import Cache
from .loader import Loader, LoaderConfig
from .normalise import FieldStatistics, Statistics
from .order import EndlessOrder
from .vision_features import FeatureStore
from .windows import STATELESS_STYLES, CacheWindows

WHOLE_SHARE = 2**30
"""Shares are integers, so many of which are everything: counts are then exact on every machine."""


class MixtureLoader(Loader):
    """Of several caches, each gone through in an `EndlessOrder` of its own: within one nothing repeats before all was seen.

    A rank's batch is sorted by cache. `sample_index_B` counts on from one cache to the next."""

    def __init__(
        self,
        caches: Sequence[Cache],
        weights: Sequence[float] | None,
        config: LoaderConfig,
        *,
        features: Sequence[FeatureStore] | None = None,
        statistics: Statistics | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`weights` are relative, one per cache; None weighs each by its samples. `features`, one store per cache, are read in place of
        pictures. `statistics`: the policy's, for prompts that spell out the state; None: those of these caches together. Raises
        `ValueError` for weights that are none, caches that differ in what a policy is tied to, features of some caches
        only or of several towers, and what a cache cannot give; `DataError` for features of another cache."""
        refuse_differences(caches, embeddings=config.embeddings)
        if features is not None:
            _refuse_other_features(caches, features)
        stores: Sequence[FeatureStore | None] = features or [None] * len(caches)
        super().__init__(config, caches[0].image_rule.size_px, stores[0], rank=rank, world_size=world_size)
        if statistics is None and config.prompt not in STATELESS_STYLES:
            statistics = mixture_statistics(caches)
        first_index = np.cumsum([0, *(cache.num_frames for cache in caches)]).tolist()
        self._windows = [
            CacheWindows(cache, config, statistics, store, first_index=first)
            for cache, store, first in zip(caches, stores, first_index[:-1], strict=True)
        ]
        sizes = [windows.num_samples for windows in self._windows]
        self.num_samples = sum(sizes)
        self._shares = _shares_of_the_rest(sizes if weights is None else weights, len(caches))
        self._orders = [EndlessOrder(size, (config.seed, place)) for place, size in enumerate(sizes)]
        for cache, size, drawn in zip(caches, sizes, self._num_drawn(self._global_batch), strict=True):
            if drawn > size:
                raise ValueError(
                    f"{drawn} samples of each batch would come from {cache.path}, which has {size} {config.split} samples; lower its "
                    "weight or the batch size"
                )

    def _num_drawn(self, count: int) -> list[int]:
        """How many of the mixture's first `count` samples come from each cache."""
        drawn: list[int] = []
        for share in self._shares:
            drawn.append((count * share + WHOLE_SHARE // 2) // WHOLE_SHARE)
            count -= drawn[-1]
        return drawn

    def _samples(self, first: int, count: int) -> Sequence[tuple[CacheWindows, np.ndarray]]:
        begin, end = self._num_drawn(first), self._num_drawn(first + count)
        members = zip(self._windows, self._orders, begin, end, strict=True)
        return [(windows, order.samples(a, b - a)) for windows, order, a, b in members if b > a]


def refuse_differences(caches: Sequence[Cache], *, embeddings: bool) -> None:
    """Raises `ValueError`, naming what differs, unless one policy can read all `caches`; with `embeddings`, their text features, too."""
    if not caches:
        raise ValueError("there is no cache to mix; give at least one")
    first = caches[0]
    wanted = _tied_to(first, embeddings=embeddings)
    for other in caches[1:]:
        for name, value in _tied_to(other, embeddings=embeddings).items():
            if value != wanted[name]:
                raise ValueError(
                    f"the caches {first.path} and {other.path} cannot be mixed: {name} is {_short(wanted[name])} in the first "
                    f"and {_short(value)} in the second; prepare the second again as the first was (--tokenizer "
                    f"{first.language_path} gives the first one's tokens)"
                )


def _refuse_other_features(caches: Sequence[Cache], features: Sequence[FeatureStore]) -> None:
    if len(features) != len(caches):
        raise ValueError(
            f"there are vision features for {len(features)} of {len(caches)} caches; make them for each with `vlatune features`, or train on "
            "pictures"
        )
    for other in features[1:]:
        if (other.plan.tower, other.plan.dtype) != (features[0].plan.tower, features[0].plan.dtype):
            raise ValueError(
                f"the vision features {features[0].path} and {other.path} are of different towers or precisions; make both with the same "
                "--checkpoint and --precision"
            )


def mixture_statistics(caches: Sequence[Cache]) -> Statistics:
    """Of all caches' training frames, each counting the same: exact, as if they were one cache. Weights play no part.

    One column is in memory at a time."""
    is_train = [
        np.repeat(cache.episodes["split"].to_numpy() == "train", cache.episodes["length"].to_numpy())
        for cache in caches
    ]
    return Statistics(
        state=_of_all([cache.state_NS for cache in caches], is_train),
        actions=_of_all([cache.actions_NA for cache in caches], is_train),
    )


def _of_all(tables: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> FieldStatistics:
    columns = [
        FieldStatistics.compute(
            np.concatenate([table[row, d] for table, row in zip(tables, rows, strict=True)])[:, None]
        )
        for d in range(tables[0].shape[1])
    ]
    values = {
        name: tuple(asdict(column)[name][0] for column in columns)
        for name in ("mean", "std", "min", "max", "q01", "q99")
    }
    return FieldStatistics(**values, count=columns[0].count)


def _tied_to(cache: Cache, *, embeddings: bool) -> dict[str, object]:
    """What a policy that is trained on the cache is tied to."""
    robot = {f"the robot's {name}": value for name, value in asdict(cache.robot).items() if name != "cameras"}
    language = cache.language.identity
    tied = {
        **robot,
        "cameras": tuple(cache.images),
        "image_rule": cache.image_rule.to_json(),
        "tokenizer": language["tokenizer"],
    }
    return {**tied, "encoder": language["encoder"]} if embeddings else tied


def _short(value: object) -> str:
    return textwrap.shorten(repr(value), 240, placeholder=" …")


def _shares_of_the_rest(weights: Sequence[float], num_caches: int) -> list[int]:
    """Each cache's part of what those before it leave, in units of 1 / `WHOLE_SHARE`; the last takes all."""
    if len(weights) != num_caches or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"weights is {tuple(weights)} for {num_caches} caches; give one positive number for each")
    shares = [round(WHOLE_SHARE * weight / sum(weights[place:])) for place, weight in enumerate(weights)]
    if min(shares) == 0:
        raise ValueError(
            f"weights is {tuple(weights)}; the smallest is nothing beside the others: leave that cache out"
        )
    return shares
