"""How fast a run is beside what its device could do, and how much memory it took."""

import resource
import sys

import torch
from accelerate import Accelerator

from ..data.batch import Batch
from ..policy.policy import Policy
from .cost import flops_per_sample, peak_flops


class Speed:
    """Of one rank; all ranks do the same work."""

    def __init__(self, accelerator: Accelerator, policy: Policy, batch: Batch) -> None:
        """`batch` stands for all: its shapes say what a sample costs. Counts that once, a second or two for billions of parameters."""
        self.num_ranks = accelerator.num_processes
        self.device = accelerator.device
        self.flops_per_sample = flops_per_sample(policy, batch)
        self.peak_flops = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None

    def values(self, samples_per_s: float) -> dict[str, float]:
        """`samples_per_s_per_device`; `tflops_per_device`, 10^12 model operations a second, where what activation checkpointing computes
        again does not count; `mfu`, their share of the device's dense bfloat16 speed, where that is known; `peak_memory_gb` (10^9
        bytes): what torch has held on the GPU at most, without one the process's memory."""
        per_device = samples_per_s / self.num_ranks
        flops = per_device * self.flops_per_sample
        utilisation = {} if self.peak_flops is None else {"mfu": flops / self.peak_flops}
        return {
            "samples_per_s_per_device": per_device,
            "tflops_per_device": flops / 1e12,
            **utilisation,
            "peak_memory_gb": self._peak_bytes() / 1e9,
        }

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak  # bytes there, kibibytes here
