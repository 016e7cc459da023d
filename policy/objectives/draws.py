"""Random numbers as a function of (seed, optimizer step, global sample index): the same on any number of ranks."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DrawKeys:
    """Names the noise of one batch."""

    seed: int
    step: int
    """Optimizer step."""
    sample_index_B: Tensor
    """int64, global."""

    def draw(self, num_draws: int, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """Uniforms (B * num_draws,) and standard normals (B * num_draws, *shape), float32; row b * num_draws + k is
        sample b's k-th draw."""
        uniform, normal = [], []
        for index in self.sample_index_B.tolist():
            # Philox is a counter-based generator: any (seed, step, index) is a stream of its own.
            generator = np.random.Generator(np.random.Philox(key=[self.seed, (self.step << 40) + index]))
            uniform.append(generator.random(num_draws, dtype=np.float32))
            normal.append(generator.standard_normal((num_draws, *shape), dtype=np.float32))
        return (
            torch.from_numpy(np.concatenate(uniform)).to(device, non_blocking=True),
            torch.from_numpy(np.concatenate(normal)).to(device, non_blocking=True),
        )
