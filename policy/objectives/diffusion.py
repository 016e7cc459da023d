"""Denoising diffusion with the squared-cosine schedule, as RDT-1B and Diffusion Policy train it.

`x = signal * action + noise_rate * noise` with signal² + noise_rate² = 1; the noise level is the diffusion step divided by
`num_train_steps`. Ho et al. 2020 (DDPM); Nichol & Dhariwal 2021 (the schedule); Salimans & Ho 2022 (v);
Song et al. 2021 (DDIM); Lu et al. 2022 (DPM-Solver++). Sampling steps are those of diffusers' schedulers.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..experts.expert import BoundExpert
from .draws import DrawKeys
from .objective import Draw, Loss, fanned_out


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """Diffusion with a few deterministic sampling steps; the defaults are RDT-1B's."""

    type: Literal["diffusion"] = "diffusion"
    prediction: Literal["sample", "epsilon", "v"] = "sample"
    """What the expert's output means: the clean action, the noise, or signal * noise - noise_rate * action."""
    num_train_steps: int = 1000
    """Levels of noise in training."""
    num_draws: int = 1
    """Noise draws per encoded observation: the expectation is the same, the gradient less noisy, the backbone's cost
    shared."""
    sampler: Literal["dpm_solver", "ddim"] = "dpm_solver"
    """How actions are sampled: DPM-Solver++ of second order, or DDIM; both without noise of their own."""
    num_sampling_steps: int = 5
    """Calls of the expert when acting."""
    clip: float | None = None
    """Bound on the clean action that each sampling step predicts, normalised units; None: no bound. 'epsilon' needs one:
    its first step divides by a signal of 5e-5, which makes a small error of the network a huge action."""

    def __post_init__(self) -> None:
        if self.num_draws < 1 or self.num_sampling_steps < 1:
            raise ValueError("objective.num_draws and objective.num_sampling_steps must be at least 1")
        if self.num_sampling_steps >= self.num_train_steps:
            raise ValueError(
                f"objective.num_sampling_steps is {self.num_sampling_steps}; it must be below objective.num_train_steps, "
                f"{self.num_train_steps}"
            )
        # diffusers' DDIM goes num_train_steps // num_sampling_steps levels down, wherever its next step begins.
        if self.sampler == "ddim" and self.num_train_steps % self.num_sampling_steps:
            raise ValueError(
                f"objective.num_sampling_steps is {self.num_sampling_steps}; 'ddim' needs a divisor of "
                f"objective.num_train_steps, {self.num_train_steps}"
            )
        if self.prediction == "epsilon" and self.clip is None:
            raise ValueError(
                "objective.prediction 'epsilon' cannot be sampled without a bound; set objective.clip, to 1 where actions are "
                "scaled onto [-1, 1]"
            )

    @property
    def has_second_level(self) -> bool:
        return False

    def draw(self, actions_BHA: Tensor, keys: DrawKeys) -> Draw:
        uniform_B, noise_BHA = keys.draw(self.num_draws, tuple(actions_BHA.shape[1:]), actions_BHA.device)
        step_B = torch.floor(uniform_B * self.num_train_steps)
        return Draw(noise_BHA=noise_BHA, noise_level_B=step_B / self.num_train_steps)

    def loss(self, expert: BoundExpert, actions_BHA: Tensor, valid_BHA: Tensor, draw: Draw) -> Loss:
        expert, actions_BHA, valid_BHA = fanned_out(expert, actions_BHA, valid_BHA, draw)
        signal_B11, noise_rate_B11 = self.rates(draw.noise_level_B)
        x_BHA = signal_B11 * actions_BHA + noise_rate_B11 * draw.noise_BHA
        target_BHA = self.target(actions_BHA, draw.noise_BHA, draw.noise_level_B)
        error_BHA = expert(x_BHA, draw.noise_level_B) - target_BHA
        return Loss(entries_BHA=error_BHA.square(), weight_BHA=valid_BHA.to(error_BHA.dtype), metrics={})

    def sample(self, expert: BoundExpert, noise_BHA: Tensor) -> Tensor:
        scheduler = self._scheduler()
        x_BHA = noise_BHA
        # The scheduler's steps and coefficients live on the CPU: reading them waits for no device.
        for step in scheduler.timesteps.tolist():
            level_B = torch.full_like(noise_BHA[:, 0, 0], step / self.num_train_steps)
            clean_BHA = self.clean(x_BHA, expert(x_BHA, level_B), level_B)
            x_BHA = scheduler.step(clean_BHA, step, x_BHA, return_dict=False)[0]
        return x_BHA

    def target(self, actions_BHA: Tensor, noise_BHA: Tensor, noise_level_B: Tensor) -> Tensor:
        """What the expert is to answer; `clean` undoes it."""
        if self.prediction == "sample":
            return actions_BHA
        if self.prediction == "epsilon":
            return noise_BHA
        signal_B11, noise_rate_B11 = self.rates(noise_level_B)
        return signal_B11 * noise_BHA - noise_rate_B11 * actions_BHA

    def rates(self, noise_level_B: Tensor) -> tuple[Tensor, Tensor]:
        """How much of a noisy action is signal, and how much noise: each (B, 1, 1) in the level's dtype, of squares that sum to 1.

        diffusers' `squaredcos_cap_v2` in closed form, on any device without a table: of its steps only the last, which
        would remove all of the signal, meets the cap."""
        step_B = torch.round(noise_level_B.double() * self.num_train_steps)
        before_B = _squared_cosine(step_B / self.num_train_steps)
        after_B = _squared_cosine((step_B + 1) / self.num_train_steps)
        power_B = torch.maximum(after_B, 1e-3 * before_B) / _squared_cosine(torch.zeros_like(step_B))
        signal_B, noise_rate_B = power_B.sqrt(), (1 - power_B).sqrt()
        return signal_B.to(noise_level_B.dtype)[:, None, None], noise_rate_B.to(noise_level_B.dtype)[:, None, None]

    def clean(self, x_BHA: Tensor, output_BHA: Tensor, noise_level_B: Tensor) -> Tensor:
        """The clean action that the expert's output means."""
        signal_B11, noise_rate_B11 = self.rates(noise_level_B)
        if self.prediction == "sample":
            clean_BHA = output_BHA
        elif self.prediction == "epsilon":
            clean_BHA = (x_BHA - noise_rate_B11 * output_BHA) / signal_B11
        else:
            clean_BHA = signal_B11 * x_BHA - noise_rate_B11 * output_BHA
        return clean_BHA if self.clip is None else clean_BHA.clamp(-self.clip, self.clip)

    def _scheduler(self) -> Any:
        """Fed with clean actions, whatever the expert predicts: a bound on them then bounds the noise they imply, too."""
        # Seconds to import, and only acting needs it.
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        scheduler: Any
        if self.sampler == "dpm_solver":
            scheduler = DPMSolverMultistepScheduler(
                num_train_timesteps=self.num_train_steps,
                beta_schedule="squaredcos_cap_v2",
                prediction_type="sample",
                algorithm_type="dpmsolver++",
                solver_order=2,
                solver_type="midpoint",
                lower_order_final=True,
                timestep_spacing="linspace",
                final_sigmas_type="zero",
            )
        else:
            scheduler = DDIMScheduler(
                num_train_timesteps=self.num_train_steps,
                beta_schedule="squaredcos_cap_v2",
                prediction_type="sample",
                clip_sample=False,
                # Its other spacings do not start where the noise is pure.
                timestep_spacing="trailing",
            )
        scheduler.set_timesteps(self.num_sampling_steps)
        if self.sampler == "dpm_solver":
            scheduler.set_begin_index(0)  # or it searches its timesteps for it
        return scheduler


def _squared_cosine(share: Tensor) -> Tensor:
    """Signal power after `share` of the steps, up to a factor; 0.008 keeps the first steps from being too small."""
    return torch.cos((share + 0.008) / 1.008 * (math.pi / 2)) ** 2
