"""One policy answering many simulators: every forward at one batch size, every row's noise from its episode's key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..data.raw_observation import RawObservation
from .results import EpisodeKey


class PolicyUnderTest(Protocol):
    """What evaluation needs of a policy; `policy.acting.ActingPolicy` has it."""

    @property
    def cameras(self) -> tuple[str, ...]: ...
    @property
    def observation_offsets(self) -> tuple[int, ...]: ...
    @property
    def horizon(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def num_candidates(self) -> int:
        """Chunks drawn for a decision."""

    @property
    def reads_previous(self) -> bool:
        """Whether `act` reads what was decided before: with several candidates, or real-time chunking."""

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of the noise that `act` takes for an observation: (H, A), or (K, H, A) with K > 1 candidates."""

    @property
    def num_sampling_steps(self) -> int: ...
    @property
    def sampling(self) -> Mapping[str, Any]: ...
    def with_sampling_steps(self, num_sampling_steps: int) -> "PolicyUnderTest":
        """The same weights with another number of integration (or denoising) steps; raises `ValueError` where it cannot."""

    @property
    def weights_hash(self) -> str: ...
    @property
    def robot(self) -> str: ...
    @property
    def device(self) -> Any: ...

    def act(
        self,
        observations: Sequence[RawObservation],
        noise: np.ndarray,
        *,
        previous: np.ndarray | None = None,
        num_executed_steps: int | None = None,
        inference_delay: int = 0,
    ) -> np.ndarray:
        """(B, H, A) float32. The observations' pictures may change once it has returned."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One decision that an episode waits for."""

    key: EpisodeKey
    decision: int
    raw: RawObservation
    previous_HA: np.ndarray | None = None
    """The answer to the episode's decision before; None at its first."""
    num_over: int = 0
    """How many steps of that answer are carried out while this one is awaited, after those between the two observations."""


def noise_for(key: EpisodeKey, decision: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 of this shape: a function of the episode's key and the decision's index alone."""
    seed = [*np.frombuffer(key.noise_root(), np.uint32).tolist(), decision]
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


class PolicyServer:
    """A policy behind one fixed batch size: the last bits of a matrix product change with the batch size, and contacts
    amplify them, so a short batch is padded instead."""

    def __init__(self, policy: PolicyUnderTest, batch_size: int) -> None:
        self.policy = policy
        self.batch_size = batch_size

    def answer(self, questions: Sequence[Question]) -> np.ndarray:
        """(n, H, A) float32 for n <= `batch_size` questions, in one forward."""
        policy, spare = self.policy, self.batch_size - len(questions)
        noise = np.zeros((self.batch_size, *policy.noise_shape), np.float32)
        for row, question in zip(noise, questions, strict=False):
            row[:] = noise_for(question.key, question.decision, policy.noise_shape)
        observations = [question.raw for question in questions]
        observations += spare * observations[-1:]
        expected = (self.batch_size, policy.horizon, policy.action_dim)
        if not policy.reads_previous:
            chunk_BHA = policy.act(observations, noise)
        else:
            previous_BHA = np.full(expected, np.nan, np.float32)
            for row_HA, question in zip(previous_BHA, questions, strict=False):
                if question.previous_HA is not None:
                    row_HA[:] = question.previous_HA
            first = questions[0]  # what it says of steps is the same for all questions of a sweep
            chunk_BHA = policy.act(
                observations,
                noise,
                previous=previous_BHA,
                num_executed_steps=first.key.num_executed_steps,
                inference_delay=first.num_over,
            )
        if chunk_BHA.shape != expected:
            raise ValueError(f"the policy returned actions of shape {chunk_BHA.shape} instead of {expected}")
        return chunk_BHA[: len(questions)]
