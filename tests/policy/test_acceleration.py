"""The compiled acting path computes what the plain one computes, for every public policy, and says why where it cannot."""

import copy
import dataclasses
import gc
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from preset_policies import make_batch, make_policy
from safetensors.torch import load_file

from vlatune.data.batch import Observation, mapped
from vlatune.policy import parity
from vlatune.policy.acceleration import sampler as sampler_module
from vlatune.policy.acceleration.levels import AtKnownLevels, levels_of
from vlatune.policy.acceleration.merged import merge_projections
from vlatune.policy.acceleration.sampler import CompiledSampler
from vlatune.policy.acceleration.static_shapes import bucket_size, padded
from vlatune.policy.checkpoints.public import read_public
from vlatune.policy.experts.unet import BoundUNetExpert
from vlatune.policy.objectives.diffusion import Diffusion
from vlatune.policy.objectives.flow import Flow
from vlatune.policy.objectives.regression import Regression
from vlatune.policy.objectives.rs_imle import RSIMLE
from vlatune.policy.objectives.shortcut import Shortcut
from vlatune.policy.presets import PRESETS

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = {"rtol": 0, "atol": 1e-4}
BATCHES = (1, 3, 8)


@torch.inference_mode()
def differences(name: str, backend: str, batches=BATCHES, *, more: bool = True) -> dict[object, float]:
    """What -> the largest difference from the plain path, whose chunks are of order 1: batches with prompts of different lengths whose
    last row lacks a camera, and `more`: two candidates, and a batch without that camera at all."""
    policy = make_policy(name).eval().requires_grad_(False)
    sampler = CompiledSampler(copy.deepcopy(policy), is_required=True, backend=backend)
    objective = policy.config.objective
    found = {}

    def compare(what: object, observation: Observation, num_candidates: int = 1) -> None:
        batch = len(observation.state_BTS)
        noise = torch.randn(batch, num_candidates, *policy.noise_shape, generator=torch.Generator().manual_seed(0))
        wanted = policy.chunks(observation, noise, objective)
        found[what] = float((sampler.chunks(observation, noise, objective) - wanted).abs().max())
        assert wanted.abs().max() > 0.1 and len(wanted) == batch

    for batch in batches:
        compare(batch, make_batch(policy.config, batch).observation)
    if not more:
        return found
    several = make_batch(policy.config, batches[-1]).observation
    compare("candidates", several, num_candidates=2)
    first = next(iter(several.images))
    compare("one camera", dataclasses.replace(several, images={first: several.images[first]}))
    return found


def test_pi05_acts_as_it_does_plainly():
    """Traced, merged, padded and with constants, on torch's own kernels; the other policies and inductor's kernels are slow tests."""
    found = differences("pi05", "aot_eager", batches=(3,))
    assert max(found.values()) < 1e-4, found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PRESETS)
def test_every_policy_acts_as_it_does_plainly(name):
    found = differences(name, "aot_eager")
    assert max(found.values()) < 1e-4, found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PRESETS)
def test_compiled_kernels_act_as_the_plain_ones(name):
    found = differences(name, "inductor", batches=(3,), more=False)
    assert max(found.values()) < 1e-4, found


def test_levels_are_those_that_sampling_asks_for():
    def asked(objective):
        return [
            (float(level), None if second is None else float(second))
            for level, second in levels_of(objective, (4, 7), torch.device("cpu"))
        ]

    assert asked(Flow(num_sampling_steps=4)) == [(1, None), (0.75, None), (0.5, None), (0.25, None)]
    assert asked(Flow(num_sampling_steps=2, solver="heun")) == [(1, None), (0.5, None), (0.5, None)]
    assert asked(Regression(error="l1", output="action")) == [(0, None)] and asked(RSIMLE()) == [(1, None)]
    assert asked(Shortcut(num_sampling_steps=2)) == [(1, 0.5), (0.5, 0.5)]
    assert len(asked(Diffusion())) == 5


