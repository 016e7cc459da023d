"""Conditions that training hides from a policy, and noise on its state, drawn on the device.

Every draw is a function of (seed, optimizer step, sample index), as in `augment.py`. Each condition of a sample is hidden apart from
the others and with the same probability, as RDT-1B trains:

    control frequency  0, an unknown one
    action mask        no entry of the vector counts as the robot's; RDT reads it beside the state and beside the actions
    state              the data's mean, for all observations of the sample
    picture            absent, each camera of each observation apart: RDT then reads its background, as where none was recorded
    instruction        the text encoder's features of the empty text

The noise is normal, of the data's deviation over sqrt(10 ** (decibels / 10)), in raw units; a hidden state has none.
Liu et al. 2024 (RDT-1B); https://github.com/thu-ml/RoboticsDiffusionTransformer.

Shape letters as in `batch.py`; K draws per sample.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .augment import uniform
from .batch import HiddenConditions, Observation, Prompts
from .normalise import FieldStatistics
from .windows import concatenate_prompts


@dataclass(frozen=True, kw_only=True)
class ConditionsConfig:
    """What training hides from the policy, or blurs, so that it leans on no single condition. Both are off unless asked for."""

    dropout: float = 0.0
    """Probability with which a sample lacks a condition, drawn for each apart: control frequency, action mask, state, instruction and
    every picture. For policies that read text features, such as RDT (which trains with 0.1)."""
    state_noise_db: float | None = None
    """Noise on the state: how far each dimension's deviation lies above it, in decibels; 40 (RDT) is noise of a hundredth. None: no noise."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"conditions.dropout is {self.dropout}; it must be at least 0 (off) and less than 1")
        if self.state_noise_db is not None and not math.isfinite(self.state_noise_db):
            raise ValueError(
                f"conditions.state_noise_db is {self.state_noise_db}; give a number of decibels, or leave it out"
            )


def harden(
    observation: Observation,
    config: ConditionsConfig,
    *,
    state: FieldStatistics,
    empty_text: Prompts | None,
    seed: int,
    step: int,
    sample_index_B: Tensor,
) -> Observation:
    """The observation with noise on its state and some of its conditions hidden. Nothing waits for the device.

    `state` has the mean and deviation of the raw states trained on; `empty_text` is one unpadded row, needed for dropout. Raises
    `ValueError` where an instruction is to be hidden and there are no text features."""
    device = observation.state_BTS.device
    index_B = sample_index_B.to(device, non_blocking=True)
    if config.state_noise_db is not None:
        noise_BTS = _state_noise(observation.state_BTS, state, config.state_noise_db, index_B, seed, step)
        observation = replace(observation, state_BTS=observation.state_BTS + noise_BTS)
    if config.dropout == 0:
        return observation
    if empty_text is None or observation.prompts.embedding_BLE is None:
        raise ValueError(
            "conditions.dropout hides instructions behind the features of the empty text, and there are no text features; set it to 0"
        )

    def hidden(condition: str, num_draws: int = 1) -> Tensor:
        """(B, K) bool."""
        return uniform(index_B, num_draws, seed, step, f"hidden {condition}") < config.dropout

    return replace(
        observation,
        image_mask={
            camera: mask_BT & ~hidden(f"picture of {camera}", mask_BT.shape[1])
            for camera, mask_BT in observation.image_mask.items()
        },
        state_BTS=torch.where(hidden("state")[..., None], _row(state.mean, device), observation.state_BTS),
        prompts=_without_instruction(observation.prompts, empty_text.to(device), hidden("instruction")[:, 0]),
        hidden=HiddenConditions(
            control_hz_B=hidden("control frequency")[:, 0], action_mask_B=hidden("action mask")[:, 0]
        ),
    )


def _state_noise(
    state_BTS: Tensor, state: FieldStatistics, decibels: float, index_B: Tensor, seed: int, step: int
) -> Tensor:
    shape = state_BTS.shape[1:]
    u_BK = uniform(index_B, shape.numel(), seed, step, "state noise")
    # The middle of each draw's 2 ** -24: at its left edge, 0 would be minus infinity.
    normal_BK = torch.special.ndtri(u_BK.double() + 2**-25).float()
    return normal_BK.unflatten(1, shape) * _row(state.std, state_BTS.device) / 10 ** (decibels / 20)


def _without_instruction(prompts: Prompts, empty_text: Prompts, hidden_B: Tensor) -> Prompts:
    both = concatenate_prompts([prompts, empty_text])
    embedding_BLE = both.embedding_BLE
    assert embedding_BLE is not None  # `harden` saw to it
    return Prompts(
        ids_BL=torch.where(hidden_B[:, None], both.ids_BL[-1], both.ids_BL[:-1]),
        mask_BL=torch.where(hidden_B[:, None], both.mask_BL[-1], both.mask_BL[:-1]),
        embedding_BLE=torch.where(hidden_B[:, None, None], embedding_BLE[-1], embedding_BLE[:-1]),
    )


def _row(values: tuple[float, ...] | None, device: torch.device) -> Tensor:
    """(S,) float32."""
    assert values is not None  # statistics of caches are whole
    return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)
