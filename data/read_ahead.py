"""Batches made ahead of their use by a thread, and brought to the device there.

A thread and not processes: gathering, tokenising and copying let go of the interpreter, and no picture is ever pickled.
"""

import queue
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from .batch import Batch

NUM_READ_AHEAD = 3
"""Batches that the thread keeps ready."""


class _OnDevice:
    """A batch whose copy to a CUDA device has been ordered on a stream beside the one that computes."""

    def __init__(self, batch: Batch, stream: torch.cuda.Stream) -> None:
        """`stream` is the current one of the calling thread."""
        # The noise of a sample is drawn on the host: fetching its index back from the device would wait for all its work.
        self._batch = replace(batch.to(stream.device), sample_index_B=batch.sample_index_B)
        self._copied = stream.record_event()

    def batch(self) -> Batch:
        """The batch, for what is computed from here on in the caller's current stream. Nothing waits on the host."""
        device = self._batch.actions_BHA.device
        computing = torch.cuda.current_stream(device)
        computing.wait_event(self._copied)
        for tensor in _tensors(self._batch):
            if tensor.device == device:
                # Or its memory would be given to a later copy as soon as Python drops it, while kernels still read it.
                tensor.record_stream(computing)
        return self._batch


def read_ahead(batches: Iterator[Batch], device: torch.device | None = None) -> Iterator[Batch]:
    """The same batches; a thread runs `batches`, up to `NUM_READ_AHEAD` ahead.

    On a CUDA `device` they arrive as tensors there, but for `sample_index_B`; elsewhere they are as they were made. An error in the
    thread is raised here; closing or dropping the iterator ends the thread."""
    ready: queue.Queue[Batch | _OnDevice | BaseException] = queue.Queue(NUM_READ_AHEAD)
    stop = threading.Event()
    stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None

    def offer(item: Batch | _OnDevice | BaseException) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def run() -> None:
        try:
            # Makes the stream's device the thread's, too: pinned memory belongs to a device's context.
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                while not stop.is_set():
                    offer(next(batches) if stream is None else _OnDevice(next(batches), stream))
        except BaseException as error:  # noqa: BLE001  it is raised in the consumer's thread
            offer(error)

    thread = threading.Thread(target=run, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item.batch() if isinstance(item, _OnDevice) else item
            del item  # while the next one is awaited, its memory can be used again
    finally:
        stop.set()
        thread.join()


def _tensors(batch: Batch) -> Iterator[Tensor]:
    observation = batch.observation
    yield from observation.images.values()
    yield from (observation.features or {}).values()
    yield from observation.image_mask.values()
    yield from (observation.state_BTS, observation.prompts.ids_BL, observation.prompts.mask_BL)
    if observation.prompts.embedding_BLE is not None:
        yield observation.prompts.embedding_BLE
    yield from (batch.actions_BHA, batch.valid_BH)