class Restless(Flow):
    """Asks for a level that the answer before decides."""

    def sample(self, expert, noise_BHA):
        answer_BHA = expert(noise_BHA, torch.ones_like(noise_BHA[:, 0, 0]))
        return expert(noise_BHA, answer_BHA[:, 0, 0])


def test_levels_that_are_no_constants_are_refused():
    with pytest.raises(ValueError, match="depend on what it is shown"):
        levels_of(Restless(), (4, 7), torch.device("cpu"))


def test_batches_are_padded_to_few_sizes():
    assert [bucket_size(rows) for rows in (1, 2, 3, 5, 8, 33, 64, 65, 200)] == [1, 2, 4, 8, 8, 64, 64, 128, 256]
    policy = make_policy("pi05")
    observation = make_batch(policy.config, 3).observation
    noise = torch.randn(3, 1, *policy.noise_shape)
    wide, wide_noise = padded(observation, noise)
    mapped(wide, lambda tensor: assert_extended(tensor, 4))
    assert torch.equal(wide_noise[3], noise[2]) and torch.equal(wide.state_BTS[:3], observation.state_BTS)


def assert_extended(tensor, rows):
    assert tensor.shape[0] == rows and torch.equal(tensor[-1], tensor[-2])
    return tensor


@torch.inference_mode()
def test_what_cannot_be_compiled_is_said_and_acted_plainly(caplog):
    policy = make_policy("clip_flow").eval().requires_grad_(False)
    observation, noise = make_batch(policy.config, 2).observation, torch.randn(2, 1, *policy.noise_shape)
    wanted = policy.chunks(observation, noise, policy.config.objective)

    def broken(graph, inputs):
        raise RuntimeError("there is no compiler")

    sampler = CompiledSampler(copy.deepcopy(policy), is_required=False, backend=broken)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            chunks = sampler.chunks(observation, noise, policy.config.objective)
            torch.testing.assert_close(chunks, wanted, **TOLERANCE)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("vlatune")]
    assert len(said) == 1 and "there is no compiler" in said[0] and "there is no compiler" in sampler.why_eager
    required = CompiledSampler(policy, is_required=True, backend=broken)
    with pytest.raises(ValueError, match="there is no compiler.*--compile off"):
        required.chunks(observation, noise, policy.config.objective)


@pytest.mark.slow
@torch.inference_mode()
def test_more_shapes_than_torch_allows_and_fewer_than_there_are(monkeypatch, caplog):
    """torch stops at 8, and counts by thread; beyond our own limit a shape is acted on plainly, and the others go on."""
    monkeypatch.setattr(sampler_module, "MAX_PROGRAMS", 9)
    policy = make_policy("clip_flow").eval().requires_grad_(False)
    objective = policy.config.objective
    plain = copy.deepcopy(policy)
    sampler = CompiledSampler(policy, is_required=True, backend="eager")

    def act(num_candidates: int) -> None:
        observation = make_batch(policy.config, 1).observation
        noise = torch.randn(1, num_candidates, *policy.noise_shape)
        chunks, wanted = (one.chunks(observation, noise, objective) for one in (sampler, plain))
        torch.testing.assert_close(chunks, wanted, **TOLERANCE)

    with ThreadPoolExecutor(max_workers=1) as thread, caplog.at_level(logging.WARNING):
        for num_candidates in (*range(1, 12), 1):
            thread.submit(act, num_candidates).result()
        again = torch.get_num_threads() + 1
        thread.submit(torch.set_num_threads, again).result()  # for which torch compiles once more
        thread.submit(act, 1).result()
        thread.submit(torch.set_num_threads, again - 1).result()
    assert sampler.is_compiled and len(sampler._programs) == 9
    assert sum("9 shapes of batch and prompt are compiled" in record.getMessage() for record in caplog.records) == 1


