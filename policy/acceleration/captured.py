"""A function of tensors as one CUDA graph: recorded once, played back with one launch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...data.batch import Observation, mapped

Sample = Callable[[Observation, Tensor], Tensor]
"""(observation, noise) -> chunks."""
NUM_WARM_UPS = 3
"""Calls before the recording: kernels are compiled and tuned, libraries get their workspaces."""


class CapturedSample:
    """`sample` for one shape of inputs. What it reads and writes stays at one place in memory, keys and values of the prefix among them."""

    def __init__(self, sample: Sample, observation: Observation, noise: Tensor, *, pool: Any) -> None:
        """`pool` is memory that several graphs may share (`torch.cuda.graph_pool_handle`), since they are played one after another.

        Raises RuntimeError where something in `sample` cannot be recorded."""
        self.observation = mapped(observation, torch.clone)
        self.noise = noise.clone()
        with torch.cuda.device(noise.device):
            # A stream of this device: torch's default for recording belongs to the device that recorded first.
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(NUM_WARM_UPS):
                    sample(self.observation, self.noise)
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, pool=pool, stream=beside):
                    self.chunks = sample(self.observation, self.noise)
            torch.cuda.current_stream().wait_stream(beside)

    def __call__(self, observation: Observation, noise: Tensor) -> Tensor:
        """A new tensor, which the next graph's play does not touch; the inputs must have the shapes that were recorded."""
        for place, given in zip(_tensors(self.observation), _tensors(observation), strict=True):
            place.copy_(given)
        self.noise.copy_(noise)
        self.graph.replay()
        return self.chunks.clone()


def _tensors(observation: Observation) -> list[Tensor]:
    found: list[Tensor] = []

    def noted(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(observation, noted)
    return found
