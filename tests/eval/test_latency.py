"""Where a decision's time goes, on a clock that moves only where it is told to."""

import numpy as np
import pytest
import torch
from pretended_gpu import needs_pretended_gpu, pretended_gpu
from small_policies import make_policy, raw_observations

from vlatune.data.batch import Movable, RawObservation
from vlatune.data.language import Language
from vlatune.eval.latency import PARTS, Clock, CudaClock, Decision, Latency, Watch, clock_of, measure, watched
from vlatune.policy.acting import ActingPolicy
from vlatune.policy.execution import Compile

INSTRUCTION = "pick up the red cube"
MS = 1e-3


class ToldClock(Clock):
    """Stands still until somebody works."""

    def __init__(self) -> None:
        self.time_s = 0.0
        self.num_waits = 0

    def now(self) -> float:
        return self.time_s

    def wait(self) -> None:
        self.num_waits += 1

    def works(self, ms: float):
        """A hook: whatever calls it has taken so long."""

        def work(*_arguments):
            self.time_s += ms * MS

        return work


def acting(device: str = "cpu", num_candidates: int = 1, compile: Compile = "off") -> ActingPolicy:
    return ActingPolicy(
        make_policy(),
        Language.build([INSTRUCTION], encoder="none"),
        weights_hash="",
        device=torch.device(device),
        num_candidates=num_candidates,
        compile=compile,
    )


def observations(number: int) -> list[RawObservation]:
    return raw_observations(*[INSTRUCTION] * number)


@pytest.fixture
def told(monkeypatch) -> tuple[ActingPolicy, ToldClock]:
    """A real policy that takes 3 ms to prepare, 0.5 to move, 5 for the backbone, 2 for every call of the expert and 0.25 to
    un-normalise."""
    clock, policy = ToldClock(), acting()
    prepare, move, inverse = policy.language.prompts, Movable.to, policy.policy.action_normaliser.inverse

    def takes(ms, function):
        def slower(*arguments, **settings):
            clock.works(ms)()
            return function(*arguments, **settings)

        return slower

    monkeypatch.setattr(policy.language, "prompts", takes(3, prepare))
    monkeypatch.setattr(Movable, "to", takes(0.5, move))
    monkeypatch.setattr(policy.policy.action_normaliser, "inverse", takes(0.25, inverse))
    policy.policy.backbone.register_forward_hook(clock.works(5))
    policy.policy.expert.action_out_proj.register_forward_hook(clock.works(2))
    return policy, clock


@pytest.mark.parametrize(("num_sampling_steps", "batch_size"), [(1, 1), (2, 3), (5, 1)])
def test_every_part_gets_its_own_time_and_they_add_up(told, num_sampling_steps, batch_size):
    policy, clock = told
    ticks = []
    latency = measure(
        policy.with_sampling_steps(num_sampling_steps),
        observations(batch_size),
        clock=clock,
        repeats=3,
        warm_up=2,
        on_decision=lambda: ticks.append(clock.now()),
    )
    expected = {"prepare": 3, "transfer": 0.5, "prefix": 5, "expert": 2 * num_sampling_steps, "rest": 0.25}
    assert latency.parts_ms == pytest.approx(expected) and tuple(latency.parts_ms) == PARTS
    whole = sum(expected.values())
    assert latency.whole_ms == pytest.approx(3 * (whole,)) and latency.apart_ms == pytest.approx(whole)
    assert (latency.num_expert_calls, latency.num_sampling_steps) == (num_sampling_steps, num_sampling_steps)
    assert latency.expert_call_ms == pytest.approx(2) and latency.batch_size == batch_size
    assert len(ticks) == 2 + 2 * 3
    assert clock.num_waits == 3 * 4, "the device is idle before and after every decision that counts"


def test_looking_changes_nothing():
    for num_candidates in (1, 3):
        policy = acting(num_candidates=num_candidates)
        noise = np.random.default_rng(1).standard_normal((2, *policy.noise_shape), dtype=np.float32)
        before = policy.act(observations(2), noise, num_executed_steps=2)
        watch = Watch(Clock())
        watched_policy = watched(policy, watch)
        with watch.span("act"):
            seen = watched_policy.act(observations(2), noise, num_executed_steps=2)
        assert np.array_equal(before, seen)
        decision = Decision.of(watch)
        assert len(decision.expert_calls_ms) == 2 and min(decision.parts_ms.values()) > 0
        assert "bind" not in vars(policy.policy) and "_prepared" not in vars(policy)
        policy.act(observations(1), noise[:1], num_executed_steps=2)
        assert len(watch.spans["expert"]) == 2, "the policy that was not to be watched is not"


def decision(**parts_ms: float) -> Decision:
    parts = {**dict.fromkeys(PARTS, 0.0), **parts_ms}
    return Decision(whole_ms=sum(parts.values()), parts_ms=parts, expert_calls_ms=(1.0, 3.0, 8.0))


def test_percentiles_and_parts_of_uneven_decisions():
    # Each is interrupted for 4 ms, now in this part and now in that one; the last one for a second.
    apart = [decision(prefix=10 + 4 * (k % 2), expert=20 + 4 * ((k + 1) % 2)) for k in range(7)] + [
        decision(prefix=1_000)
    ]
    latency = Latency(batch_size=1, num_sampling_steps=1, whole_ms=tuple(range(101, 0, -1)), apart=tuple(apart))
    assert latency.median_ms == 51
    assert (latency.percentile_ms(95), latency.percentile_ms(99)) == (96, 100)
    assert sum(latency.parts_ms.values()) == pytest.approx(34) and latency.apart_ms == 34
    assert latency.parts_ms["prefix"] == pytest.approx(12)
    assert latency.expert_call_ms == 3
    assert sum(latency.undisturbed_parts_ms.values()) == pytest.approx(51)
    assert latency.undisturbed_parts_ms["expert"] == pytest.approx(51 * 22 / 34)


def test_a_device_that_nothing_here_can_time_is_refused():
    with pytest.raises(
        ValueError, match="--device mps: decisions are timed on a CPU or a CUDA device; give cpu or cud"
    ):
        clock_of(torch.device("mps"))


@needs_pretended_gpu
@pytest.mark.parametrize("compile", ["off", "on"])
def test_parts_are_timed_by_the_devices_clock(compile, monkeypatch):
    with pretended_gpu(monkeypatch) as gpu:
        policy = acting("cuda", compile=compile)
        clock = clock_of(policy.device)
        latency = measure(policy, observations(2), clock=clock, repeats=3, warm_up=1)
    assert isinstance(clock, CudaClock) and len(gpu.graphs) == (compile == "on")
    assert min(latency.parts_ms.values()) > 0 and latency.num_expert_calls == 2


@pytest.mark.gpu
def test_on_a_gpu_parts_are_timed_by_the_device():
    policy = acting("cuda")
    latency = measure(policy, observations(2), clock=clock_of(policy.device), repeats=20, warm_up=5)
    assert min(latency.parts_ms.values()) > 0
    assert sum(latency.parts_ms.values()) == pytest.approx(latency.median_ms, rel=0.5)
