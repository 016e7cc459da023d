"""In which order a loader goes through M samples."""

import numpy as np


class EndlessOrder:
    """The permutations of epoch 0, 1, 2, …, each a function of (seed, epoch) alone, laid end to end: one endless sequence."""

    def __init__(self, num_samples: int, seed: tuple[int, ...]) -> None:
        self.num_samples, self._seed = num_samples, seed
        # A permutation is the only thing here that grows with the cache: 400 MB for 100 million samples.
        self._dtype = np.int32 if num_samples <= np.iinfo(np.int32).max else np.int64
        self._permutations: dict[int, np.ndarray] = {}

    def samples(self, first: int, count: int) -> np.ndarray:
        """(count,) int64, each 0 to M - 1: what stands at `first` and behind it, across epochs. `count` is at least 1."""
        parts: list[np.ndarray] = []
        while count > 0:
            epoch, place = divmod(first, self.num_samples)
            part = self._permutation(epoch)[place : place + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts, dtype=np.int64)

    def _permutation(self, epoch: int) -> np.ndarray:
        order_M = self._permutations.get(epoch)
        if order_M is None:
            # The one before stays for a batch that spans both; older ones go first, so that at most two are in memory.
            self._permutations = {e: kept for e, kept in self._permutations.items() if e == epoch - 1}
            order_M = np.arange(self.num_samples, dtype=self._dtype)
            np.random.default_rng((*self._seed, epoch)).shuffle(order_M)
            self._permutations[epoch] = order_M
        return order_M
