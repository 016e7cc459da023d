"""Real-time chunking: a sampled chunk that goes on with the one that the robot is still carrying out.

A decision takes time. A robot that does not stop meanwhile carries out d more steps of the chunk it has, and the new chunk, made from
an observation that is d steps old by then, should begin with just these steps and leave the old plan gradually: inpainting, without
training. While flow's velocity is integrated, the clean chunk that it points to is pulled towards what is still planned:

    corrected velocity = velocity - min(beta, ((1 - level)² + level²) / (level (1 - level))) Jᵀ W (planned - clean)

with clean = x - level * velocity, J its derivative by x (one vector-Jacobian product, a backward pass through the expert a call) and W
the soft mask over the horizon. Black, Galliker, Levine 2025, arXiv 2506.07339, algorithm 1, whose time runs the other way.

B batch, H horizon, A entries of the model's action vector.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..experts.expert import BoundExpert
from . import ObjectiveConfig
from .flow import Flow, Velocity, integrated

Schedule = Literal["exponential", "linear", "ones", "zeros"]


@dataclass(frozen=True, kw_only=True)
class RealTimeChunking:
    """How strongly a new chunk is held to what the last one still has planned."""

    schedule: Schedule = "exponential"
    """What a planned step counts, after those that are carried out before the new chunk is there (they count 1): falling exponentially
    (the paper's) or linearly to 0 at the plan's end, 1 all through, or nothing."""
    max_guidance: float = 5.0
    """The correction's greatest weight, the paper's beta; at most the number of sampling steps, each of which would else go past the
    plan."""

    def __post_init__(self) -> None:
        if not 0 < self.max_guidance < math.inf:
            raise ValueError(f"max_guidance is {self.max_guidance:g}; it must be more than 0, the paper's is 5")

    @classmethod
    def asked_for(cls, schedule: "Schedule | Literal['off']", max_guidance: float) -> "RealTimeChunking | None":
        """As commands ask for it."""
        return None if schedule == "off" else cls(schedule=schedule, max_guidance=max_guidance)

    @staticmethod
    def check_kind(objective: ObjectiveConfig) -> Flow:
        """The objective, if its sampling can be corrected in enough steps; raises `ValueError` if in none."""
        flow = objective if isinstance(objective, Flow) else None
        if flow is None:
            raise ValueError(
                f"real-time chunking corrects the velocity that 'flow' integrates, and the objective {objective.type!r} samples otherwise; "
                "leave it out, or train with flow"
            )
        return flow

    def checked(self, objective: ObjectiveConfig) -> Flow:
        """The objective, if its sampling can be corrected; raises `ValueError` if not."""
        flow = self.check_kind(objective)
        if self.max_guidance > flow.num_sampling_steps:
            raise ValueError(
                f"max_guidance is {self.max_guidance:g} and num_sampling_steps {flow.num_sampling_steps}: a correction would go past the plan "
                f"in one step; give max_guidance {flow.num_sampling_steps} or less, or sample in more steps"
            )
        return flow

    def mask(self, horizon: int, num_executed: int, inference_delay: int) -> Tensor:
        """(H,): what each step of the new chunk is held to the plan. The plan is the previous chunk's last H - `num_executed` steps, and
        `inference_delay` of them are carried out before the new chunk is there.

        Raises `ValueError` if these numbers contradict each other."""
        if not 0 < num_executed < horizon:
            raise ValueError(
                f"{num_executed} executed steps of a chunk of {horizon}: to go on with a plan some of its steps must be left; execute from 1 "
                f"to {horizon - 1}"
            )
        most = min(num_executed, horizon - num_executed)
        if not 0 <= inference_delay <= most:
            raise ValueError(
                f"an inference delay of {inference_delay} steps with {num_executed} executed of a chunk of {horizon}: the plan ends, or the next "
                f"decision is due, before it is over; the delay can be 0 to {most}"
            )
        step_H, num_planned = torch.arange(horizon), horizon - num_executed
        share_H = ((num_planned - step_H) / (num_planned - inference_delay + 1)).clamp(0, 1)
        if self.schedule == "exponential":
            share_H = share_H * torch.expm1(share_H) / math.expm1(1)
        elif self.schedule != "linear":
            share_H = torch.full_like(share_H, float(self.schedule == "ones"))
        share_H = torch.where(step_H < inference_delay, 1.0, share_H)
        return torch.where(step_H < num_planned, share_H, 0.0)

    def sample(
        self,
        objective: ObjectiveConfig,
        expert: BoundExpert,
        noise_BHA: Tensor,
        previous_BHA: Tensor,
        has_previous_B: Tensor,
        used_A: Tensor,
        *,
        num_executed: int,
        inference_delay: int,
    ) -> Tensor:
        """(B, H, A): chunks like `objective.sample`'s, those with a previous chunk held to it; the others are the plain ones bit for bit.

        All is normalised. `previous_BHA` are the chunks of the decision before, finite, and read where `has_previous_B`, which lies on
        the CPU; `used_A` is True for the entries that the robot has, the rest of a wider vector being free. Gradients are switched on
        for the expert's input; not within `torch.inference_mode`, whose tensors have none. Raises `ValueError` as `checked` and
        `mask` do."""
        flow = self.checked(objective)
        mask_H = self.mask(noise_BHA.shape[1], num_executed, inference_delay).to(noise_BHA)
        if not has_previous_B.any():
            return flow.sample(expert, noise_BHA)
        planned_BHA = torch.zeros_like(noise_BHA)
        planned_BHA[:, : noise_BHA.shape[1] - num_executed] = previous_BHA[:, num_executed:]
        guided_BHA = integrated(
            self._guided(flow.velocity(expert), planned_BHA, mask_H[:, None] * used_A),
            noise_BHA,
            num_steps=flow.num_sampling_steps,
            solver=flow.solver,
        )
        if has_previous_B.all():
            return guided_BHA
        # With gradients attention may take another kernel, whose last bits differ: beginners are sampled as if they were alone.
        has_previous_B = has_previous_B.to(noise_BHA.device)
        return torch.where(has_previous_B[:, None, None], guided_BHA, flow.sample(expert, noise_BHA))

    def _guided(self, velocity: Velocity, planned_BHA: Tensor, mask_HA: Tensor) -> Velocity:
        def guided(x_BHA: Tensor, level_B: Tensor) -> Tensor:
            level_B11 = level_B[:, None, None]
            with torch.enable_grad():
                x_BHA = x_BHA.detach().requires_grad_()
                velocity_BHA = velocity(x_BHA, level_B)
                clean_BHA = x_BHA - level_B11 * velocity_BHA
            missing_BHA = mask_HA * (planned_BHA - clean_BHA.detach())
            (pull_BHA,) = torch.autograd.grad(clean_BHA, x_BHA, missing_BHA)
            # Infinite at level 1, where sampling begins.
            strength_B11 = ((1 - level_B11) ** 2 + level_B11**2) / (level_B11 * (1 - level_B11))
            return velocity_BHA.detach() - strength_B11.clamp(max=self.max_guidance) * pull_BHA

        return guided
