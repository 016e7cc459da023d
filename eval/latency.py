"""How long a policy takes to decide, and where that time goes: whole decisions, and decisions taken apart, in turn.

A decision is one call of `act`, from raw observations to raw actions, until the device has nothing left to do. On a GPU its parts are
timed with events on the device's own clock, so that taking a decision apart waits for nothing that the decision does not wait for."""

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.raw_observation import RawObservation

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.batch import Observation
    from ..policy.acceleration.sampler import Sampler
    from ..policy.acting import ActingPolicy
    from ..policy.experts.expert import BoundExpert

PARTS = ("prepare", "transfer", "prefix", "expert", "rest")
"""Of a decision, in order. `prepare`: pictures turned and resized, texts tokenised, all of it stacked. `transfer`: to the device.
`prefix`: what is computed once, the backbone and what the expert makes of it. `expert`: all calls of the expert. `rest`: the
solver's arithmetic between them, un-normalising, actions back to the host."""


class Clock:
    """Of a policy on the processor: what it was asked is done when a call returns."""

    def wait(self) -> None:
        """Until the device has done all that it was asked."""

    def now(self) -> float:
        """Seconds, on the host."""
        return time.perf_counter()

    def mark(self) -> Any:
        """A moment in the device's work."""
        return self.now()

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; on a GPU after `wait`."""
        return float(end - start)


class CudaClock(Clock):
    """Marks are events in the order of the device's work."""

    def __init__(self, device: "torch.device") -> None:
        self.device = device

    def wait(self) -> None:
        import torch

        torch.cuda.synchronize(self.device)

    def mark(self) -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3


def clock_of(device: "torch.device") -> Clock:
    """Raises `ValueError` for a device whose work nothing here can time."""
    if device.type == "cuda":
        return CudaClock(device)
    if device.type != "cpu":
        raise ValueError(f"--device {device}: decisions are timed on a CPU or a CUDA device; give cpu or cuda")
    return Clock()


