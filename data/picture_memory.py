"""Memory for batches of pictures, or of what stands in for them, used again once nothing reads it.

A batch of 256 samples with two 224-pixel cameras has 77 MB: faulting in that much fresh memory costs more than filling it.
"""

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes; copies to other addresses are slower."""


class PictureMemory:
    """Lends tensors of one shape and dtype. A tensor's memory is lent again when the tensor and all its views are gone, never before."""

    def __init__(self, shape: tuple[int, ...], *, most: int, dtype: torch.dtype = torch.uint8) -> None:
        """Keeps up to `most` blocks; what is lent beyond them is ordinary memory."""
        self._shape, self._dtype, self._most = shape, dtype, most
        # Blocks hold bytes: numpy does not know all of torch's dtypes.
        self._byte_shape = (*shape[:-1], shape[-1] * dtype.itemsize)
        self._blocks: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []
        self._lock = threading.Lock()

    def lend(self, *, pinned: bool) -> Tensor:
        """Of undefined content. Pinned memory is torch's, which by itself uses it again, once copies from it are done."""
        if pinned:
            return torch.empty(self._shape, dtype=self._dtype, pin_memory=True)
        with self._lock:
            for place, (block, reader) in enumerate(self._blocks):
                if reader() is None:
                    view = self._view(block)
                    self._blocks[place] = block, weakref.ref(view)
                    return torch.from_numpy(view).view(self._dtype)
            block = np.empty(math.prod(self._byte_shape) + ALIGNMENT, np.uint8)
            view = self._view(block)
            if len(self._blocks) < self._most:
                self._blocks.append((block, weakref.ref(view)))
        # The tensor's storage holds this very array, so the array lives exactly as long as anything reads the memory.
        return torch.from_numpy(view).view(self._dtype)

    def _view(self, block: np.ndarray) -> np.ndarray:
        start = -block.ctypes.data % ALIGNMENT
        return block[start : start + math.prod(self._byte_shape)].reshape(self._byte_shape)
