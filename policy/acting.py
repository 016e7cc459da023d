"""A trained policy as a robot, a sweep or a server sees it: raw observations in, raw action chunks out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch

from ..data.batch import Observation, RawObservation
from ..data.language import Language
from ..data.prompt import prompt_text
from .checkpoints.folder import read_policy, weights_digest
from .checkpoints.public import PublicOptions, build_policy, embodiment_of_public, is_public, read_public
from .policy import Policy


class ActingPolicy:
    """Prepares observations exactly as `vlatune prepare` prepared the training images, and acts on them."""

    def __init__(self, policy: Policy, language: Language, *, weights_hash: str, device: torch.device) -> None:
        self.policy = policy.eval().requires_grad_(False).to(device)
        self.language = language
        self.weights_hash = weights_hash
        self.device = device
        self.cameras = policy.embodiment.cameras
        self.image_rule = policy.embodiment.image_rule
        self.robot = policy.embodiment.robot
        self.observation_offsets = policy.config.observation_offsets
        self.horizon, self.action_dim = policy.action_shape
        self._random = np.random.default_rng()

    @property
    def num_sampling_steps(self) -> int:
        return self.policy.config.objective.num_sampling_steps

    @property
    def sampling(self) -> Mapping[str, int | str]:
        """What decides the sampling besides weights and noise."""
        return {"objective": self.policy.config.objective.type, "num_sampling_steps": self.num_sampling_steps}

    @property
    def noise_shape(self) -> tuple[int, int]:
        """(H, A) of the noise that `act` takes; wider than a chunk where a pretrained policy's vectors are."""
        return self.policy.noise_shape

    @overload
    def act(self, observations: RawObservation, noise_BHA: np.ndarray | None = None) -> np.ndarray: ...
    @overload
    def act(self, observations: Sequence[RawObservation], noise_BHA: np.ndarray | None = None) -> np.ndarray: ...
    def act(
        self, observations: RawObservation | Sequence[RawObservation], noise_BHA: np.ndarray | None = None
    ) -> np.ndarray:
        """(B, H, robot's action dims) float32 actions in raw units; (H, dims) for one observation that is no sequence.

        `noise_BHA` is standard normal, (B, *noise_shape); None draws it. Raises ValueError if an observation lacks a camera or has
        another number of observation offsets or state dims."""
        if isinstance(observations, RawObservation):
            chunk: np.ndarray = self.act([observations], noise_BHA)[0]
            return chunk
        if noise_BHA is None:
            noise_BHA = self._random.standard_normal((len(observations), *self.noise_shape), dtype=np.float32)
        num_offsets, state_dim = len(self.observation_offsets), self.policy.embodiment.state_dim
        for raw in observations:
            missing = set(self.cameras) - raw.images.keys()
            if missing:
                raise ValueError(
                    f"the observation has cameras {sorted(raw.images)}, the policy needs {', '.join(self.cameras)}"
                )
            if raw.state_TS.shape != (num_offsets, state_dim):
                raise ValueError(
                    f"the observation's state is {raw.state_TS.shape}, the policy needs {(num_offsets, state_dim)}"
                )
        with torch.inference_mode():
            actions_BHA = self.policy.sample(
                self._prepared(observations).to(self.device), torch.from_numpy(noise_BHA).float().to(self.device)
            )
        actions: np.ndarray = actions_BHA.float().cpu().numpy()
        return actions

    def _prepared(self, observations: Sequence[RawObservation]) -> Observation:
        images = {}
        for camera in self.cameras:
            flat = np.concatenate([raw.images[camera] for raw in observations])
            prepared = self.image_rule.prepare(flat)
            images[camera] = torch.from_numpy(prepared).unflatten(0, (len(observations), -1))
        config = self.policy.config
        everywhere = torch.ones(len(observations), len(self.observation_offsets), dtype=torch.bool)
        state_BTS = torch.from_numpy(np.stack([raw.state_TS for raw in observations]))
        normalised_BS = self.policy.state_normaliser(state_BTS[:, -1].to(self.device)).cpu().numpy()
        texts = [
            prompt_text(config.prompt, raw.instruction, state_S)
            for raw, state_S in zip(observations, normalised_BS, strict=True)
        ]
        return Observation(
            images=images,
            image_mask=dict.fromkeys(self.cameras, everywhere),
            state_BTS=state_BTS,
            prompts=self.language.prompts(texts, embeddings=config.backbone.reads_embeddings),
        )


def load_policy(path: Path | str, *, device: str = "auto", public: PublicOptions | None = None) -> ActingPolicy:
    """The policy of a checkpoint folder, ours or a public one, ready to act.

    `device` is a torch device, or `auto`: CUDA where there is one. `public` tells what a public checkpoint does not say itself: the
    robot's camera names, how its pictures are turned, statistics. Raises DataError with what is missing."""
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    policy, language, weights_hash = read_any_policy(Path(path), public)
    return ActingPolicy(policy, language, weights_hash=weights_hash, device=chosen)


def read_any_policy(folder: Path, public: PublicOptions | None = None) -> tuple[Policy, Language, str]:
    """The policy, float32 on the CPU, its language and its weights' hash, from a checkpoint of ours or a public one."""
    if not is_public(folder):
        return read_policy(folder)
    options = public or PublicOptions()
    checkpoint = read_public(folder, options)
    policy = build_policy(checkpoint, embodiment_of_public(checkpoint, options))
    encoder = checkpoint.tokenizer if policy.config.backbone.reads_embeddings else "none"
    return policy, Language.without_texts(checkpoint.tokenizer, encoder), weights_digest(policy.state_dict())
