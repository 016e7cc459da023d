"""How chunks are sampled from an observation: plainly, or compiled for shapes that come again and again.

The compiled path is the plain one's mathematics: the same backbone, expert and objective, with projections merged, everything that
depends on noise levels alone computed once, and two compiled programs for each shape: one encodes an observation and binds the
expert, the other is a call of the expert. On a GPU both and the loop over the calls are one CUDA graph."""

import copy
import logging
from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
import torch._dynamo.config
from torch import Tensor

from ...data.batch import Observation
from ..execution import Compile
from ..experts.expert import LevelFeatures, SplitExpert
from ..objectives.objective import Objective
from ..policy import Policy
from .captured import CapturedSample, Sample
from .levels import AtKnownLevels, levels_of
from .merged import merge_projections
from .static_shapes import padded, shape_of

logger = logging.getLogger(__name__)

MAX_PROGRAMS = 64
"""Shapes that are compiled before torch refuses more; its own limit is 8, and a server meets more prompts and batches."""


MAX_REASON = 300
"""Characters of torch's message that are shown: its first sentences say what failed, the rest how to report it."""


Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


class Sampler(Protocol):
    """Shape letters: B batch, K candidates, H horizon, A the model's action dimensions, W those of the robot."""

    policy: Policy

    @property
    def is_compiled(self) -> bool: ...

    def chunks(self, observation: Observation, noise_BKHA: Tensor, objective: Objective) -> Tensor:
        """(B, K, H, W) float32, normalised: a chunk for every noise, on prefixes that are encoded once."""


class CompiledSampler:
    """See `Sampler`. Rows are padded to a few sizes of batch, and the shapes that come are compiled when they first do."""

    def __init__(self, policy: Policy, *, is_required: bool, backend: str = "inductor") -> None:
        """Merges the policy's projections: it can only act from here on. Where compiling fails: without `is_required` the reason is
        logged, once, and sampling goes on without; with it ValueError is raised. `backend` is torch.compile's."""
        merge_projections(policy)
        self.policy = policy
        self.is_required = is_required
        self.captures = True
        self._pool: Any = None
        self.programs: dict[tuple[object, ...], Sample] = {}
        self.why_eager: str | None = None
        self._features: dict[Objective, list[LevelFeatures]] = {}
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_PROGRAMS)
        options: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": False}
        if backend == "inductor" and next(policy.parameters()).is_cuda:
            options["mode"] = "max-autotune-no-cudagraphs"  # the graph that is captured below is the whole decision's
        self.encode: Callable[[Observation, int], SplitExpert] = torch.compile(self._encoded, **options)
        self.evaluate: Callable[[SplitExpert, Tensor, LevelFeatures], Tensor] = torch.compile(_evaluated, **options)

    def chunks(self, observation: Observation, noise_BKHA: Tensor, objective: Objective) -> Tensor:
        num_rows = noise_BKHA.shape[0]
        observation, noise_BKHA = padded(observation, noise_BKHA)
        if self.why_eager is None:
            try:
                sample = self._program(observation, noise_BKHA, objective)
                return sample(observation, noise_BKHA)[:num_rows]
            except RuntimeError as error:  # torch's of compiling and of capturing are of this kind
                self._give_up(error)
        return self._sampled(observation, noise_BKHA, objective, self._encoded, _evaluated)[:num_rows]

    @property
    def is_compiled(self) -> bool:
        return self.why_eager is None

    def in_parts(self, around_encode: Wrapper, around_evaluate: Wrapper) -> Self:
        """The same programs, each call of them wrapped; on a GPU they are launched one by one."""
        other = copy.copy(self)
        other.encode, other.evaluate = around_encode(self.encode), around_evaluate(self.evaluate)
        other.captures, other.programs = False, {}
        return other

    def _program(self, observation: Observation, noise_BKHA: Tensor, objective: Objective) -> Sample:
        key = (objective, *shape_of(observation, noise_BKHA))
        if key not in self.programs:

            def sample(observation: Observation, noise_BKHA: Tensor) -> Tensor:
                return self._sampled(observation, noise_BKHA, objective, self.encode, self.evaluate)

            self.programs[key] = sample
            if self.captures and noise_BKHA.is_cuda:
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                self.programs[key] = CapturedSample(sample, observation, noise_BKHA, pool=self._pool)
        return self.programs[key]

    def _sampled(
        self,
        observation: Observation,
        noise_BKHA: Tensor,
        objective: Objective,
        encode: Callable[[Observation, int], SplitExpert],
        evaluate: Callable[[SplitExpert, Tensor, LevelFeatures], Tensor],
    ) -> Tensor:
        batch, num_candidates = noise_BKHA.shape[:2]
        bound = encode(observation, num_candidates)
        expert = AtKnownLevels(bound, self._level_features(bound, noise_BKHA, objective), evaluate)
        chunks_BHA = objective.sample(expert, noise_BKHA.flatten(0, 1))
        return self.policy.action_layout.inverse(chunks_BHA).float().unflatten(0, (batch, num_candidates))

    def _level_features(self, bound: SplitExpert, noise_BKHA: Tensor, objective: Objective) -> list[LevelFeatures]:
        if objective not in self._features:
            levels = levels_of(objective, tuple(noise_BKHA.shape[2:]), noise_BKHA.device)
            self._features[objective] = [bound.level_features(*level) for level in levels]
        return self._features[objective]

    def _encoded(self, observation: Observation, num_candidates: int) -> SplitExpert:
        bound = self.policy.bind(observation)
        return bound if num_candidates == 1 else bound.fan_out(num_candidates)

    def _give_up(self, error: RuntimeError) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON]
        if self.is_required:
            raise ValueError(f"this policy cannot be compiled here ({reason}); act with --compile off") from error
        logger.warning("acting without compiled programs, more slowly: %s", reason)
        self.why_eager = reason
        self.programs.clear()


def _evaluated(bound: SplitExpert, x_BHA: Tensor, features: LevelFeatures) -> Tensor:
    return bound.evaluate(x_BHA, features)


class PlainSampler:
    """See `Sampler`: as it is trained."""

    is_compiled = False

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def chunks(self, observation: Observation, noise_BKHA: Tensor, objective: Objective) -> Tensor:
        return self.policy.chunks(observation, noise_BKHA, objective)


def sampler_for(policy: Policy, compile: Compile) -> Sampler:
    """`policy` is on its device, in its precision."""
    if compile == "off" or (compile == "auto" and not next(policy.parameters()).is_cuda):
        return PlainSampler(policy)
    return CompiledSampler(policy, is_required=compile == "on")
