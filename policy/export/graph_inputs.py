"""What goes into both graphs, by name, and the `Observation` that goes into the first.

Prefix graph: images.CAMERA (B, T, px, px, 3) uint8, image_mask.CAMERA (B, T) bool, state (B, T, S) float32 in raw units, prompt_ids (B, L) int64,
prompt_mask (B, L) bool, and prompt_embedding (B, L, E) float32 where the policy reads a text encoder's features.

Step graph: noisy_actions (B, H, A) and noise_level (B,), both float32, second_level (B,) where the objective has one, and the prefix graph's
outputs by their names."""

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from ...data.batch import Observation, Prompts

IMAGE, IMAGE_MASK, STATE = "images.", "image_mask.", "state"
PROMPT_IDS, PROMPT_MASK, PROMPT_EMBEDDING = "prompt_ids", "prompt_mask", "prompt_embedding"
NOISY_ACTIONS, NOISE_LEVEL, SECOND_LEVEL = "noisy_actions", "noise_level", "second_level"
Value = TypeVar("Value")


def named_inputs(observation: Observation) -> dict[str, Tensor]:
    prompts = observation.prompts
    named = {f"{IMAGE}{camera}": image for camera, image in observation.images.items()}
    named |= {f"{IMAGE_MASK}{camera}": observation.image_mask[camera] for camera in observation.images}
    named |= {STATE: observation.state_BTS, PROMPT_IDS: prompts.ids_BL, PROMPT_MASK: prompts.mask_BL}
    return named if prompts.embedding_BLE is None else {**named, PROMPT_EMBEDDING: prompts.embedding_BLE}


def observation_of(named: Mapping[str, Tensor]) -> Observation:
    """What `named_inputs` took apart."""
    return Observation(
        images=_by_camera(named, IMAGE),
        image_mask=_by_camera(named, IMAGE_MASK),
        state_BTS=named[STATE],
        prompts=Prompts(
            ids_BL=named[PROMPT_IDS], mask_BL=named[PROMPT_MASK], embedding_BLE=named.get(PROMPT_EMBEDDING)
        ),
    )


def _by_camera(named: Mapping[str, Value], start: str) -> dict[str, Value]:
    return {name.removeprefix(start): value for name, value in named.items() if name.startswith(start)}
