"""Real-time chunking: the mask, the corrected velocity against closed forms and finite differences, and acting with it."""

import dataclasses
import itertools
import math
from typing import get_args

import numpy as np
import preset_policies
import pytest
import torch
from small_policies import make_policy, raw_observations
from toy_problems import ClosedFormExpert, Gaussian, LearningExpert, seeded_normal

from vlatune.data.batch import RawObservation
from vlatune.data.language import Language
from vlatune.eval.run_folder import Checkpoint
from vlatune.eval.sweep import SweepConfig, load_for_sweep
from vlatune.policy.acting import ActingPolicy, load_policy
from vlatune.policy.checkpoints.folder import write_policy
from vlatune.policy.checkpoints.layout import COMPLETE
from vlatune.policy.objectives.diffusion import Diffusion
from vlatune.policy.objectives.flow import Flow
from vlatune.policy.objectives.one_step import OneStep
from vlatune.policy.objectives.real_time import RealTimeChunking, Schedule
from vlatune.policy.objectives.regression import Regression
from vlatune.policy.objectives.rs_imle import RSIMLE
from vlatune.policy.objectives.shortcut import Shortcut
from vlatune.policy.presets import PRESETS

INSTRUCTION = "pick up the red cube"
EXECUTED = 2
GAUSSIAN = Gaussian()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return seeded_normal(*shape, seed=seed, dtype=torch.float64)


def sampled(chunking, objective, expert, noise, previous, *, executed=3, delay=2, has_previous=None, used=None):
    everybody = torch.ones(len(noise), dtype=torch.bool)
    return chunking.sample(
        objective,
        expert,
        noise,
        previous,
        everybody if has_previous is None else has_previous,
        torch.ones(noise.shape[2], dtype=torch.bool) if used is None else used,
        num_executed=executed,
        inference_delay=delay,
    )


# The mask.


def test_the_mask_by_hand():
    """A chunk of 8, 3 executed, 2 over before it is there: five planned steps, two of them frozen."""
    left = [3 / 4, 2 / 4, 1 / 4]
    expected = {
        "linear": left,
        "exponential": [c * (math.exp(c) - 1) / (math.e - 1) for c in left],
        "ones": [1, 1, 1],
        "zeros": [0, 0, 0],
    }
    assert set(expected) == set(get_args(Schedule))
    for schedule, middle in expected.items():
        mask = RealTimeChunking(schedule=schedule).mask(8, 3, 2)
        assert mask.tolist() == pytest.approx([1, 1, *middle, 0, 0, 0]), schedule


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_every_mask_falls_from_the_frozen_steps_to_the_plans_end(schedule):
    for horizon, executed in ((h, s) for h in (2, 5, 8) for s in range(1, h)):
        for delay in range(min(executed, horizon - executed) + 1):
            mask = RealTimeChunking(schedule=schedule).mask(horizon, executed, delay)
            assert mask.shape == (horizon,)
            assert (mask[:delay] == 1).all()
            assert (mask[horizon - executed :] == 0).all()
            assert (mask.diff() <= 0).all()


@pytest.mark.parametrize(
    ("executed", "delay", "message"),
    [
        (8, 0, "8 executed steps of a chunk of 8: .* execute from 1 to 7"),
        (0, 0, "0 executed steps of a chunk of 8"),
        (3, 4, "inference delay of 4 steps with 3 executed of a chunk of 8: .* the delay can be 0 to 3"),
        (6, 3, "inference delay of 3 steps with 6 executed of a chunk of 8: .* the delay can be 0 to 2"),
        (3, -1, "inference delay of -1 steps"),
    ],
)
def test_numbers_of_steps_that_contradict_each_other_are_refused(executed, delay, message):
    with pytest.raises(ValueError, match=message):
        RealTimeChunking().mask(8, executed, delay)


def test_the_sweeps_schedules_are_these():
    (hint,) = (field.type for field in dataclasses.fields(SweepConfig) if field.name == "real_time_chunking")
    assert get_args(hint) == ("off", *get_args(Schedule))
    assert SweepConfig(runs=()).max_guidance == RealTimeChunking().max_guidance


# The corrected velocity.


