"""Decisions as CUDA graphs, on a GPU that is played on the CPU: a graph computes what the plain path does, whatever it is given."""

import copy
import dataclasses
import logging
from typing import get_args

import numpy as np
import pytest
import torch
from preset_policies import make_batch, make_policy
from pretended_gpu import PretendedGpu, needs_pretended_gpu, pretended_gpu
from small_policies import make_policy as make_small_policy
from small_policies import raw_observations

from vlatune.data.batch import Observation, mapped
from vlatune.data.language import Language
from vlatune.policy.acceleration import captured
from vlatune.policy.acceleration.sampler import CompiledSampler
from vlatune.policy.acting import ActingPolicy
from vlatune.policy.objectives import AnyObjective
from vlatune.policy.objectives.diffusion import Diffusion
from vlatune.policy.objectives.flow import Flow
from vlatune.policy.objectives.objective import Objective
from vlatune.policy.objectives.one_step import OneStep
from vlatune.policy.objectives.regression import Regression
from vlatune.policy.objectives.rs_imle import RSIMLE
from vlatune.policy.objectives.shortcut import Shortcut
from vlatune.policy.policy import Policy
from vlatune.policy.presets import PRESETS

pytestmark = needs_pretended_gpu
OBJECTIVES = (
    Flow(solver="heun", num_sampling_steps=2),
    Flow(solver="midpoint", num_sampling_steps=2),
    OneStep(),
    Shortcut(),
    Regression(),
    RSIMLE(output="aligned"),
    Diffusion(sampler="ddim", num_sampling_steps=2),
    Diffusion(sampler="dpm_solver", num_sampling_steps=3),
)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(captured, "NUM_WARM_UPS", 1)
    with pretended_gpu(monkeypatch) as gpu:
        yield gpu


def tensors_of(observation: Observation) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    mapped(observation, lambda tensor: found.append(tensor) or tensor)
    return found


def difference(gpu: PretendedGpu, policy: Policy, objective: Objective, *, num_candidates: int = 1) -> float:
    """The largest, over observations and noises that the graphs were recorded with, and others; chunks are of order 1."""
    sampler = CompiledSampler(copy.deepcopy(policy).to("cuda"), is_required=True)
    given, found, expected = [], [], []
    for seed, rows in enumerate((4, 1, 3, 4, 1)):
        observation = make_batch(policy.config, rows, seed).observation
        noise = torch.randn(rows, num_candidates, *policy.noise_shape, generator=torch.Generator().manual_seed(seed))
        there = mapped(observation, lambda tensor: tensor.to("cuda"))
        noise_there = noise.to("cuda")
        found.append(sampler.chunks(there, noise_there, objective))
        given += zip([*tensors_of(observation), noise], [*tensors_of(there), noise_there], strict=True)
        expected.append(policy.chunks(observation, noise, objective))
        assert found[-1].is_cuda and expected[-1].abs().max() > 0.1
    assert [graph.num_replays for graph in gpu.graphs] == [3, 2], "one of four rows, padded or not, and one of one"
    assert all(one.equal(there.cpu()) for one, there in given), "what was given is as it was"
    # Looked at only now: a graph's next play must not touch what it gave before.
    return max(float((one.cpu() - other).abs().max()) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", PRESETS)
def test_a_graph_acts_as_the_plain_path(name, gpu):
    policy = make_policy(name).eval().requires_grad_(False)
    objective = dataclasses.replace(policy.config.objective, num_sampling_steps=2)
    assert difference(gpu, policy, objective, num_candidates=2 if name == "clip_flow" else 1) < 1e-4


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.type)
def test_with_every_objective(objective, gpu):
    config = dataclasses.replace(PRESETS["pi0"](tiny=True), objective=objective)  # shortcut's has a second level
    assert difference(gpu, make_policy(config).eval().requires_grad_(False), objective) < 1e-4


def test_every_objective_is_here():
    assert {type(objective) for objective in OBJECTIVES} == set(get_args(AnyObjective))


def test_in_bfloat16_and_for_several_numbers_of_steps(gpu):
    """As `vlatune act --device cuda --compile on --precision bfloat16` makes its policy."""
    instructions = ("pick up the red cube", "open the drawer", "stack")
    language = Language.build(instructions, encoder="none")

    def acting(device: str, **options) -> ActingPolicy:
        return ActingPolicy(make_small_policy(), language, weights_hash="", device=torch.device(device), **options)

    plain, compiled = acting("cpu"), acting("cuda", compile="on", precision="bfloat16")
    for one, other in [(plain, compiled), (plain.with_sampling_steps(3), compiled.with_sampling_steps(3))]:
        for rows in (3, 2):
            noise = np.random.default_rng(rows).standard_normal((rows, 4, 7), dtype=np.float32)
            chunks = [policy.act(raw_observations(*instructions[:rows]), noise) for policy in (one, other)]
            np.testing.assert_allclose(*chunks, rtol=0, atol=0.05)
    assert [graph.num_replays for graph in gpu.graphs] == [1, 1, 1, 1]


def test_what_cuda_cannot_record_is_said(gpu, monkeypatch, caplog):
    policy = make_policy("pi05").eval().requires_grad_(False)
    bind = Policy.bind

    def waiting_for_a_value(self, observation):
        assert float(observation.state_BTS.sum()) < 1e9
        return bind(self, observation)

    monkeypatch.setattr(Policy, "bind", waiting_for_a_value)
    observation = mapped(make_batch(policy.config, 1).observation, lambda tensor: tensor.to("cuda"))
    noise = torch.randn(1, 1, *policy.noise_shape, device="cuda")
    with pytest.raises(ValueError, match="stream is capturing: aten._local_scalar_dense.*act with --compile off"):
        CompiledSampler(copy.deepcopy(policy).to("cuda"), is_required=True).chunks(
            observation, noise, Flow(num_sampling_steps=1)
        )
    with caplog.at_level(logging.WARNING):
        sampler = CompiledSampler(policy.to("cuda"), is_required=False)
        chunks = sampler.chunks(observation, noise, Flow(num_sampling_steps=1))
    assert not sampler.is_compiled and "acting without compiled programs, more slowly" in caplog.text
    assert chunks.shape == (1, 1, 4, 7)


def test_the_pretended_gpu_forgets_nothing_that_a_real_one_remembers(gpu):
    """What Python decided while the graph was recorded stays; what is computed is computed again; mixing devices is refused."""
    x, factors = torch.zeros(3, device="cuda"), [2.0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * factors[0] + (x.view(3)[1:2].add_(1) * torch.full((1,), 10.0, device="cuda"))
    factors[0] = 3.0
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    graph.replay()
    assert x.cpu().tolist() == [1, 3, 3] and y.cpu().tolist() == [2 + 30, 4 + 30, 6 + 30]
    for refused in (
        lambda: x.cpu(),
        lambda: x + torch.tensor([1.0], device="cuda"),
        lambda: x[x > 1],
        lambda: x.any().item(),
    ):
        with (
            pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            refused()
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        x + torch.ones(3)
