"""Flow matching against closed forms, and what every objective of its family keeps (one-step and shortcut have more in their
own files)."""

import math
from dataclasses import replace

import pytest
import torch
from preset_policies import make_batch
from preset_policies import make_policy as make_preset_policy
from toy_problems import ClosedFormExpert, Gaussian, LearningExpert, TwoModes, seeded_normal, trained

from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.objectives.flow import Flow, integrated
from vlatune.policy.objectives.one_step import OneStep
from vlatune.policy.objectives.shortcut import Shortcut
from vlatune.policy.presets import PRESETS

G = Gaussian()
FAMILY = {
    "flow": Flow(),
    "flow, shifted logit-normal and pure noise, midpoint": Flow(
        noise_levels="logit_normal",
        logit_mean=-0.4,
        level_shift=3.0,
        pure_noise_share=0.2,
        solver="midpoint",
        num_sampling_steps=2,
    ),
    "flow, heun": Flow(noise_levels="uniform", solver="heun", num_sampling_steps=2),
    "flow, clean action": Flow(prediction="sample", noise_levels="uniform", num_sampling_steps=2),
    "one step": OneStep(),
    "one step, l1, mixture": OneStep(error="l1", pure_noise_share=0.5, num_sampling_steps=2),
    "shortcut": Shortcut(num_base_steps=16, bootstrap_share=0.5, clip=4.0, num_sampling_steps=2),
}
family = pytest.mark.parametrize("objective", FAMILY.values(), ids=FAMILY.keys())


def keys(batch, step=0, seed=0):
    return DrawKeys(seed=seed, step=step, sample_index_B=torch.arange(batch))


def valid_like(actions):
    return torch.ones_like(actions, dtype=torch.bool)


def weighted(loss):
    return (loss.entries_BHA * loss.weight_BHA).sum() / loss.weight_BHA.sum()


def learning_expert(objective, **sizes):
    torch.manual_seed(0)
    return LearningExpert(second_level=objective.has_second_level, **sizes)


def gradient_of(loss, module):
    module.zero_grad()
    weighted(loss).backward()
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


# Flow against closed forms


@pytest.mark.parametrize(
    ("law", "floor"), [({"noise_levels": "uniform"}, G.uniform_loss_floor), ({"noise_levels": "pi0"}, 0.350128)]
)
def test_the_exact_velocity_reaches_the_loss_floor_and_has_no_gradient(law, floor):
    objective = Flow(**law)
    actions = G.actions(20_000, 10, 3)
    draw = objective.draw(actions, keys(len(actions)))
    gradients = {}
    for wrong in (0.0, 0.05):
        shift = torch.full((2,), wrong, requires_grad=True)
        # A constant, and a slope in x, added to the exact velocity.
        expert = ClosedFormExpert(lambda x, level, shift=shift: G.velocity(x, level) + shift[0] + shift[1] * x)
        mean = weighted(objective.loss(expert, actions, valid_like(actions), draw))
        mean.backward()
        gradients[wrong] = shift.grad.abs().max().item()
        if not wrong:
            assert mean.item() == pytest.approx(floor, rel=0.01)
    assert gradients[0.0] < 0.01
    assert gradients[0.05] > 0.1


def test_the_floor_is_that_of_the_levels_drawn():
    objective = Flow(noise_levels="pi0", level_shift=4.0, pure_noise_share=0.3)
    actions = G.actions(20_000, 10, 3)
    draw = objective.draw(actions, keys(len(actions)))
    loss = objective.loss(ClosedFormExpert(G.velocity), actions, valid_like(actions), draw)
    assert weighted(loss).item() == pytest.approx(G.velocity_variance(draw.noise_level_B).mean().item(), rel=0.01)


SPREADS = [
    ("euler", 1, 0.0),
    ("euler", 2, 0.082569),
    ("euler", 4, 0.177247),
    ("euler", 10, 0.246865),
    ("euler", 128, 0.295518),
    ("midpoint", 1, 2 * 0.3**2 / (1 + 0.3**2)),
    ("midpoint", 5, 0.298809),
    ("heun", 1, 0.0),
    ("heun", 5, 0.241210),
]


