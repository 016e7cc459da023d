"""RS-IMLE: of several generated chunks, the nearest to the demonstration that is not already at it is pulled there.

The expert maps noise to a chunk in one call. Each demonstrated chunk picks among its own candidates: those within a small
radius are rejected, the nearest of the rest is trained. Every demonstration has a candidate near it in the end, so no mode
is dropped; how often each is drawn is not calibrated, and a chunk that is never the nearest is never corrected, so with many
candidates some lie between modes. Vashist, Peng & Li 2024 (RS-IMLE, arXiv 2409.17439); Rana et al. 2025 (IMLE Policy,
arXiv 2502.12371), whose rejection per demonstration this is.

B batch, K candidates per sample, H horizon, A action dimensions.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..experts.expert import BoundExpert
from .draws import DrawKeys
from .objective import Draw, Loss, fanned_out


@dataclass(frozen=True, kw_only=True)
class RSIMLE:
    """Nearest surviving candidate, searched without gradients and trained by one call with them."""

    type: Literal["rs_imle"] = "rs_imle"
    num_candidates: int = 20
    """Chunks generated per demonstration, IMLE Policy's number; each costs one call of the expert without gradients."""
    rejection_rms: float = 0.0053
    """A candidate this near to the demonstration is rejected: root mean square per element, in normalised units; 0 rejects
    only exact hits. IMLE Policy rejects below a distance of 0.03 for chunks of 16 steps of 2 numbers scaled onto [-1, 1], and
    0.03 / sqrt(32) = 0.0053; as a mean per element it means the same for chunks of any size."""
    output: Literal["action", "aligned"] = "action"
    """What the expert's output means: the chunk itself, or a velocity v, the chunk being `x - v(x, 1)`: from an expert
    pretrained by flow matching, training then starts at that expert's own one-step answer."""
    distance: Literal["l2", "squared"] = "l2"
    """What is made small for the chosen candidate: the Euclidean distance of the chunk, as published, which pulls at every
    sample alike; or the mean square over its elements, on the scale of a regression's, which pulls more at far ones."""

    def __post_init__(self) -> None:
        if self.num_candidates < 1:
            raise ValueError(f"objective.num_candidates is {self.num_candidates}; it must be at least 1")
        if not (math.isfinite(self.rejection_rms) and self.rejection_rms >= 0):
            raise ValueError(f"objective.rejection_rms is {self.rejection_rms}; it must be 0 or more")

    @property
    def has_second_level(self) -> bool:
        return False

    @property
    def num_sampling_steps(self) -> int:
        return 1

    def draw(self, actions_BHA: Tensor, keys: DrawKeys) -> Draw:
        """Row b * K + k is the noise of sample b's candidate k."""
        _, noise_BHA = keys.draw(self.num_candidates, tuple(actions_BHA.shape[1:]), actions_BHA.device)
        return Draw(noise_BHA=noise_BHA, noise_level_B=torch.ones_like(noise_BHA[:, 0, 0]))

    def loss(self, expert: BoundExpert, actions_BHA: Tensor, valid_BHA: Tensor, draw: Draw) -> Loss:
        """The weighted mean of the entries is the mean distance over samples that keep a candidate, each counting once
        however many valid steps it has, as published.

        With every candidate rejected the weight is 0 and the call with gradients still made: every rank makes the same calls,
        and backward has its graph. Search and weight know nothing of a weighting of dimensions that is put on afterwards (the
        gripper's); it scales the pull at these dimensions.

        Metrics: `rejection_rate`, the share of candidates rejected; `all_rejected_rate`, the share of samples without a
        survivor; `mean_nearest_distance`, of the nearest candidate, rejected or not, root mean square per element. They are
        means over all samples of the batch, hence may be averaged over ranks."""
        valid = valid_BHA.to(actions_BHA.dtype)
        count_B11 = valid.sum(dim=(1, 2), keepdim=True).clamp(min=1)
        with torch.no_grad():
            distance_BK = self._distances(expert, actions_BHA, valid_BHA, draw)
            rejected_BK = distance_BK <= self.rejection_rms * count_B11[:, :, 0].sqrt()
            winner_B = distance_BK.masked_fill(rejected_BK, math.inf).argmin(dim=1)  # 0 where all are rejected
            all_rejected_B = rejected_BK.all(dim=1)
            metrics = {
                "rejection_rate": rejected_BK.to(distance_BK.dtype).mean(),
                "all_rejected_rate": all_rejected_B.to(distance_BK.dtype).mean(),
                "mean_nearest_distance": (distance_BK.amin(dim=1) / count_B11[:, 0, 0].sqrt()).mean(),
            }
            noise_BKHA = draw.noise_BHA.unflatten(0, distance_BK.shape)
            noise_BHA = noise_BKHA[torch.arange(len(winner_B), device=winner_B.device), winner_B]
        entries_BHA = (self._generated(expert, noise_BHA) - actions_BHA).square()
        if self.distance == "l2":
            entries_BHA = _spread_over_entries(entries_BHA, valid, count_B11)
        weight_BHA = valid / count_B11 * ~all_rejected_B[:, None, None]
        return Loss(entries_BHA=entries_BHA, weight_BHA=weight_BHA, metrics=metrics)

    def sample(self, expert: BoundExpert, noise_BHA: Tensor) -> Tensor:
        return self._generated(expert, noise_BHA)

    def _distances(self, expert: BoundExpert, actions_BHA: Tensor, valid_BHA: Tensor, draw: Draw) -> Tensor:
        """(B, K), over valid entries."""
        batch = actions_BHA.shape[0]
        expert, actions_BHA, valid_BHA = fanned_out(expert, actions_BHA, valid_BHA, draw)
        square_BHA = (self._generated(expert, draw.noise_BHA) - actions_BHA).square() * valid_BHA
        return square_BHA.sum(dim=(1, 2)).sqrt().unflatten(0, (batch, -1))

    def _generated(self, expert: BoundExpert, noise_BHA: Tensor) -> Tensor:
        output_BHA = expert(noise_BHA, torch.ones_like(noise_BHA[:, 0, 0]))
        return noise_BHA - output_BHA if self.output == "aligned" else output_BHA


def _spread_over_entries(square_BHA: Tensor, valid_BHA: Tensor, count_B11: Tensor) -> Tensor:
    """Entries whose mean over a sample's valid ones is the root of the sum of squares, in value and in gradient.

    Not the root itself in every entry: weighting entries would then weight nothing, and its slope at 0, where a rejected
    candidate may stand, is infinite, which a weight of 0 would turn into NaN."""
    distance_B11 = (square_BHA * valid_BHA).sum(dim=(1, 2), keepdim=True).sqrt().detach()
    # With d² over the constant d the slope is twice that of the root: half of it stays without one.
    half_BHA = square_BHA * (count_B11 / (2 * distance_B11.clamp(min=1e-12)))
    return half_BHA + half_BHA.detach()