@pytest.mark.parametrize("max_guidance", [0.5, 3.0])
@pytest.mark.parametrize("schedule", ["linear", "zeros"])
def test_independent_gaussians_follow_the_recursion_by_hand(schedule, max_guidance):
    """For entries on their own everything is scalar: slope k of the velocity, hence 1 - level * k of the clean chunk."""
    num_steps, (batch, horizon, dims) = 7, (4, 6, 2)
    noise, previous = normal(batch, horizon, dims), normal(batch, horizon, dims, seed=1)
    chunking = RealTimeChunking(schedule=schedule, max_guidance=max_guidance)
    actual = sampled(
        chunking, Flow(num_sampling_steps=num_steps), ClosedFormExpert(GAUSSIAN.velocity), noise, previous, executed=2
    )
    mask_H = chunking.mask(horizon, 2, 2).tolist()
    for b, h, a in itertools.product(range(batch), range(horizon), range(dims)):
        x = noise[b, h, a]
        plan = previous[b, h + 2, a] if h < horizon - 2 else 0.0
        for step in range(num_steps):
            level = 1 - step / num_steps
            slope = (level - (1 - level) * GAUSSIAN.std**2) / GAUSSIAN.variance(level)
            odds = math.inf if step == 0 else ((1 - level) ** 2 + level**2) / (level * (1 - level))
            pull = (1 - level * slope) * mask_H[h] * (plan - GAUSSIAN.clean(x, level))
            x = x - (GAUSSIAN.velocity(x, level) - min(max_guidance, odds) * pull) / num_steps
        assert actual[b, h, a].item() == pytest.approx(x.item(), abs=1e-6)


def test_where_the_correction_is_exact_the_frozen_steps_become_the_plan():
    """For actions of N(0, 1) it is the score of what is planned: without a bound the flow ends in the plan, and the rest is free."""
    expert, flow = ClosedFormExpert(Gaussian(mean=0.0, std=1.0).velocity), Flow(num_sampling_steps=200)
    noise, previous = normal(50, 6, 1), normal(50, 6, 1, seed=1)
    chunking = RealTimeChunking(schedule="zeros", max_guidance=200.0)
    actual = sampled(chunking, flow, expert, noise, previous, executed=3)
    assert torch.allclose(actual[:, :2], previous[:, 3:5], atol=1e-4)
    assert torch.allclose(actual[:, 2:], flow.sample(expert, noise)[:, 2:], atol=1e-12)


def test_steps_that_depend_on_the_frozen_ones_go_towards_what_follows_from_them_and_stay_spread():
    """Correlated steps, whose true conditional is known. A mask that ends at the frozen ones moves the rest by the Jacobian alone."""
    horizon, frozen = 8, 3
    step_H = torch.arange(horizon, dtype=torch.float64)
    covariance = 0.25 * 0.9 ** (step_H[:, None] - step_H).abs()

    def velocity(x_BHA, level_B11):
        level = level_B11[0].item()
        gain = (
            (1 - level) * covariance @ torch.linalg.inv((1 - level) ** 2 * covariance + level**2 * torch.eye(horizon))
        )
        return (x_BHA - gain @ x_BHA) / level

    flow, expert = Flow(num_sampling_steps=20), ClosedFormExpert(velocity)
    noise = normal(2000, horizon, 1)
    plan = (torch.linalg.cholesky(covariance) @ normal(horizon, 1, seed=3))[None]
    previous = torch.cat([torch.zeros(1, 4, 1), plan[:, :4]], dim=1).expand(2000, -1, -1)
    chunking = RealTimeChunking(schedule="zeros", max_guidance=5.0)
    guided = sampled(chunking, flow, expert, noise, previous, executed=4, delay=frozen)[..., 0]
    plain = flow.sample(expert, noise)[..., 0]
    known = plan[0, :frozen, 0]
    far = (plain[:, :frozen] - known).square().mean().sqrt()
    assert (guided[:, :frozen] - known).square().mean().sqrt() < 0.3 * far
    gain = covariance[frozen:, :frozen] @ torch.linalg.inv(covariance[:frozen, :frozen])
    conditional_mean = gain @ known
    conditional_std = (covariance[frozen:, frozen:] - gain @ covariance[:frozen, frozen:]).diag().sqrt()
    way = (guided[:, frozen:] - plain[:, frozen:]).mean(dim=0) / (conditional_mean - plain[:, frozen:].mean(dim=0))
    assert (way > 0.2).all() and (way < 1.1).all()
    assert (guided[:, frozen:].std(dim=0) > 0.9 * conditional_std).all()
    assert (guided[:, frozen:].std(dim=0) < plain[:, frozen:].std(dim=0)).all()


