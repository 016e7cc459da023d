"""A trained policy as a robot, a sweep or a server sees it: raw observations in, raw action chunks out."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Self, overload

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Observation, RawObservation
from ..data.language import Language
from ..data.prompt import prompt_text
from .checkpoints.folder import read_policy, weights_digest
from .checkpoints.public import PublicOptions, build_policy, embodiment_of_public, is_public, read_public
from .objectives.consistency import most_consistent, sample_candidates
from .policy import Policy


class ActingPolicy:
    """Prepares observations exactly as `vlatune prepare` prepared the training images, and acts on them.

    With several candidates a decision draws as many chunks and takes the one that best goes on with the last
    (`objectives/consistency.py`). What was decided before is the caller's to keep: acting changes nothing here."""

    def __init__(
        self,
        policy: Policy,
        language: Language,
        *,
        weights_hash: str,
        device: torch.device,
        num_candidates: int = 1,
    ) -> None:
        """Raises ValueError for less than one candidate."""
        if num_candidates < 1:
            raise ValueError(f"num_candidates is {num_candidates}; it must be at least 1")
        self.num_candidates = num_candidates
        self.policy = policy.eval().requires_grad_(False).to(device)
        self.language = language
        self.weights_hash = weights_hash
        self.device = device
        self.cameras = policy.embodiment.cameras
        self.image_rule = policy.embodiment.image_rule
        self.robot = policy.embodiment.robot
        self.observation_offsets = policy.config.observation_offsets
        self.horizon, self.action_dim = policy.action_shape
        self._objective = policy.config.objective
        self._random = np.random.default_rng()

    def with_sampling_steps(self, num_sampling_steps: int) -> Self:
        """The same policy, weights shared, with another number of integration (or denoising) steps.

        Raises ValueError for a number that the objective does not know, and where it samples in one step by its nature."""
        if num_sampling_steps == self.num_sampling_steps:
            return self
        if not any(field.name == "num_sampling_steps" for field in fields(self._objective)):
            raise ValueError(
                f"num_sampling_steps {num_sampling_steps}: the objective {self._objective.type!r} always takes {self.num_sampling_steps}; "
                "leave it out"
            )
        other = copy.copy(self)
        other._objective = replace(self._objective, num_sampling_steps=num_sampling_steps)  # type: ignore[arg-type]
        return other

    @property
    def num_sampling_steps(self) -> int:
        return self._objective.num_sampling_steps

    @property
    def sampling(self) -> Mapping[str, int | str]:
        """What decides the sampling besides weights and noise; of candidates only where there are several."""
        settings = {"objective": self._objective.type, "num_sampling_steps": self.num_sampling_steps}
        return settings if self.num_candidates == 1 else {**settings, "num_candidates": self.num_candidates}

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of the noise that `act` takes for an observation: (H, A), wider than a chunk where a pretrained policy's vectors are;
        (K, H, A) with K > 1 candidates."""
        one = self.policy.noise_shape
        return one if self.num_candidates == 1 else (self.num_candidates, *one)

    @overload
    def act(
        self,
        observations: RawObservation,
        noise: np.ndarray | None = None,
        *,
        previous: np.ndarray | None = None,
        num_executed_steps: int | None = None,
    ) -> np.ndarray: ...
    @overload
    def act(
        self,
        observations: Sequence[RawObservation],
        noise: np.ndarray | None = None,
        *,
        previous: np.ndarray | None = None,
        num_executed_steps: int | None = None,
    ) -> np.ndarray: ...
    def act(
        self,
        observations: RawObservation | Sequence[RawObservation],
        noise: np.ndarray | None = None,
        *,
        previous: np.ndarray | None = None,
        num_executed_steps: int | None = None,
    ) -> np.ndarray:
        """(B, H, robot's action dims) float32 actions in raw units; (H, dims) for one observation that is no sequence.

        `noise` is standard normal, (B, *noise_shape); None draws it. Only with several candidates are the last two read: `previous` is
        what this returned for these episodes at their decision before, NaN in the rows of those that begin (None where all do:
        then it is the first candidate), and `num_executed_steps` how many of its steps have been carried out since.

        Raises ValueError if an observation lacks a camera or has another number of observation offsets or state dims, or if
        chunks cannot be compared with the previous ones."""
        if isinstance(observations, RawObservation):
            last = None if previous is None else previous[None]
            chunk: np.ndarray = self.act([observations], noise, previous=last, num_executed_steps=num_executed_steps)[0]
            return chunk
        if noise is None:
            noise = self._random.standard_normal((len(observations), *self.noise_shape), dtype=np.float32)
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
            prepared = self._prepared(observations).to(self.device)
            drawn = torch.from_numpy(noise).float().to(self.device)
            if self.num_candidates == 1:
                actions_BHA = self.policy.sample(prepared, drawn, self._objective)
            else:
                actions_BHA = self._most_consistent(prepared, drawn, previous, num_executed_steps)
        actions: np.ndarray = actions_BHA.float().cpu().numpy()
        return actions

    def _most_consistent(
        self, observation: Observation, noise_BKHA: Tensor, previous: np.ndarray | None, num_executed_steps: int | None
    ) -> Tensor:
        """(B, H, robot's action dims), raw units. Chunks are compared as they were normalised, in the robot's dimensions."""
        policy = self.policy
        if num_executed_steps is None:
            raise ValueError(
                f"with {self.num_candidates} candidates num_executed_steps must say how many steps of a chunk are carried out before the "
                f"next decision: 1 to {self.horizon - 1}"
            )
        shape = (noise_BKHA.shape[0], self.horizon, self.action_dim)
        if previous is not None and previous.shape != shape:
            raise ValueError(
                f"the previous chunks are {previous.shape}, these will be {shape}: give those that act returned"
            )
        chunks_BKHA = sample_candidates(self._objective, policy.bind(observation), noise_BKHA)
        planned = None if previous is None else torch.from_numpy(previous).to(self.device)
        chosen: Tensor = policy.action_normaliser.inverse(
            most_consistent(
                policy.action_layout.inverse(chunks_BKHA).float(),
                None if planned is None else policy.action_normaliser(planned),
                num_executed_steps,
            )
        )
        return chosen

    def _prepared(self, observations: Sequence[RawObservation]) -> Observation:
        images = {}
        for camera in self.cameras:
            flat = np.concatenate([raw.images[camera] for raw in observations])
            prepared = self.image_rule.prepare(flat)
            images[camera] = torch.from_numpy(prepared).unflatten(0, (len(observations), -1))
        config = self.policy.config
        everywhere_T = np.ones(len(self.observation_offsets), dtype=bool)
        there_BT = torch.from_numpy(
            np.stack([everywhere_T if raw.there_T is None else raw.there_T for raw in observations])
        )
        state_BTS = torch.from_numpy(np.stack([raw.state_TS for raw in observations]))
        normalised_BS = self.policy.state_normaliser(state_BTS[:, -1].to(self.device)).cpu().numpy()
        texts = [
            prompt_text(config.prompt, raw.instruction, state_S)
            for raw, state_S in zip(observations, normalised_BS, strict=True)
        ]
        return Observation(
            images=images,
            image_mask=dict.fromkeys(self.cameras, there_BT),
            state_BTS=state_BTS,
            prompts=self.language.prompts(texts, embeddings=config.backbone.reads_embeddings),
        )


def load_policy(
    path: Path | str,
    *,
    device: str = "auto",
    public: PublicOptions | None = None,
    averaged: bool = False,
    num_candidates: int = 1,
) -> ActingPolicy:
    """The policy of a checkpoint folder, ours or a public one, ready to act.

    `device` is a torch device, or `auto`: CUDA where there is one. `public` tells what a public checkpoint does not say itself: the
    robot's camera names, how its pictures are turned, statistics. `num_candidates` chunks are drawn for a decision, and the one
    that best goes on with the last is taken. `averaged` takes a run's average weights (EMA). Raises DataError with what is missing, and
    ValueError for a device that is not there."""
    chosen = _device(device)
    policy, language, weights_hash = read_any_policy(Path(path), public, averaged=averaged)
    return ActingPolicy(policy, language, weights_hash=weights_hash, device=chosen, num_candidates=num_candidates)


def _device(name: str) -> torch.device:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cpu", *(["cuda"] if num_gpus else []), *(f"cuda:{k}" for k in range(num_gpus))]
    if name == "auto":
        return torch.device("cuda" if num_gpus else "cpu")
    if name not in there:
        raise ValueError(f"there is no device {name!r} here; there are auto, {', '.join(there)}")
    return torch.device(name)


def read_any_policy(
    folder: Path, public: PublicOptions | None = None, *, averaged: bool = False
) -> tuple[Policy, Language, str]:
    """The policy, float32 on the CPU, its language and its weights' hash, from a checkpoint of ours or a public one."""
    if not is_public(folder):
        return read_policy(folder, averaged=averaged)
    options = public or PublicOptions()
    checkpoint = read_public(folder, options)
    policy = build_policy(checkpoint, embodiment_of_public(checkpoint, options))
    encoder = checkpoint.tokenizer if policy.config.backbone.reads_embeddings else "none"
    return policy, Language.without_texts(checkpoint.tokenizer, encoder), weights_digest(policy.state_dict())
