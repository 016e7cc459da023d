"""The compiled acting path computes what the plain one computes, for every public policy, and says why where it cannot."""

import copy
import dataclasses
import logging

import pytest
import torch
from preset_policies import make_batch, make_policy

from vlatune.data.batch import Observation, mapped
from vlatune.policy.acceleration.levels import levels_of
from vlatune.policy.acceleration.merged import merge_projections
from vlatune.policy.acceleration.sampler import CompiledSampler
from vlatune.policy.acceleration.static_shapes import bucket_size, padded
from vlatune.policy.objectives.diffusion import Diffusion
from vlatune.policy.objectives.flow import Flow
from vlatune.policy.objectives.regression import Regression
from vlatune.policy.objectives.rs_imle import RSIMLE
from vlatune.policy.objectives.shortcut import Shortcut
from vlatune.policy.presets import PRESETS

TOLERANCE = {"rtol": 0, "atol": 1e-4}
BATCHES = (1, 3, 8)


@torch.inference_mode()
def differences(name: str, backend: str, batches=BATCHES) -> dict[object, float]:
    """What -> the largest difference from the plain path, whose chunks are of order 1: batches with prompts of different lengths whose
    last row lacks a camera, two candidates, and a batch without that camera at all."""
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
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PRESETS)
def test_every_policy_acts_as_it_does_plainly(name):
    found = differences(name, "aot_eager")
    assert max(found.values()) < 1e-4, found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PRESETS)
def test_compiled_kernels_act_as_the_plain_ones(name):
    found = differences(name, "inductor", batches=(3,))
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
    with pytest.raises(ValueError, match="there is no compiler.*--execution eager"):
        required.chunks(observation, noise, policy.config.objective)


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