@pytest.mark.parametrize(("solver", "num_steps", "std"), SPREADS)
def test_samples_have_the_known_spread(solver, num_steps, std):
    noise = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)[:, None, None]
    expert = ClosedFormExpert(G.velocity)
    samples = Flow(solver=solver, num_sampling_steps=num_steps).sample(expert, noise)
    assert torch.allclose(samples, G.mean + std * noise, atol=1e-6)
    if solver == "euler":
        assert torch.allclose(samples, G.mean + G.euler_std(num_steps) * noise, rtol=0, atol=1e-12)
    calls = {"euler": num_steps, "midpoint": 2 * num_steps, "heun": 2 * num_steps - 1}
    assert len(expert.levels) == calls[solver]


def test_a_predicted_action_is_the_velocity_in_other_words():
    """The action that the exact velocity implies gives its samples, and its loss above the least level; below, less."""
    actions, laws = G.actions(20_000, 10, 3), {"noise_levels": "uniform"}
    draw = Flow(**laws).draw(actions, keys(len(actions)))
    as_action = ClosedFormExpert(lambda x, level: x - level * G.velocity(x, level))
    entries = [
        objective.loss(expert, actions, valid_like(actions), draw).entries_BHA
        for objective, expert in (
            (Flow(**laws), ClosedFormExpert(G.velocity)),
            (Flow(prediction="sample", **laws), as_action),
        )
    ]
    above = draw.noise_level_B >= 0.05
    torch.testing.assert_close(entries[1][above], entries[0][above], rtol=1e-3, atol=1e-4)
    assert (entries[1][~above] <= entries[0][~above] + 1e-4).all()
    noise = seeded_normal(100, 10, 3)
    samples = [
        Flow(prediction=prediction).sample(expert, noise)
        for prediction, expert in (("velocity", ClosedFormExpert(G.velocity)), ("sample", as_action))
    ]
    torch.testing.assert_close(samples[1], samples[0], rtol=1e-4, atol=1e-5)


def test_euler_steps_on_two_modes():
    noise = seeded_normal(200_000, 1, 1)
    one, two = (integrated(ClosedFormExpert(TwoModes().velocity), noise, num_steps=steps) for steps in (1, 2))
    assert one.abs().max() < 1e-6
    assert torch.allclose(two, noise.tanh(), atol=1e-5)
    assert two.std().item() == pytest.approx(0.6279, abs=0.004)
    assert (two.abs() > 0.9).float().mean().item() == pytest.approx(0.1410, abs=0.004)


@pytest.mark.parametrize(
    ("solver", "levels"),
    [
        ("euler", [1 - i / 10 for i in range(10)]),
        ("midpoint", [1 - i / 20 for i in range(20)]),
        ("heun", [1.0, *(1 - i / 10 for i in range(1, 10) for _ in (0, 1))]),
    ],
)
def test_levels_are_counted_and_none_is_zero(solver, levels):
    expert = ClosedFormExpert(G.velocity)
    integrated(expert, torch.zeros(1, 1, 1, dtype=torch.float64), num_steps=10, solver=solver)
    assert expert.levels == levels  # to the last bit


# Noise levels

LAWS = [
    # law, mean, share above 0.9, share below 0.1 (None: not known in closed form)
    ({"noise_levels": "uniform"}, 0.5, 0.10, 0.1),
    ({"noise_levels": "pi0"}, 0.6004, 0.1463, 0.031),
    ({"noise_levels": "logit_normal", "logit_mean": -0.4}, None, 0.0047, 0.0361),
    ({"noise_levels": "logit_normal", "logit_mean": 0.8, "logit_std": 0.8}, None, 0.040, None),
    ({"noise_levels": "uniform", "level_shift": 4.0}, 0.7172, 0.308, 0.1 / 3.7),
    ({"noise_levels": "pi0", "level_shift": 4.0}, 0.8061, 0.424, None),
    ({"noise_levels": "uniform", "level_shift": 8.0}, 0.8034, 0.471, None),
    ({"noise_levels": "pi0", "level_shift": 3.0}, 0.7699, 0.350, None),
    ({"noise_levels": "uniform", "pure_noise_share": 0.25}, 0.625, 0.325, 0.075),
    ({"noise_levels": "pi0", "pure_noise_share": 1.0}, 1.0, 1.0, 0.0),
]


