"""The ways to act: plainly or compiled, in float32 or bfloat16, one chunk or several of one encoded observation."""

import numpy as np
import pytest
import torch
from small_policies import make_policy, raw_observations

from vlatune.data.batch import RawObservation
from vlatune.data.language import Language
from vlatune.eval.latency import Clock, measure
from vlatune.eval.results import OPTIONS
from vlatune.policy import acting
from vlatune.policy.acceleration.sampler import CompiledSampler
from vlatune.policy.acting import ActingPolicy
from vlatune.policy.objectives.real_time import RealTimeChunking

INSTRUCTIONS = ("pick up the red cube", "open the drawer", "stack")


def policy(device: str = "cpu", **options) -> ActingPolicy:
    language = Language.build(INSTRUCTIONS, encoder="none")
    return ActingPolicy(make_policy(), language, weights_hash="", device=torch.device(device), **options)


def observations() -> list[RawObservation]:
    return raw_observations(*INSTRUCTIONS)


def noise_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def test_candidates_are_what_each_noise_gives():
    plain, noise = policy(), noise_of(3, 4, 4, 7)
    chunks = plain.candidates(observations(), 4, noise)
    assert chunks.shape == (3, 4, 4, 7) and chunks.dtype == np.float32
    for candidate in range(4):
        alone = plain.act(observations(), noise[:, candidate])
        np.testing.assert_allclose(chunks[:, candidate], alone, rtol=0, atol=1e-5)
    assert (plain.candidates(observations(), 8).std(axis=1) > 0).all(), "drawn noises differ"
    with pytest.raises(ValueError, match="num_candidates is 0; it must be at least 1"):
        plain.candidates(observations(), 0)


def test_bfloat16_acts_nearly_alike_and_says_so():
    noise = noise_of(3, 4, 7)
    narrow = policy(precision="bfloat16")
    assert {parameter.dtype for parameter in narrow.policy.parameters()} == {torch.bfloat16}
    difference = np.abs(narrow.act(observations(), noise) - policy().act(observations(), noise))
    assert 0 < difference.max() < 0.05
    assert narrow.sampling == {"objective": "flow", "num_sampling_steps": 2, "precision": "bfloat16"}


def test_compiled_acting_is_acting(monkeypatch):
    """Through `act`, `candidates`, the choice among several and other numbers of steps; traced, on torch's own kernels."""
    plain, several = policy(), policy(num_candidates=2)
    with monkeypatch.context() as patch:
        patch.setattr(
            acting,
            "sampler_for",
            lambda policy, compile: CompiledSampler(policy, is_required=True, backend="aot_eager"),
        )
        compiled, compiled_several = policy(compile="on"), policy(compile="on", num_candidates=2)
    assert compiled.sampling == {**plain.sampling, "compiled": True}
    close = {"rtol": 0, "atol": 1e-4}
    noise, noises = noise_of(3, 4, 7), noise_of(3, 2, 4, 7)
    np.testing.assert_allclose(compiled.act(observations(), noise), plain.act(observations(), noise), **close)
    np.testing.assert_allclose(
        compiled.candidates(observations(), 2, noises), plain.candidates(observations(), 2, noises), **close
    )
    other, plain_other = compiled.with_sampling_steps(3), plain.with_sampling_steps(3)
    np.testing.assert_allclose(other.act(observations(), noise), plain_other.act(observations(), noise), **close)
    previous = plain.act(observations(), noise)
    chosen = [
        one.act(observations(), noises, previous=previous, num_executed_steps=1) for one in (compiled_several, several)
    ]
    np.testing.assert_allclose(*chosen, **close)
    latency = measure(compiled, observations(), clock=Clock(), repeats=3, warm_up=1)
    assert latency.num_expert_calls == 2 and min(latency.parts_ms.values()) > 0


def test_what_is_asked_for_is_known_to_those_who_compare_rows():
    guided = policy(real_time_chunking=RealTimeChunking(max_guidance=2), precision="bfloat16")
    for asked in (guided.sampling, policy(num_candidates=2).sampling):
        assert asked.keys() - {"objective", "num_sampling_steps"} <= OPTIONS


def test_on_a_cpu_auto_is_eager_and_real_time_chunking_is_not_compiled(caplog):
    assert not policy(compile="auto").sampler.is_compiled
    policy(compile="auto", real_time_chunking=RealTimeChunking(max_guidance=2))
    assert "acting without compiled programs: real-time chunking" in caplog.text
    with pytest.raises(ValueError, match="real-time chunking needs the expert's derivative.*leave one of the two out"):
        policy(compile="on", real_time_chunking=RealTimeChunking(max_guidance=2))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_cuda_graph_acts_as_the_plain_path(precision):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    plain, compiled = (policy("cuda", compile=how, precision=precision) for how in ("off", "on"))
    for rows in (3, 1, 3, 2):
        noise = noise_of(3, 4, 7)[:rows]
        acted = [one.act(observations()[:rows], noise) for one in (plain, compiled)]
        np.testing.assert_allclose(*acted, rtol=0, atol=1e-4 if precision == "float32" else 0.05)
