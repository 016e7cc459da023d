"""Batches of few sizes, so that few programs serve all that may be asked."""

from dataclasses import replace

import torch
from torch import Tensor

from ...data.batch import Observation, mapped

LARGEST_POWER = 64


def bucket_size(num_rows: int) -> int:
    """The power of two that holds so many rows, the multiple of 64 beyond that."""
    if num_rows > LARGEST_POWER:
        return -(-num_rows // LARGEST_POWER) * LARGEST_POWER
    return 1 << (num_rows - 1).bit_length()


def padded(observation: Observation, noise_BKHA: Tensor) -> tuple[Observation, Tensor]:
    """Both with `bucket_size` rows; those that are added repeat the last. Which prompts are equal is not said any more."""
    num_rows = noise_BKHA.shape[0]
    missing = bucket_size(num_rows) - num_rows
    prompts = replace(observation.prompts, repeats=None)
    observation = replace(observation, prompts=prompts)
    if missing == 0:
        return observation, noise_BKHA

    def extended(rows: Tensor) -> Tensor:
        return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])

    return mapped(observation, extended), extended(noise_BKHA)


def shape_of(observation: Observation, noise_BKHA: Tensor) -> tuple[object, ...]:
    """What a program is made for: the shape and type of all that it reads."""
    shapes: list[object] = [tuple(noise_BKHA.shape), tuple(observation.images), tuple(observation.features or ())]

    def noted(tensor: Tensor) -> Tensor:
        shapes.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    mapped(observation, noted)
    return tuple(shapes)