@pytest.mark.parametrize(("law", "mean", "high", "low"), LAWS)
def test_noise_levels_follow_their_law(law, mean, high, low):
    uniform_B = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    level_B = Flow(**law).level(uniform_B)
    assert level_B.min() >= 0
    assert level_B.max() <= 1
    for share, known in ((level_B > 0.9, high), (level_B < 0.1, low)):
        assert known is None or share.double().mean().item() == pytest.approx(known, abs=1e-3)
    if mean is not None:
        assert level_B.mean().item() == pytest.approx(mean, abs=1e-3)
    if "logit_mean" in law:
        assert level_B.median().item() == pytest.approx(1 / (1 + math.exp(-law["logit_mean"])), abs=1e-5)
    if law["noise_levels"] == "pi0":
        assert level_B.min() >= 0.001


@pytest.mark.parametrize("noise_levels", ["uniform", "pi0", "logit_normal"])
def test_a_shift_of_one_and_no_pure_noise_are_the_law_itself(noise_levels):
    uniform_B = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    law = Flow(noise_levels=noise_levels)
    assert torch.equal(law.level(uniform_B), replace(law, level_shift=1.0, pure_noise_share=0.0).level(uniform_B))
    assert torch.allclose(law.level(uniform_B), replace(law, level_shift=1 + 1e-7).level(uniform_B), atol=1e-6)
    other = replace(law, level_shift=4.0).level(uniform_B)
    assert torch.allclose(other, 4 * law.level(uniform_B) / (1 + 3 * law.level(uniform_B)))


def test_extreme_numbers_are_levels_too():
    ends_B = torch.tensor([0.0, 1 - 2**-24])
    for law, *_ in LAWS:
        level_B = Flow(**law).level(ends_B)
        assert torch.isfinite(level_B).all()
        assert ((level_B >= 0) & (level_B <= 1)).all()


UNIFORM_DRAWN = [0.142407358, 0.951644540, 0.507618606, 0.0158394575]
NOISE_DRAWN = [-1.35043490, 1.16516507, -0.927045941, -0.329602808]


def test_the_draws_of_earlier_versions_stay():
    """Of seed 3, step 2, samples 0 and 1: a stored recipe goes on giving the same run."""
    for noise_levels, levels in (
        ("uniform", UNIFORM_DRAWN),
        ("pi0", [0.001 + 0.999 * u ** (2 / 3) for u in UNIFORM_DRAWN]),
    ):
        draw = Flow(noise_levels=noise_levels, num_draws=2).draw(torch.zeros(2, 1, 1), keys(2, step=2, seed=3))
        assert draw.noise_level_B.tolist() == pytest.approx(levels, abs=1e-6)
        assert draw.noise_BHA.flatten().tolist() == pytest.approx(NOISE_DRAWN, abs=1e-6)


# What every objective of the family keeps


@family
def test_draws_depend_on_step_and_sample_but_not_on_the_rank_that_makes_them(objective):
    objective = replace(objective, num_draws=3)
    actions = torch.zeros(8, 4, 7)
    whole = objective.draw(actions, keys(8, step=5))
    half = objective.draw(actions[:4], DrawKeys(seed=0, step=5, sample_index_B=torch.arange(4, 8)))
    assert torch.equal(whole.noise_BHA[12:], half.noise_BHA)
    assert torch.equal(whole.noise_level_B[12:], half.noise_level_B)
    if objective.has_second_level:
        assert torch.equal(whole.second_level_B[12:], half.second_level_B)
    for other in (keys(8, step=6), keys(8, step=5, seed=1)):
        assert not torch.equal(whole.noise_BHA, objective.draw(actions, other).noise_BHA)
    assert len(whole.noise_BHA.unique()) == whole.noise_BHA.numel()


@family
def test_padded_steps_and_unused_dimensions_change_neither_loss_nor_gradient(objective):
    """With an expert that answers entry by entry: one that attends sees padding as part of its input."""
    objective = replace(objective, num_draws=2)
    actions = seeded_normal(6, 4, 5)
    valid = valid_like(actions)
    valid[2:4, 2:] = False
    valid[:, :, 3:] = False
    draw = objective.draw(actions, keys(6))
    losses, gradients = [], []
    for version in (actions, torch.where(valid, actions, 9.0)):
        shift = torch.zeros((), requires_grad=True)
        loss = weighted(objective.loss(ClosedFormExpert(lambda x, *levels: 0.3 * x, shift), version, valid, draw))
        loss.backward()
        losses.append(loss.item())
        gradients.append(shift.grad.item())
    assert losses[0] == losses[1] > 0
    assert gradients[0] == gradients[1] != 0


