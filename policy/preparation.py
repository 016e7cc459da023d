"""Raw observations as a policy reads them: pictures turned and resized, texts tokenised, all of it stacked.

Exactly what `vlatune prepare` does to training data. Imports no model: an exported policy prepares with this, too."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..data.batch import Observation, RawObservation
from ..data.images import ImageRule
from ..data.language import Language
from ..data.prompt import PromptStyle, prompt_text


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a policy reads of an observation, and how."""

    cameras: tuple[str, ...]
    image_rule: ImageRule
    num_offsets: int
    """Observations that a decision reads."""
    state_dim: int
    prompt: PromptStyle
    reads_embeddings: bool
    """Whether prompts carry a text encoder's features."""
    prompt_bucket: int = 8
    """Prompts are padded to a multiple of so many tokens."""


def prepared(
    observations: Sequence[RawObservation],
    reading: Reading,
    language: Language,
    normalised: Callable[[np.ndarray], np.ndarray],
) -> Observation:
    """On the CPU. `normalised` takes the newest states (B, S) to what π0.5's prompts say of them.

    Raises ValueError if an observation lacks a camera or has another number of observation offsets or state dims."""
    state_shape = (reading.num_offsets, reading.state_dim)
    for raw in observations:
        missing = set(reading.cameras) - raw.images.keys()
        if missing:
            raise ValueError(
                f"the observation has cameras {sorted(raw.images)}, the policy needs {', '.join(reading.cameras)}"
            )
        if raw.state_TS.shape != state_shape:
            raise ValueError(f"the observation's state is {raw.state_TS.shape}, the policy needs {state_shape}")
    images = {}
    for camera in reading.cameras:
        flat = np.concatenate([raw.images[camera] for raw in observations])
        pictures = reading.image_rule.prepare(flat)
        images[camera] = torch.from_numpy(pictures).unflatten(0, (len(observations), -1))
    everywhere_T = np.ones(reading.num_offsets, dtype=bool)
    there_BT = torch.from_numpy(
        np.stack([everywhere_T if raw.there_T is None else raw.there_T for raw in observations])
    )
    state_BTS = np.stack([raw.state_TS for raw in observations]).astype(np.float32, copy=False)
    texts = [
        prompt_text(reading.prompt, raw.instruction, state_S)
        for raw, state_S in zip(observations, normalised(state_BTS[:, -1]), strict=True)
    ]
    return Observation(
        images=images,
        image_mask=dict.fromkeys(reading.cameras, there_BT),
        state_BTS=torch.from_numpy(state_BTS),
        prompts=language.prompts(texts, embeddings=reading.reads_embeddings, bucket=reading.prompt_bucket),
    )