class Watch:
    """Notes when the parts of a decision begin and end."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        begun = self.clock.mark()
        yield
        self.spans[name].append((begun, self.clock.mark()))


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One decision, taken apart. Milliseconds."""

    whole_ms: float
    parts_ms: dict[str, float]
    """Each of `PARTS`; they add up to the whole."""
    expert_calls_ms: tuple[float, ...]

    @classmethod
    def of(cls, watch: Watch) -> "Decision":
        """Of the one decision that `watch` has seen."""

        def ms(start: Any, end: Any) -> float:
            return 1e3 * watch.clock.seconds(start, end)

        ((begun, ended),) = watch.spans["act"]
        ((_, prepared),) = watch.spans["prepare"]
        ((arrived, encoded),) = watch.spans["prefix"]
        calls = tuple(ms(*span) for span in watch.spans["expert"])
        parts = {
            "prepare": ms(begun, prepared),
            "transfer": ms(prepared, arrived),
            "prefix": ms(arrived, encoded),
            "expert": sum(calls),
        }
        whole = ms(begun, ended)
        return cls(whole_ms=whole, parts_ms={**parts, "rest": whole - sum(parts.values())}, expert_calls_ms=calls)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Of one policy under one setting."""

    batch_size: int
    num_sampling_steps: int
    whole_ms: tuple[float, ...]
    """Decisions that nothing but a clock at either end disturbed."""
    apart: tuple[Decision, ...]
    """As many others, each just after one of those."""

    @property
    def median_ms(self) -> float:
        return statistics.median(self.whole_ms)

    def percentile_ms(self, percent: float) -> float:
        """Linearly interpolated between decisions; nearly the slowest where there are fewer than 100 / (100 - percent)."""
        return float(np.percentile(self.whole_ms, percent))

    @property
    def parts_ms(self) -> dict[str, float]:
        """The mean of each part over the middle half of the decisions that were taken apart, by their duration: medians of parts would
        leave out the interruptions that hit now this part and now that one, and not add up."""
        by_duration = sorted(self.apart, key=lambda one: one.whole_ms)
        quarter = len(by_duration) // 4
        middle = by_duration[quarter : len(by_duration) - quarter]
        return {part: statistics.mean(one.parts_ms[part] for one in middle) for part in PARTS}

    @property
    def undisturbed_parts_ms(self) -> dict[str, float]:
        """The median of whole decisions, shared out as the parts are."""
        parts = self.parts_ms
        scale = self.median_ms / sum(parts.values())
        return {part: scale * ms for part, ms in parts.items()}

    @property
    def num_expert_calls(self) -> int:
        return len(self.apart[0].expert_calls_ms)

    @property
    def expert_call_ms(self) -> float:
        """The median of all calls."""
        return statistics.median(call for one in self.apart for call in one.expert_calls_ms)

    @property
    def apart_ms(self) -> float:
        """The median of decisions that were taken apart: what it differs from `median_ms` by is the price of looking, and chance."""
        return statistics.median(one.whole_ms for one in self.apart)


def measure(
    policy: "ActingPolicy",
    observations: Sequence[RawObservation],
    *,
    clock: Clock,
    repeats: int,
    warm_up: int,
    on_decision: Callable[[], object] = lambda: None,
) -> Latency:
    """Time `repeats` decisions on these observations as one batch, and as many taken apart, after `warm_up` that do not count.

    Whole ones and those taken apart alternate, so that a machine that grows slower does so for both. `on_decision` is called after
    each. Raises `ValueError` where the observations do not fit the policy."""
    noise = np.random.default_rng(0).standard_normal((len(observations), *policy.noise_shape), dtype=np.float32)
    for _ in range(warm_up):
        policy.act(observations, noise)
        on_decision()
    whole_ms, apart = [], []
    for _ in range(repeats):
        clock.wait()
        begun = clock.now()
        policy.act(observations, noise)
        clock.wait()
        whole_ms.append(1e3 * (clock.now() - begun))
        on_decision()
        watch = Watch(clock)
        watched_policy = watched(policy, watch)
        clock.wait()
        with watch.span("act"):
            watched_policy.act(observations, noise)
        clock.wait()
        apart.append(Decision.of(watch))
        on_decision()
    return Latency(
        batch_size=len(observations),
        num_sampling_steps=policy.num_sampling_steps,
        whole_ms=tuple(whole_ms),
        apart=tuple(apart),
    )


def watched(acting: "ActingPolicy", watch: Watch) -> "ActingPolicy":
    """The same policy, weights shared, whose every decision `watch` sees; `acting` itself stays as it is."""
    prepare = acting._prepared
    watched_acting = copy.copy(acting)
    watched_acting.sampler = watched_sampler(acting.sampler, watch)

    def watched_prepare(observations: Sequence[RawObservation]) -> "Observation":
        with watch.span("prepare"):
            return prepare(observations)

    watched_acting._prepared = watched_prepare  # type: ignore[method-assign]
    return watched_acting


def watched_sampler(sampler: "Sampler", watch: Watch) -> "Sampler":
    """The same with its encoding and every call of its expert noted. What is compiled stays so, but is no longer one CUDA graph."""
    from ..policy.acceleration.sampler import CompiledSampler, PlainSampler

    if isinstance(sampler, CompiledSampler) and sampler.is_compiled:
        return sampler.in_parts(partial(_noted, watch, "prefix"), partial(_noted, watch, "expert"))
    policy = copy.copy(sampler.policy)

    def watched_bind(observation: "Observation") -> WatchedExpert:
        with watch.span("prefix"):
            bound = sampler.policy.bind(observation)
        return WatchedExpert(bound, watch)

    policy.bind = watched_bind  # type: ignore[method-assign, assignment]
    return PlainSampler(policy)


def _noted(watch: Watch, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*given: Any) -> Any:
        with watch.span(part):
            return call(*given)

    return noted


class WatchedExpert:
    """A bound expert whose every call is noted; see `BoundExpert`."""

    def __init__(self, bound: "BoundExpert", watch: Watch) -> None:
        self.bound = bound
        self.watch = watch

    def fan_out(self, num_candidates: int) -> "WatchedExpert":
        return WatchedExpert(self.bound.fan_out(num_candidates), self.watch)

    def __call__(self, x_BHA: "Tensor", noise_level_B: "Tensor", second_level_B: "Tensor | None" = None) -> "Tensor":
        with self.watch.span("expert"):
            return self.bound(x_BHA, noise_level_B, second_level_B)