def test_the_correction_is_the_vector_jacobian_product_of_finite_differences():
    """An expert in which every entry depends on every other; one step, from level 1, where the strength is the bound."""
    torch.manual_seed(0)
    expert = LearningExpert(horizon=4, action_dim=2).double().requires_grad_(False)
    bound = expert.bind(torch.zeros(1, 0, dtype=torch.float64))
    noise, previous = normal(1, 4, 2), normal(1, 4, 2, seed=1)
    flow, chunking = Flow(num_sampling_steps=1), RealTimeChunking(max_guidance=0.8)
    actual = sampled(chunking, flow, bound, noise, previous, executed=1, delay=1)

    def clean(x):
        return x - bound(x, torch.ones(1, dtype=torch.float64))

    planned = torch.cat([previous[:, 1:], torch.zeros(1, 1, 2)], dim=1)
    missing = chunking.mask(4, 1, 1)[:, None] * (planned - clean(noise))
    pull = torch.zeros_like(noise)
    for place in itertools.product(range(1), range(4), range(2)):
        nudge = torch.zeros_like(noise)
        nudge[place] = 1e-6
        pull[place] = ((clean(noise + nudge) - clean(noise - nudge)) / 2e-6 * missing).sum()
    assert torch.allclose(actual, flow.sample(bound, noise) + 0.8 * pull, atol=1e-8)
    assert pull.abs().max() > 0.01


def test_an_expert_that_predicts_actions_is_corrected_alike():
    noise, previous = normal(3, 5, 2), normal(3, 5, 2, seed=1)
    velocity, sample = (
        sampled(RealTimeChunking(), Flow(num_sampling_steps=8, prediction=name), expert, noise, previous, executed=2)
        for name, expert in (
            ("velocity", ClosedFormExpert(GAUSSIAN.velocity)),
            ("sample", ClosedFormExpert(GAUSSIAN.clean)),
        )
    )
    assert torch.allclose(velocity, sample, atol=1e-10)


def test_other_solvers_end_where_many_steps_of_euler_do():
    noise, previous = normal(3, 5, 2), normal(3, 5, 2, seed=1)
    chunking, expert = RealTimeChunking(max_guidance=2.0), ClosedFormExpert(GAUSSIAN.velocity)
    fine = sampled(chunking, Flow(num_sampling_steps=2000), expert, noise, previous, executed=2)

    def error(solver):
        flow = Flow(num_sampling_steps=20, solver=solver)
        return (sampled(chunking, flow, expert, noise, previous, executed=2) - fine).abs().max()

    assert max(error("midpoint"), error("heun")) < 0.3 * error("euler")


def test_what_is_not_planned_or_not_the_robots_is_sampled_as_ever():
    expert, flow = ClosedFormExpert(GAUSSIAN.velocity), Flow()
    noise, previous = normal(3, 8, 4), normal(3, 8, 4, seed=1)
    used = torch.tensor([True, False, True, False])
    actual, plain = sampled(RealTimeChunking(), flow, expert, noise, previous, used=used), flow.sample(expert, noise)
    assert torch.equal(actual[:, :, ~used], plain[:, :, ~used])
    assert torch.equal(actual[:, 5:], plain[:, 5:]), "beyond the plan's end"
    assert not torch.isclose(actual[:, :5, used], plain[:, :5, used]).any()
    executed = previous.clone()
    executed[:, :3] = 100.0
    assert torch.equal(sampled(RealTimeChunking(), flow, expert, noise, executed, used=used), actual)
    nothing = sampled(RealTimeChunking(schedule="zeros"), flow, expert, noise, previous, delay=0)
    assert torch.equal(nothing, plain), "no step is frozen and none counts"


