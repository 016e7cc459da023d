"""Root-mean-square norms of Gemma and Llama; statistics in float32."""

import torch
from torch import Tensor, nn


def _rms_normalised(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """`x / rms(x) * (offset + weight)`: Gemma's offset is 1, Llama's 0. Returns `(normalised, None)`: no gate."""

    def __init__(self, width: int, eps: float = 1e-6, *, offset: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        normalised = _rms_normalised(x, self.eps) * (self.offset + self.weight.float())
        return normalised.to(x.dtype), None


class AdaRMSNorm(nn.Module):
    """RMS norm whose scale, shift and residual gate come from a condition (π0.5's, after DiT's adaLN).

    From scratch the modulation starts at scale 0, shift 0 and gate 1, an ordinary norm with live residual branches;
    a zero gate would leave a small network without a signal for its first hundreds of steps."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.dense = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.dense.weight)
        with torch.no_grad():
            self.dense.bias.copy_(torch.cat([torch.zeros(2 * width), torch.ones(width)]))

    def modulation(self, condition: Tensor) -> Tensor:
        """(B, width) -> (B, 1, 3 * width): scale, shift and gate. Nothing else of the norm reads the condition."""
        return self.dense(condition)[:, None]

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """`x` (B, N, width), `modulation` of B rows or of one for all -> normalised (B, N, width), gate (B or 1, 1, width)."""
        if modulation is None:
            raise ValueError("an adaptive norm needs its modulation; pass what its method of that name returns")
        scale, shift, gate = modulation.chunk(3, dim=-1)
        normalised = _rms_normalised(x, self.eps) * (1 + scale.float()) + shift.float()
        return normalised.to(x.dtype), gate.to(x.dtype)
