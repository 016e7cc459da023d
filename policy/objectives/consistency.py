"""Consistency between decisions: of several sampled chunks, the one that best goes on with the last.

An objective that samples several modes can jump from one to another at each decision; choosing the candidate that agrees
with what the previous chunk still had planned holds it to one. IMLE Policy (Rana et al. 2025, arXiv 2502.12371), with 32
candidates; it also forgets the previous chunk at every fifth decision, to leave a mode that leads nowhere.

B batch, K candidates, H horizon, A action dimensions.
"""

import torch
from torch import Tensor

from ..experts.expert import BoundExpert
from .objective import Objective


def sample_candidates(objective: Objective, bound: BoundExpert, noise_BKHA: Tensor) -> Tensor:
    """(B, K, H, A): a chunk for every noise, all of a row from the prefix that is encoded once."""
    batch, num_candidates = noise_BKHA.shape[:2]
    fanned = bound if num_candidates == 1 else bound.fan_out(num_candidates)
    chunks_BHA = objective.sample(fanned, noise_BKHA.flatten(0, 1))
    return chunks_BHA.unflatten(0, (batch, num_candidates))


def most_consistent(chunks_BKHA: Tensor, previous_BHA: Tensor | None, num_executed: int) -> Tensor:
    """(B, H, A): the candidate whose first H - `num_executed` steps are nearest (Euclidean) to the previous chunk's last.

    Chunks are normalised, so that dimensions compare, and hold only those of the robot: the rest of a wider vector is not
    trained. `previous` is the chunk chosen at the decision before, of which `num_executed` steps have been carried out;
    None, or a row of NaN, is an episode's first decision: candidate 0. Raises ValueError if the chunks do not overlap."""
    horizon = chunks_BKHA.shape[2]
    if not 0 < num_executed < horizon:
        raise ValueError(
            f"{num_executed} executed steps of a chunk of {horizon}: to compare chunks some steps must be left; execute from 1 to "
            f"{horizon - 1}"
        )
    if previous_BHA is None:
        return chunks_BKHA[:, 0]
    planned_B1HA = previous_BHA[:, None, num_executed:]
    distance_BK = (chunks_BKHA[:, :, :-num_executed] - planned_B1HA).square().sum(dim=(2, 3))
    is_first_B = previous_BHA.isnan().any(dim=2).any(dim=1)
    winner_B = distance_BK.argmin(dim=1).masked_fill(is_first_B, 0)
    return chunks_BKHA[torch.arange(len(winner_B), device=winner_B.device), winner_B]