def test_rows_without_a_previous_chunk_are_the_plain_ones_and_the_others_do_not_notice():
    torch.manual_seed(0)
    bound = LearningExpert(horizon=6, action_dim=2).requires_grad_(False).bind(torch.zeros(4, 0))
    noise, previous = seeded_normal(4, 6, 2), seeded_normal(4, 6, 2, seed=1)
    flow, chunking = Flow(), RealTimeChunking()
    plain = flow.sample(bound, noise)
    everybody = sampled(chunking, flow, bound, noise, previous)
    has_previous = torch.tensor([True, False, True, False])
    some = sampled(chunking, flow, bound, noise, previous, has_previous=has_previous)
    assert torch.equal(some[~has_previous], plain[~has_previous])
    assert torch.equal(some[has_previous], everybody[has_previous])
    assert not torch.isclose(everybody, plain).all()
    assert torch.equal(sampled(chunking, flow, bound, noise, previous, has_previous=torch.zeros(4) > 0), plain)


@pytest.mark.parametrize(
    "objective", [Regression(), RSIMLE(), OneStep(), Shortcut(), Diffusion()], ids=lambda o: o.type
)
def test_objectives_without_a_velocity_that_is_integrated_are_refused(objective):
    with pytest.raises(
        ValueError, match=f"the objective '{objective.type}' samples otherwise; leave it out, or train with flow"
    ):
        RealTimeChunking().checked(objective)


def test_a_correction_that_goes_past_the_plan_is_refused():
    with pytest.raises(ValueError, match="max_guidance is 5 and num_sampling_steps 4: .* give max_guidance 4 or less"):
        RealTimeChunking().checked(Flow(num_sampling_steps=4))
    for max_guidance in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"max_guidance is .*; it must be more than 0, the paper's is 5"):
            RealTimeChunking(max_guidance=max_guidance)


# Acting.


def acting(real_time_chunking: RealTimeChunking | None = None) -> ActingPolicy:
    policy = make_policy()
    return ActingPolicy(
        policy,
        Language.build([INSTRUCTION], encoder="none"),
        weights_hash="",
        device=torch.device("cpu"),
        real_time_chunking=real_time_chunking,
    )


def observations(number: int = 3) -> list[RawObservation]:
    return raw_observations(*[INSTRUCTION] * number)


def noise_of(policy: ActingPolicy, number: int = 3) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((number, *policy.noise_shape), dtype=np.float32)


GUIDED = RealTimeChunking(max_guidance=2.0)  # the tiny policy samples in two steps


def test_acting_goes_on_with_the_previous_chunk_and_begins_as_ever():
    plain, guided = acting(), acting(GUIDED)
    assert (plain.reads_previous, guided.reads_previous) == (False, True)
    assert guided.sampling == {**plain.sampling, "real_time_chunking": "exponential", "max_guidance": 2.0}
    noise = noise_of(plain)
    usual = plain.act(observations(), noise)
    settings = {"num_executed_steps": EXECUTED, "inference_delay": 2}
    assert np.array_equal(guided.act(observations(), noise, **settings), usual), "a first decision is the plain one"
    previous = np.full_like(usual, 1.5)
    previous[1] = np.nan
    chunk = guided.act(observations(), noise, previous=previous, **settings)
    assert np.array_equal(chunk[1], usual[1])
    planned = [np.abs(chunks[[0, 2], :2] - 1.5).mean() for chunks in (chunk, usual)]
    assert planned[0] < 0.8 * planned[1]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in guided.policy.parameters())
    with torch.inference_mode():
        assert np.array_equal(guided.act(observations(), noise, previous=previous, **settings), chunk)
    one = guided.act(observations()[0], noise[:1], previous=previous[0], **settings)
    assert np.array_equal(one, guided.act(observations(1), noise[:1], previous=previous[:1], **settings)[0])


