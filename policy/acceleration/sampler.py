"""How chunks are sampled from an observation: plainly, or compiled for shapes that come again and again.

The compiled path is the plain one's mathematics: the same backbone, expert and objective, with projections merged, everything that
depends on noise levels alone computed once, and two compiled programs for each shape: one encodes an observation and binds the
expert, the other is a call of the expert. On a GPU both and the loop over the calls are one CUDA graph."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
import torch._dynamo.config
from torch import Tensor

from ...data.batch import Observation
from ..execution import Compile
from ..experts.expert import LevelFeatures, SplitExpert
from ..objectives.objective import Objective
from ..policy import Policy
from .captured import CapturedSample, Sample
from .levels import AtKnownLevels, Evaluate, levels_of
from .merged import merge_projections
from .static_shapes import padded, shape_of

logger = logging.getLogger(__name__)

MAX_PROGRAMS = 64
"""Shapes that a sampler compiles: as many batches and prompts as a server meets in earnest, and no end of memory."""
SHAPES_OF_A_PROCESS = {"recompile_limit": 4096, "accumulated_recompile_limit": 4096}
"""torch's limits while we compile; ours binds long before."""
MAX_REASON = 300
"""Characters of torch's message that are shown: its first sentences say what failed, the rest how to report it."""
Encode = Callable[[Policy, Observation, int], SplitExpert]
"""(policy, observation, number of candidates) -> the expert, bound and fanned out."""
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
        self.why_eager: str | None = None
        self._pool: Any = None
        self._programs: dict[tuple[object, ...], Sample] = {}
        self._features: dict[Objective, list[LevelFeatures]] = {}
        self._is_full = False
        options: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": False}
        if backend == "inductor" and next(policy.parameters()).is_cuda:
            options["mode"] = "max-autotune-no-cudagraphs"  # the graph that is captured below is the whole decision's
        self.encode: Encode = torch.compile(_encoded, **options)
        self.evaluate: Evaluate = torch.compile(_evaluated, **options)

    @property
    def is_compiled(self) -> bool:
        return self.why_eager is None

    def chunks(self, observation: Observation, noise_BKHA: Tensor, objective: Objective) -> Tensor:
        num_rows = noise_BKHA.shape[0]
        # What is compiled and captured in inference mode must be called in it. torch's own limit, 8 shapes for all policies of a process,
        # holds in each thread by itself; a program may also have to be compiled again, as when the number of threads has changed.
        with torch.inference_mode(), torch._dynamo.config.patch(SHAPES_OF_A_PROCESS):
            observation, noise_BKHA = padded(observation, noise_BKHA)
            key = (objective, *shape_of(observation, noise_BKHA))
            if key not in self._programs:
                # It says in a sentence what is wrong with an observation, before the compiler does it in a page.
                chunks = self._sample(objective, _encoded, _evaluated)(observation, noise_BKHA)
                if not self._compile(key, observation, noise_BKHA, objective):
                    return chunks[:num_rows]
            return self._programs[key](observation, noise_BKHA)[:num_rows]

    def in_parts(self, around_encode: Wrapper, around_evaluate: Wrapper) -> "CompiledInParts":
        """The same programs, each call of them wrapped; on a GPU they are launched one by one. For shapes that have come before."""
        return CompiledInParts(self.policy, self._features, around_encode(self.encode), around_evaluate(self.evaluate))

    def _compile(
        self, key: tuple[object, ...], observation: Observation, noise_BKHA: Tensor, objective: Objective
    ) -> bool:
        """Makes a program for this shape; False where there can be none."""
        if self.why_eager is not None:
            return False
        if len(self._programs) == MAX_PROGRAMS:
            if not self._is_full:
                logger.warning("%d shapes of batch and prompt are compiled; others are acted on plainly", MAX_PROGRAMS)
            self._is_full = True
            return False
        try:
            self._programs[key] = self._program(observation, noise_BKHA, objective)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch's of compiling and of capturing are of this kind
            self._give_up(error)
        return self.is_compiled

    def _program(self, observation: Observation, noise_BKHA: Tensor, objective: Objective) -> Sample:
        """Compiled, and called once."""
        sample = self._sample(objective, self.encode, self.evaluate)
        sample(observation, noise_BKHA)
        if not noise_BKHA.is_cuda:
            return sample
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        return CapturedSample(sample, observation, noise_BKHA, pool=self._pool)

    def _sample(self, objective: Objective, encode: Encode, evaluate: Evaluate) -> Sample:
        return partial(_sampled, self.policy, objective, self._features.setdefault(objective, []), encode, evaluate)

    def _give_up(self, error: RuntimeError) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON]
        if self.is_required:
            raise ValueError(f"this policy cannot be compiled here ({reason}); act with --compile off") from error
        logger.warning("acting without compiled programs, more slowly: %s", reason)
        self.why_eager = reason
        self._programs.clear()


# Functions of the policy, not methods of the sampler: what torch keeps of them must not keep the sampler.


def _sampled(
    policy: Policy,
    objective: Objective,
    features: list[LevelFeatures],
    encode: Encode,
    evaluate: Evaluate,
    observation: Observation,
    noise_BKHA: Tensor,
) -> Tensor:
    """(B, K, H, W). `features` are those of all levels, or empty and filled in here."""
    batch, num_candidates = noise_BKHA.shape[:2]
    bound = encode(policy, observation, num_candidates)
    if not features:
        levels = levels_of(objective, tuple(noise_BKHA.shape[2:]), noise_BKHA.device)
        features += [bound.level_features(*level) for level in levels]
    chunks_BHA = objective.sample(AtKnownLevels(bound, features, evaluate), noise_BKHA.flatten(0, 1))
    return policy.action_layout.inverse(chunks_BHA).float().unflatten(0, (batch, num_candidates))


def _encoded(policy: Policy, observation: Observation, num_candidates: int) -> SplitExpert:
    bound = policy.bind(observation)
    return bound if num_candidates == 1 else bound.fan_out(num_candidates)


def _evaluated(bound: SplitExpert, x_BHA: Tensor, features: LevelFeatures) -> Tensor:
    return bound.evaluate(x_BHA, features)


class CompiledInParts:
    """See `Sampler`, and `CompiledSampler.in_parts`."""

    is_compiled = True

    def __init__(
        self, policy: Policy, features: Mapping[Objective, list[LevelFeatures]], encode: Encode, evaluate: Evaluate
    ) -> None:
        self.policy = policy
        self.features = features
        self.encode = encode
        self.evaluate = evaluate

    def chunks(self, observation: Observation, noise_BKHA: Tensor, objective: Objective) -> Tensor:
        num_rows = noise_BKHA.shape[0]
        with torch.inference_mode():
            observation, noise_BKHA = padded(observation, noise_BKHA)
            features = self.features[objective]
            chunks = _sampled(self.policy, objective, features, self.encode, self.evaluate, observation, noise_BKHA)
        return chunks[:num_rows]


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
