"""A trained policy as a robot, a sweep or a server sees it: raw observations in, raw action chunks out."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Self, overload

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Observation, RawObservation
from ..data.language import Language
from .acceleration.sampler import sampler_for
from .checkpoints.folder import read_policy, weights_digest
from .checkpoints.public import PublicOptions, build_policy, embodiment_of_public, is_public, read_public
from .execution import Compile, Precision
from .objectives.consistency import most_consistent
from .objectives.real_time import RealTimeChunking
from .policy import Policy
from .preparation import Reading, prepared

logger = logging.getLogger(__name__)


class ActingPolicy:
    """Prepares observations exactly as `vlatune prepare` prepared the training images, and acts on them.

    With several candidates a decision draws as many chunks and takes the one that best goes on with the last
    (`objectives/consistency.py`); with real-time chunking the one chunk is held to the last (`objectives/real_time.py`). What was
    decided before is the caller's to keep: acting changes nothing here."""

    def __init__(
        self,
        policy: Policy,
        language: Language,
        *,
        weights_hash: str,
        device: torch.device,
        num_candidates: int = 1,
        real_time_chunking: RealTimeChunking | None = None,
        compile: Compile = "off",
        precision: Precision = "float32",
    ) -> None:
        """`policy` is taken over: with `compile` its projections are merged.

        Raises ValueError for less than one candidate, and for real-time chunking with several, compiled, or where the objective cannot."""
        if num_candidates < 1:
            raise ValueError(f"num_candidates is {num_candidates}; it must be at least 1")
        if real_time_chunking is not None:
            real_time_chunking.check_kind(policy.config.objective)  # steps are checked when they are known
            if num_candidates > 1:
                raise ValueError(
                    f"num_candidates is {num_candidates}, and real-time chunking holds one chunk to the last; leave one of the two out"
                )
            if compile == "on":
                raise ValueError(
                    "compile is 'on', and real-time chunking needs the expert's derivative, which is not compiled; leave one of the two out"
                )
        self.num_candidates = num_candidates
        self.real_time_chunking = real_time_chunking
        self.policy = policy.eval().requires_grad_(False).to(device)
        for part in (policy.backbone, policy.expert):  # statistics stay in float32
            part.to(getattr(torch, precision))
        self.precision = precision
        if compile == "auto" and real_time_chunking is not None:
            logger.warning("acting without compiled programs: real-time chunking needs the expert's derivative")
            compile = "off"
        self.sampler = sampler_for(policy, compile)
        self.language = language
        self.weights_hash = weights_hash
        self.device = device
        self.cameras = policy.embodiment.cameras
        self.image_rule = policy.embodiment.image_rule
        self.robot = policy.embodiment.robot
        self.observation_offsets = policy.config.observation_offsets
        self.horizon, self.action_dim = policy.action_shape
        self._objective = policy.config.objective
        self._reading = Reading(
            cameras=self.cameras,
            image_rule=self.image_rule,
            num_offsets=len(self.observation_offsets),
            state_dim=policy.embodiment.state_dim,
            prompt=policy.config.prompt,
            reads_embeddings=policy.config.backbone.reads_embeddings,
        )
        self._random = np.random.default_rng()

    def with_sampling_steps(self, num_sampling_steps: int) -> Self:
        """The same policy, weights shared, with another number of integration (or denoising) steps.

        Raises ValueError for a number that the objective does not know, and where it samples in one step by its nature."""
        if num_sampling_steps == self.num_sampling_steps:
            if self.real_time_chunking is not None:
                self.real_time_chunking.checked(self._objective)
            return self
        if not any(field.name == "num_sampling_steps" for field in fields(self._objective)):
            raise ValueError(
                f"num_sampling_steps {num_sampling_steps}: the objective {self._objective.type!r} always takes {self.num_sampling_steps}; "
                "leave it out"
            )
        other = copy.copy(self)
        other._objective = replace(self._objective, num_sampling_steps=num_sampling_steps)  # type: ignore[arg-type]
        if self.real_time_chunking is not None:
            self.real_time_chunking.checked(other._objective)
        return other

    @property
    def num_sampling_steps(self) -> int:
        return self._objective.num_sampling_steps

    @property
    def sampling(self) -> Mapping[str, bool | int | float | str]:
        """What decides the sampling besides weights and noise; of all but the objective and its steps only what is asked for."""
        settings: dict[str, bool | int | float | str] = {
            "objective": self._objective.type,
            "num_sampling_steps": self.num_sampling_steps,
        }
        if self.num_candidates > 1:
            settings["num_candidates"] = self.num_candidates
        if self.real_time_chunking is not None:
            settings["real_time_chunking"] = self.real_time_chunking.schedule
            settings["max_guidance"] = self.real_time_chunking.max_guidance
        if self.sampler.is_compiled:
            settings["compiled"] = True
        if self.precision != "float32":
            settings["precision"] = self.precision
        return settings

    @property
    def reads_previous(self) -> bool:
        """Whether `act` reads what was decided before."""
        return self.num_candidates > 1 or self.real_time_chunking is not None

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
        inference_delay: int = 0,
    ) -> np.ndarray: ...
    @overload
    def act(
        self,
        observations: Sequence[RawObservation],
        noise: np.ndarray | None = None,
        *,
        previous: np.ndarray | None = None,
        num_executed_steps: int | None = None,
        inference_delay: int = 0,
    ) -> np.ndarray: ...
    def act(
        self,
        observations: RawObservation | Sequence[RawObservation],
        noise: np.ndarray | None = None,
        *,
        previous: np.ndarray | None = None,
        num_executed_steps: int | None = None,
        inference_delay: int = 0,
    ) -> np.ndarray:
        """(B, H, robot's action dims) float32 actions in raw units; (H, dims) for one observation that is no sequence.

        `noise` is standard normal, (B, *noise_shape); None draws it. The last three are read only where `reads_previous`: `previous` is
        what this returned for these episodes at their decision before, NaN in the rows of those that begin (None where all do:
        then it is the first candidate, or the plain chunk), and `num_executed_steps` how many of its steps have been carried out between
        the two observations. `inference_delay`, for real-time chunking, is how many more of its steps will have been when this
        decision is there: as many steps of the new chunk are then over, and are made to be the same.

        Raises ValueError if an observation lacks a camera or has another number of observation offsets or state dims, or if
        chunks cannot be compared with the previous ones."""
        if isinstance(observations, RawObservation):
            last = None if previous is None else previous[None]
            chunk: np.ndarray = self.act(
                [observations],
                noise,
                previous=last,
                num_executed_steps=num_executed_steps,
                inference_delay=inference_delay,
            )[0]
            return chunk
        if noise is None:
            noise = self._random.standard_normal((len(observations), *self.noise_shape), dtype=np.float32)
        # Tensors made in inference mode could have no gradients later.
        with torch.no_grad(), torch.inference_mode(self.real_time_chunking is None):
            observation = self._prepared(observations).to(self.device)
            drawn = torch.from_numpy(noise).float().to(self.device)
            if self.real_time_chunking is not None:
                chunk_BHA = self._going_on(
                    self.real_time_chunking, observation, drawn, previous, num_executed_steps, inference_delay
                )
            elif self.num_candidates == 1:
                chunk_BHA = self.sampler.chunks(observation, drawn[:, None], self._objective)[:, 0]
            else:
                chunk_BHA = self._most_consistent(observation, drawn, previous, num_executed_steps)
            actions: np.ndarray = self.policy.action_normaliser.inverse(chunk_BHA).cpu().numpy()
        return actions

    def candidates(
        self, observations: Sequence[RawObservation], num_candidates: int, noise: np.ndarray | None = None
    ) -> np.ndarray:
        """(B, K, H, robot's action dims) float32, raw units: K chunks for each observation, which is encoded once. For choosing the best
        of them, or for how sure the policy is: `.std(axis=1)` is their spread, by step and dimension.

        `noise` is standard normal, (B, K, H, A) with (H, A) the shape of one chunk's; None draws it. Raises ValueError as `act` does."""
        if num_candidates < 1:
            raise ValueError(f"num_candidates is {num_candidates}; it must be at least 1")
        if noise is None:
            shape = (len(observations), num_candidates, *self.policy.noise_shape)
            noise = self._random.standard_normal(shape, dtype=np.float32)
        with torch.inference_mode():
            observation = self._prepared(observations).to(self.device)
            drawn = torch.from_numpy(noise).float().to(self.device)
            chunks_BKHA = self.sampler.chunks(observation, drawn, self._objective)
            actions: np.ndarray = self.policy.action_normaliser.inverse(chunks_BKHA).cpu().numpy()
        return actions

    def _most_consistent(
        self, observation: Observation, noise_BKHA: Tensor, previous: np.ndarray | None, num_executed_steps: int | None
    ) -> Tensor:
        """(B, H, robot's action dims), normalised."""
        if num_executed_steps is None:
            raise ValueError(
                f"with {self.num_candidates} candidates num_executed_steps must say how many steps of a chunk are carried out before the "
                f"next decision: 1 to {self.horizon - 1}"
            )
        planned = self._of_before(previous, noise_BKHA.shape[0])
        return most_consistent(
            self.sampler.chunks(observation, noise_BKHA, self._objective),
            None if planned is None else self.policy.action_normaliser(planned.to(self.device)),
            num_executed_steps,
        )

    def _going_on(
        self,
        chunking: RealTimeChunking,
        observation: Observation,
        noise_BHA: Tensor,
        previous: np.ndarray | None,
        num_executed_steps: int | None,
        inference_delay: int,
    ) -> Tensor:
        """(B, H, robot's action dims), normalised. Chunks are held to the last as they are in the model, in the robot's dimensions."""
        policy = self.policy
        if num_executed_steps is None:
            raise ValueError(
                "with real-time chunking num_executed_steps must say how many steps of a chunk are carried out between two observations: "
                f"1 to {self.horizon - 1}"
            )
        planned = self._of_before(previous, noise_BHA.shape[0])
        if planned is None:
            planned = torch.full((noise_BHA.shape[0], self.horizon, self.action_dim), torch.nan)
        has_previous_B = ~planned.isnan().any(dim=2).any(dim=1)
        planned = planned.nan_to_num(0).to(self.device)
        laid_out_BHA = chunking.sample(
            self._objective,
            policy.bind(observation),
            noise_BHA,
            policy.action_layout(policy.action_normaliser(planned)).float(),
            has_previous_B,
            policy.action_layout.mask_W,
            num_executed=num_executed_steps,
            inference_delay=inference_delay,
        )
        return policy.action_layout.inverse(laid_out_BHA).float()

    def _of_before(self, previous: np.ndarray | None, batch: int) -> Tensor | None:
        """The previous chunks, raw units, on the CPU; raises ValueError unless they are of this policy's shape."""
        if previous is None:
            return None
        shape = (batch, self.horizon, self.action_dim)
        if previous.shape != shape:
            raise ValueError(
                f"the previous chunks are {previous.shape}, these will be {shape}: give those that act returned"
            )
        return torch.from_numpy(previous)

    def _prepared(self, observations: Sequence[RawObservation]) -> Observation:
        return prepared(observations, self._reading, self.language, self._normalised)

    def _normalised(self, state_BS: np.ndarray) -> np.ndarray:
        on_device_BS = torch.from_numpy(state_BS).to(self.device)
        normalised_BS: np.ndarray = self.policy.state_normaliser(on_device_BS).cpu().numpy()
        return normalised_BS


def load_policy(
    path: Path | str,
    *,
    device: str = "auto",
    public: PublicOptions | None = None,
    averaged: bool = False,
    num_candidates: int = 1,
    real_time_chunking: RealTimeChunking | None = None,
    compile: Compile = "off",
    precision: Precision = "float32",
) -> ActingPolicy:
    """The policy of a checkpoint folder, ours or a public one, ready to act.

    `device` is a torch device, or `auto`: CUDA where there is one. `public` tells what a public checkpoint does not say itself: the
    robot's camera names, how its pictures are turned, statistics. `num_candidates` chunks are drawn for a decision, and the one
    that best goes on with the last is taken; `real_time_chunking` holds the one chunk to the last. `averaged` takes a run's average
    weights (EMA). `compile` and `precision` are those of `execution.py`. Raises DataError with what is missing, and ValueError
    for a device that is not there."""
    chosen = _device(device)
    policy, language, weights_hash = read_any_policy(Path(path), public, averaged=averaged)
    return ActingPolicy(
        policy,
        language,
        weights_hash=weights_hash,
        device=chosen,
        num_candidates=num_candidates,
        real_time_chunking=real_time_chunking,
        compile=compile,
        precision=precision,
    )


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