@family
def test_the_gradient_of_several_draws_is_the_mean_of_theirs(objective):
    objective = replace(objective, num_draws=4)
    actions, condition = seeded_normal(6, 4, 2), seeded_normal(6, 3, seed=1)
    valid = valid_like(actions)
    valid[1, 2:] = False
    expert = learning_expert(objective, horizon=4, action_dim=2, condition_dim=3)
    draw = objective.draw(actions, keys(6))
    together = gradient_of(objective.loss(expert.bind(condition), actions, valid, draw), expert)
    single = []
    for k in range(4):
        fields = {name: getattr(draw, name) for name in ("noise_BHA", "noise_level_B", "second_level_B")}
        rows = replace(draw, **{name: value[k::4] for name, value in fields.items() if value is not None})
        single.append(gradient_of(objective.loss(expert.bind(condition), actions, valid, rows), expert))
    assert torch.allclose(together, torch.stack(single).mean(dim=0), atol=1e-5)
    assert (single[0] - single[1]).abs().max() > 1e-3


@family
def test_every_rank_makes_the_same_calls_whatever_it_drew(objective):
    objective = replace(objective, num_draws=2)
    actions = seeded_normal(4, 3, 2)
    calls = set()
    for step in range(12):
        expert = ClosedFormExpert(lambda x, *levels: x)
        objective.loss(expert, actions, valid_like(actions), objective.draw(actions, keys(4, step=step)))
        calls.add(tuple(expert.num_rows))
    assert len(calls) == 1


@family
def test_nothing_waits_for_a_device(objective):
    objective = replace(objective, num_draws=2)
    actions = torch.empty(3, 4, 2, device="meta")  # reading a number from it would raise
    draw = objective.draw(actions, keys(3))
    assert draw.noise_level_B.device.type == "meta"

    class Expert:
        def __call__(self, x_BHA, *levels):
            return x_BHA * sum(level[:, None, None] for level in levels)

        def fan_out(self, num_candidates):
            return self

    loss = objective.loss(Expert(), actions, actions > 0, draw)
    assert loss.entries_BHA.shape == loss.weight_BHA.shape == (6, 4, 2)
    assert all(value.shape == () for value in loss.metrics.values())
    assert objective.sample(Expert(), actions).shape == (3, 4, 2)


@family
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_a_step_and_samples(name, objective):
    config = replace(PRESETS[name](tiny=True), objective=replace(objective, num_draws=2))
    policy, batch = make_preset_policy(config), make_batch(config)
    loss = policy(batch, DrawKeys(seed=0, step=0, sample_index_B=batch.sample_index_B))
    assert len(loss.entries_BHA) == 2 * len(batch.actions_BHA)
    weighted(loss).backward()
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.requires_grad]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
    assert policy.expert.second_level_embedding is None or all(
        parameter.grad.abs().max() > 0 for parameter in policy.expert.second_level_embedding.parameters()
    )
    noise = torch.randn(3, *policy.noise_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = policy.sample(batch.observation, noise), policy.sample(batch.observation, noise)
        other = policy.sample(batch.observation, noise + 1)
    assert first.shape == (3, *policy.action_shape)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


# Learning


def test_learns_both_modes():
    objective = Flow(noise_levels="uniform", num_draws=4, num_sampling_steps=30)
    nothing = torch.zeros(128, 0)
    expert = trained(
        objective,
        lambda step: (nothing, TwoModes().actions(128, 1, 1, seed=step)),
        learning_expert(objective),
        num_steps=800,
    )
    with torch.no_grad():
        samples = objective.sample(expert.bind(torch.zeros(4000, 0)), seeded_normal(4000, 1, 1, seed=9))
    assert (samples > 0).float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert (samples.abs() - 1).abs().lt(0.3).float().mean() > 0.85


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="must be at least 1"):
        Flow(num_sampling_steps=0)
    with pytest.raises(ValueError, match=r"objective.level_shift 0; both must be more than 0"):
        Flow(level_shift=0)
    with pytest.raises(ValueError, match=r"objective.logit_std is -1"):
        Flow(logit_std=-1)
    with pytest.raises(ValueError, match=r"objective.pure_noise_share is 1.5; it is a share"):
        Flow(pure_noise_share=1.5)
