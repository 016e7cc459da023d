"""Watching for a loss or a gradient that is no number, without asking the device at every step."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..data.batch import Batch

NUM_NAMED = 16
"""Sample indices that the message gives."""


class FiniteGuard:
    """Remembers on the device which step was the first that went wrong; read where the loop stops for its numbers anyway."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._bad_loss = torch.full((), torch.inf, device=accelerator.device)
        self._bad_norm = torch.full((), torch.inf, device=accelerator.device)
        self._samples: list[tuple[int, Tensor]] = []

    def add(self, step: int, loss: Tensor, batch: Batch) -> None:
        """This rank's loss of a micro-batch."""
        self._bad_loss = _earliest(self._bad_loss, loss.detach(), step)
        self._samples.append((step, batch.sample_index_B))

    def add_norm(self, step: int, norm: Tensor | float) -> None:
        """All ranks' gradient."""
        if isinstance(norm, Tensor):
            self._bad_norm = _earliest(self._bad_norm, norm.detach(), step)

    def check(self, run: Path) -> None:
        """All ranks call this; all raise RuntimeError, naming the batch, if one of them met what is no number."""
        earliest = torch.minimum(self._bad_loss, self._bad_norm)
        first_step = float(self.accelerator.gather(earliest[None]).min())
        if first_step == torch.inf:
            self._samples.clear()
            return
        step = int(first_step)
        own_loss_is_bad = float(self._bad_loss) == step
        mine = [index for at, indices in self._samples if at == step for index in indices.tolist()]
        shares: list[tuple[bool, list[int]]] = gather_object([(own_loss_is_bad, mine)])
        guilty = [indices for is_bad, indices in shares if is_bad] or [indices for _, indices in shares]
        indices = sorted(index for part in guilty for index in part)
        more = f" and {len(indices) - NUM_NAMED} more" if len(indices) > NUM_NAMED else ""
        what = "loss" if any(is_bad for is_bad, _ in shares) else "gradient"
        raise RuntimeError(
            f"the {what} at step {step + 1} is not finite; its samples are the cache's frames "
            f"{', '.join(map(str, indices[:NUM_NAMED]))}{more}. Training stops; {run} keeps its last checkpoint. Look at these "
            "frames with `vlatune inspect`, or lower the learning rate"
        )


def _earliest(so_far: Tensor, value: Tensor, step: int) -> Tensor:
    return torch.where(torch.isfinite(value), so_far, so_far.clamp(max=float(step)))