def test_chunks_are_held_together_normalised():
    """In other units of the robot the same normalised chunk comes out."""
    plain, scaled = acting(GUIDED), acting(GUIDED)
    normaliser = scaled.policy.action_normaliser
    normaliser._scale = (1e-2, 1.0, 1e2, 1.0, 1e-2, 1e2, 1.0)
    normaliser._fill(torch.device("cpu"))
    usual = plain.policy.action_normaliser
    noise, previous = noise_of(plain), torch.linspace(-1, 1, 3 * 4 * 7).view(3, 4, 7)
    chunks = [
        policy.policy.action_normaliser(
            torch.from_numpy(
                policy.act(
                    observations(),
                    noise,
                    previous=policy.policy.action_normaliser.inverse(usual(previous)).numpy(),
                    num_executed_steps=EXECUTED,
                )
            )
        )
        for policy in (plain, scaled)
    ]
    torch.testing.assert_close(*chunks, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_gone_on_with_is_refused():
    guided = acting(GUIDED)
    with pytest.raises(ValueError, match=r"real-time chunking num_executed_steps must say .*: 1 to 3"):
        guided.act(observations(), noise_of(guided))
    with pytest.raises(ValueError, match=r"the previous chunks are \(3, 9, 7\), these will be \(3, 4, 7\)"):
        guided.act(observations(), noise_of(guided), previous=np.zeros((3, 9, 7), np.float32), num_executed_steps=1)
    with pytest.raises(ValueError, match="inference delay of 3 steps with 2 executed of a chunk of 4"):
        guided.act(observations(), noise_of(guided), num_executed_steps=2, inference_delay=3)
    with pytest.raises(ValueError, match="max_guidance is 2 and num_sampling_steps 1"):
        guided.with_sampling_steps(1)
    with pytest.raises(ValueError, match="num_candidates is 2, and real-time chunking holds one chunk"):
        ActingPolicy(
            make_policy(),
            guided.language,
            weights_hash="",
            device=guided.device,
            num_candidates=2,
            real_time_chunking=GUIDED,
        )


def test_a_checkpoint_is_loaded_with_it(tmp_path, monkeypatch):
    policy = make_policy()
    write_policy(tmp_path, policy, policy.state_dict(), Language.build([INSTRUCTION], encoder="none"), {})
    (tmp_path / COMPLETE).write_text("")
    strong = load_policy(tmp_path, device="cpu", real_time_chunking=RealTimeChunking())
    assert strong.with_sampling_steps(5).num_sampling_steps == 5, "trained with 2, which are too few"
    for refused in (lambda: strong.with_sampling_steps(2), lambda: strong.act(observations(), num_executed_steps=1)):
        with pytest.raises(ValueError, match="max_guidance is 5 and num_sampling_steps 2"):
            refused()
    loaded, noise = load_policy(tmp_path, device="cpu", real_time_chunking=GUIDED), noise_of(acting())
    settings = {"previous": np.ones((3, 4, 7), np.float32), "num_executed_steps": 1, "inference_delay": 1}
    assert np.array_equal(
        loaded.act(observations(), noise, **settings), acting(GUIDED).act(observations(), noise, **settings)
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # for this process's other tests
    asked = SweepConfig(runs=(), device="cpu", real_time_chunking="linear", max_guidance=1.5)
    for config, expected in (
        (asked, RealTimeChunking(schedule="linear", max_guidance=1.5)),
        (SweepConfig(runs=()), None),
    ):
        assert load_for_sweep(Checkpoint(path=tmp_path, step=1), config).real_time_chunking == expected


FLOWS = [name for name, preset in PRESETS.items() if isinstance(preset(tiny=True).objective, Flow)]


@pytest.mark.parametrize("name", FLOWS)
def test_every_expert_can_be_differentiated(name):
    """The frozen steps of every flow preset come nearer to the plan; entries that the robot lacks have none."""
    policy = preset_policies.make_policy(name).eval().requires_grad_(False)
    batch = preset_policies.make_batch(policy.config)
    flow = dataclasses.replace(policy.config.objective, num_sampling_steps=5)
    horizon, width = policy.noise_shape
    noise, used = seeded_normal(3, horizon, width), policy.action_layout.mask_W
    with torch.no_grad():
        bound = policy.bind(batch.observation)
        plain = flow.sample(bound, noise)
        executed = horizon // 2
        previous = torch.cat([plain[:, :executed], plain[:, : horizon - executed] + 0.3], dim=1)
        guided = sampled(RealTimeChunking(), flow, bound, noise, previous, executed=executed, delay=1, used=used)
    assert guided.isfinite().all() and not guided.requires_grad
    left = (guided - plain - 0.3)[:, 0, used].abs().mean()
    assert left < 0.02