@torch.inference_mode()
def test_a_bad_observation_is_refused_as_plainly_and_spoils_nothing():
    policy = make_policy("clip_flow").eval().requires_grad_(False)
    sampler = CompiledSampler(policy, is_required=True, backend="eager")
    observation, noise = make_batch(policy.config, 1).observation, torch.randn(1, 1, *policy.noise_shape)
    prompts = observation.prompts
    long = dataclasses.replace(prompts, ids_BL=prompts.ids_BL.repeat(1, 20), mask_BL=prompts.mask_BL.repeat(1, 20))
    with pytest.raises(ValueError, match="the longest prompt is padded to 160 tokens"):
        sampler.chunks(dataclasses.replace(observation, prompts=long), noise, policy.config.objective)
    assert sampler.is_compiled
    assert sampler.chunks(observation, noise, policy.config.objective).isfinite().all()


def test_a_sampler_that_nobody_holds_frees_its_policy():
    """Without waiting for the collector: a sweep loads the next checkpoint at once."""
    policy = make_policy("clip_flow").eval().requires_grad_(False)
    sampler = CompiledSampler(policy, is_required=True, backend="eager")
    observation, noise = make_batch(policy.config, 1).observation, torch.randn(1, 1, *policy.noise_shape)
    sampler.chunks(observation, noise, policy.config.objective)
    gone = weakref.ref(policy), weakref.ref(sampler)
    gc.collect()
    gc.disable()
    try:
        del sampler, policy
        assert gone[1]() is None and gone[0]() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_merging_frees_what_it_merged():
    """As many weights as before, under other names; a prefix's last layer, of which only keys and values are read, stays as it is."""
    policy = make_policy("pi05")
    before = sum(parameter.numel() for parameter in policy.parameters())
    merge_projections(policy)
    assert sum(parameter.numel() for parameter in policy.parameters()) == before
    names = dict(policy.named_parameters())
    assert not any(".layers.0.self_attn.q_proj" in name for name in names)
    assert "backbone.language_model.layers.2.self_attn.q_proj.weight" in names
    assert "backbone.vision_tower.encoder.layers.0.self_attn.qkv_proj.bias" in names


def recorded(name: str):
    return load_file(GOLDEN / name / "io.safetensors"), GOLDEN / name


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["pi0", "pi05", "smolvla"])
@torch.inference_mode()
def test_compiled_policies_agree_with_the_references(name):
    """Recorded outputs of the reference implementations, as in test_golden.py."""
    io, folder = recorded(name)
    checkpoint = read_public(folder)
    sampler = CompiledSampler(parity.policy_for_recording(checkpoint, io).eval(), is_required=True)
    for steps in (1, 10):
        objective = dataclasses.replace(checkpoint.config.objective, num_sampling_steps=steps)
        chunks = sampler.chunks(parity.recorded_observation(io), io["noise"][:, None], objective)
        assert parity.relative_difference(chunks[:, 0], io[f"sample{steps}"]) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@torch.inference_mode()
def test_compiled_rdt_and_unet_agree_with_the_references():
    """Of these the expert alone is recorded."""
    evaluate = torch.compile(lambda bound, x_BHA, features: bound.evaluate(x_BHA, features), dynamic=False)
    io, folder = recorded("rdt")
    checkpoint = read_public(folder)
    bound = parity.expert_for_recording(checkpoint, io).bind(parity.recorded_features(io, torch.float32))
    objective = dataclasses.replace(checkpoint.config.objective, num_sampling_steps=5)
    noise = io.get("sample_noise", io["noise"])
    features = [bound.level_features(*level) for level in levels_of(objective, noise.shape[1:], noise.device)]
    chunk = objective.sample(AtKnownLevels(bound, features, evaluate), noise) * io["action_mask"]
    assert parity.relative_difference(chunk, io["sample5"]) < 1e-4

    io, folder = recorded("unet")
    expert = parity.unet_for_recording(folder, io)
    bound = BoundUNetExpert(expert, io["global_cond"])
    output = evaluate(bound, io["sample"], bound.level_features(io["timesteps"] / expert.config.time_scale))
    assert parity.relative_difference(output, io["output"]) < 1e-4
