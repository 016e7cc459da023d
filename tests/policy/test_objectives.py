"""What holds for every objective, in every pairing that is allowed."""

import itertools
from dataclasses import replace
from typing import get_args

import pytest
import torch
from preset_policies import ACTION_DIM, make_batch, make_policy, with_masked_content
from pretended_gpu import needs_pretended_gpu, pretended_gpu

from vlatune.data.batch import mapped
from vlatune.policy.objectives import AnyObjective
from vlatune.policy.objectives.diffusion import Diffusion
from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.objectives.flow import Flow
from vlatune.policy.objectives.one_step import OneStep
from vlatune.policy.objectives.regression import Regression
from vlatune.policy.objectives.rs_imle import RSIMLE
from vlatune.policy.objectives.shortcut import Shortcut
from vlatune.policy.presets import PRESETS

OBJECTIVES = {
    "flow": Flow(num_sampling_steps=2),
    "flow, two draws, Heun": Flow(num_draws=2, num_sampling_steps=2, solver="heun"),
    "flow, clean action": Flow(prediction="sample", num_sampling_steps=2),
    "one step": OneStep(),
    "shortcut": Shortcut(num_draws=2),
    "l1": Regression(),
    "mse, aligned": Regression(error="mse", output="aligned"),
    "huber": Regression(error="huber"),
    "diffusion, clean action": Diffusion(num_sampling_steps=2),
    "diffusion, noise, DDIM": Diffusion(prediction="epsilon", clip=1.0, sampler="ddim", num_sampling_steps=2),
    "diffusion, v": Diffusion(prediction="v", num_sampling_steps=2),
    "rs-imle": RSIMLE(num_candidates=3, rejection_rms=0.0),
    "rs-imle, aligned": RSIMLE(num_candidates=3, output="aligned"),
}
PAIRS = list(itertools.product(PRESETS, OBJECTIVES))


def test_every_objective_is_here():
    assert {type(objective) for objective in OBJECTIVES.values()} == set(get_args(AnyObjective))


def keys_of(batch, rows=slice(None)):
    return DrawKeys(seed=3, step=5, sample_index_B=batch.sample_index_B[rows])


def mean(loss):
    return (loss.entries_BHA * loss.weight_BHA).sum() / loss.weight_BHA.sum().clamp(min=1)


@pytest.mark.parametrize(("preset", "name"), PAIRS)
def test_trains_and_samples(preset, name):
    policy = make_policy(replace(PRESETS[preset](tiny=True), objective=OBJECTIVES[name]))
    batch = make_batch(policy.config)
    loss = policy(batch, keys_of(batch))
    assert loss.entries_BHA.shape == loss.weight_BHA.shape
    assert not loss.weight_BHA[..., ACTION_DIM:].any() or preset == "rdt"
    mean(loss).backward()
    for parameter_name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
    noise = torch.randn(3, *policy.noise_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = policy.sample(batch.observation, noise), policy.sample(batch.observation, noise)
    assert first.shape == (3, *policy.action_shape)
    assert torch.equal(first, second)


@needs_pretended_gpu
@pytest.mark.slow
@pytest.mark.parametrize(("preset", "name"), PAIRS)
def test_on_a_gpu_the_loss_is_the_same_and_no_devices_are_mixed(preset, name, monkeypatch):
    policy = make_policy(replace(PRESETS[preset](tiny=True), objective=OBJECTIVES[name])).eval()
    batch = make_batch(policy.config)
    with torch.no_grad():
        expected = float(mean(policy(batch, keys_of(batch))))
        with pretended_gpu(monkeypatch):
            there = replace(mapped(batch, lambda tensor: tensor.to("cuda")), sample_index_B=batch.sample_index_B)
            found = float(mean(policy.to("cuda")(there, keys_of(there))))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_masked_changes_neither_loss_nor_gradient(name):
    policy = make_policy(replace(PRESETS["pi05"](tiny=True), objective=OBJECTIVES[name])).eval()
    batch = with_masked_content(make_batch(policy.config))
    results = []
    for version in (make_batch(policy.config), batch):
        policy.zero_grad()
        loss = mean(policy(version, keys_of(version)))
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        results.append((loss.detach(), gradient))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ranks_draw_what_one_process_would(name):
    objective = OBJECTIVES[name]
    batch = make_batch(PRESETS["pi05"](tiny=True), batch=4)
    actions = torch.randn(4, 4, 32)
    whole = objective.draw(actions, keys_of(batch))
    halves = [objective.draw(actions[rows], keys_of(batch, rows)) for rows in (slice(0, 2), slice(2, 4))]
    assert torch.equal(whole.noise_BHA, torch.cat([half.noise_BHA for half in halves]))
    assert torch.equal(whole.noise_level_B, torch.cat([half.noise_level_B for half in halves]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_a_declared_second_time_input_adds_parameters(name):
    objective = OBJECTIVES[name]
    parameters = {
        parameter
        for parameter, _ in make_policy(replace(PRESETS["pi05"](tiny=True), objective=objective)).named_parameters()
    }
    plain = {parameter for parameter, _ in make_policy("pi05").named_parameters()}
    added = parameters - plain
    assert plain <= parameters
    assert bool(added) == objective.has_second_level
    assert all(parameter.startswith("expert.second_level_embedding.") for parameter in added)
