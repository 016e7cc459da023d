"""Temporal ensembling: the action of a step is a mean of what all chunks that reach it had planned for it.

From ACT (Zhao et al., arXiv 2304.13705, section IV-B): weights exp(-m i), i = 0 for the oldest chunk, so that a larger m gives new
chunks less say. There a chunk is asked for at every step; here at every n-th."""

import numpy as np


class TemporalEnsemble:
    """Of one episode."""

    def __init__(self, coefficient: float) -> None:
        """`coefficient` is ACT's m, 0.01 there; 0 weighs all chunks alike."""
        self._coefficient = coefficient
        self._chunks: list[tuple[int, np.ndarray]] = []

    def add(self, step: int, chunk_HA: np.ndarray) -> None:
        """A chunk whose first action is for `step`; steps do not go back."""
        self._chunks = [(first, chunk) for first, chunk in self._chunks if first + len(chunk) > step]
        self._chunks.append((step, chunk_HA))

    def action(self, step: int) -> np.ndarray:
        """(A,) for a step that the newest chunk reaches."""
        planned_CA = np.stack([chunk[step - first] for first, chunk in self._chunks if first + len(chunk) > step])
        weight_C = np.exp(-self._coefficient * np.arange(len(planned_CA)))
        mean_A: np.ndarray = weight_C @ planned_CA / weight_C.sum()
        return mean_A
