"""Regression: the mean, the median or what lies between; one constant query; every preset under it."""

import dataclasses
import math

import pytest
import torch
from preset_policies import make_batch, make_policy
from toy_problems import ClosedFormExpert, Gaussian, LearningExpert, Skew, TwoModes, seeded_normal, trained

from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.objectives.objective import Draw
from vlatune.policy.objectives.regression import Regression
from vlatune.policy.presets import PRESETS

OUTPUTS = ("action", "aligned")
SETTINGS = [Regression(error=error, output=output) for error in ("l1", "mse", "huber") for output in OUTPUTS]
# What multiplies the action tokens sees only zeros; the MLP's and RDT's share a weight with other inputs.
UNREAD_AT_ZERO = {
    "pi0": {"expert.action_in_proj.weight"},
    "pi05": {"expert.action_in_proj.weight"},
    "smolvla": {"expert.action_in_proj.weight"},
    "rdt": set(),
    "clip_flow": set(),
    "clip_unet": {f"expert.unet.down_modules.0.0.{name}.weight" for name in ("blocks.0.block.0", "residual_conv")},
}


def named(objective):
    return f"{objective.error}-{objective.output}"


def keys(batch, step=0):
    return DrawKeys(seed=0, step=step, sample_index_B=torch.arange(batch))


def all_of(actions):
    return torch.ones_like(actions, dtype=torch.bool)


def loss_of(objective, expert, actions, valid=None):
    draw = objective.draw(actions, keys(len(actions)))
    return objective.loss(expert, actions, all_of(actions) if valid is None else valid, draw)


def mean_of(loss):
    return (loss.entries_BHA * loss.weight_BHA).sum() / loss.weight_BHA.sum()


@pytest.mark.parametrize(
    ("error", "problem", "best", "floor"),
    [
        ("mse", Gaussian(), 0.7, 0.09),
        ("l1", Gaussian(), 0.7, 0.3 * math.sqrt(2 / math.pi)),
        ("huber", Gaussian(), 0.7, 0.045),  # hardly an error is above its delta of 1
        ("mse", Skew(), 0.3, 0.21),
        ("huber", Skew(), 0.3, 0.105),
        ("mse", TwoModes(), 0.0, 1.0),
    ],
)
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_best_constant_reaches_the_loss_floor_and_its_gradient_vanishes(error, problem, best, floor, output):
    actions = problem.actions(4000, 8, 4)
    shift = torch.zeros((), requires_grad=True)
    sign = -1 if output == "aligned" else 1
    expert = ClosedFormExpert(lambda x, level: torch.full_like(x, sign * best), shift=shift)
    loss = mean_of(loss_of(Regression(error=error, output=output), expert, actions))
    loss.backward()
    assert loss.item() == pytest.approx(floor, rel=0.01)
    assert shift.grad.abs() < 0.015


def test_the_absolute_error_is_flat_between_two_modes():
    actions = torch.tensor([-1.0, 1.0])[:, None, None]
    for answer in (-1.0, -0.4, 0.0, 0.7, 1.0):
        expert = ClosedFormExpert(lambda x, level, answer=answer: torch.full_like(x, answer))
        assert mean_of(loss_of(Regression(), expert, actions)).item() == pytest.approx(1.0)


def test_every_error_by_hand():
    answer, actions = torch.tensor([0.0, 0.5, 2.0, -3.0]), torch.zeros(1, 1, 4)
    expert = ClosedFormExpert(lambda x, level: x + answer)
    entries = {
        "l1": [0, 0.5, 2, 3],
        "mse": [0, 0.25, 4, 9],
        "huber": [0, 0.125, 0.75 * (2 - 0.375), 0.75 * (3 - 0.375)],
    }
    for error, expected in entries.items():
        loss = loss_of(Regression(error=error, huber_delta=0.75), expert, actions)
        assert loss.entries_BHA.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("objective", "best"),
    [
        (Regression(error="l1"), 0.0),  # the median of 70 % zeros and 30 % ones
        (Regression(error="mse"), 0.3),
        (Regression(error="mse", output="aligned"), 0.3),
        (Regression(error="huber"), 0.3),
        (Regression(error="huber", huber_delta=0.1), 3 / 70),  # 0.7 p = 0.3 * 0.1
    ],
    ids=lambda value: named(value) if isinstance(value, Regression) else None,
)
def test_skewed_actions_are_answered_by_their_median_mean_or_between(objective, best):
    torch.manual_seed(0)
    nothing = torch.zeros(512, 0)
    expert = trained(
        objective,
        lambda step: (nothing, Skew().actions(512, 1, 1, seed=step)),
        LearningExpert(width=16),
        num_steps=150,
    )
    answer = objective.sample(expert.bind(nothing), seeded_normal(512, 1, 1))
    assert answer.std() < 1e-5
    assert answer.mean().item() == pytest.approx(best, abs=0.03)


@pytest.mark.parametrize("objective", SETTINGS, ids=named)
def test_a_conditional_task_is_learnt(objective):
    def task(step):
        condition = seeded_normal(128, 2, seed=step)
        return condition, torch.stack([condition.sin(), condition.flip(1).cos()], dim=1)

    torch.manual_seed(0)
    expert = trained(objective, task, LearningExpert(horizon=2, action_dim=2, condition_dim=2), num_steps=500)
    condition, actions = task(999_999)
    answer = objective.sample(expert.bind(condition), seeded_normal(128, 2, 2))
    assert (answer - actions).abs().mean() < 0.04


@pytest.mark.parametrize(("output", "level", "answer"), [("action", 0.0, 0.25), ("aligned", 1.0, -0.25)])
def test_the_query_is_zero_at_one_level_in_training_and_in_acting(output, level, answer):
    objective, seen = Regression(output=output), []
    expert = ClosedFormExpert(lambda x, level: seen.append(x) or x + 0.25)
    actions = seeded_normal(3, 2, 2)
    draw = objective.draw(actions, keys(3))
    loss_of(objective, expert, actions)
    sample = objective.sample(expert, seeded_normal(3, 2, 2))
    assert expert.levels == [level, level]
    assert draw.noise_level_B.tolist() == [level] * 3
    assert not torch.stack([*seen, draw.noise_BHA]).any()
    assert torch.equal(sample, torch.full((3, 2, 2), answer))
    assert objective.num_sampling_steps == len(expert.levels) - 1


def test_aligned_starts_from_a_flow_experts_own_answer():
    """The exact velocity at pure noise leads to the mean of the actions; read as an action it would be its negative."""
    problem, noise = Gaussian(), torch.zeros(2, 3, 4)
    expert = ClosedFormExpert(problem.velocity)
    assert torch.allclose(Regression(output="aligned").sample(expert, noise), torch.full_like(noise, 0.7))
    loss = loss_of(Regression(error="mse", output="aligned"), expert, problem.actions(4000, 8, 4))
    assert mean_of(loss).item() == pytest.approx(0.09, rel=0.01)


@pytest.mark.parametrize("objective", SETTINGS, ids=named)
def test_padded_steps_and_unused_dimensions_change_neither_loss_nor_gradient(objective):
    torch.manual_seed(0)
    expert, condition = LearningExpert(horizon=4, action_dim=3, condition_dim=2), seeded_normal(5, 2)
    actions, valid = seeded_normal(5, 4, 3), torch.ones(5, 4, 3, dtype=torch.bool)
    valid[1, 2:], valid[..., 2] = False, False
    results = []
    for version in (actions, torch.where(valid, actions, 50.0)):
        expert.zero_grad()
        loss = mean_of(loss_of(objective, expert.bind(condition), version, valid))
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in expert.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("output", OUTPUTS)
def test_noise_is_not_read(output):
    torch.manual_seed(0)
    objective = Regression(output=output)
    bound = LearningExpert(horizon=2, action_dim=3, condition_dim=2).bind(seeded_normal(4, 2))
    samples = [objective.sample(bound, seeded_normal(4, 2, 3, seed=seed)) for seed in (0, 1)]
    assert torch.equal(*samples)
    actions = seeded_normal(4, 2, 3)
    drawn = [objective.draw(actions, keys(4, step=step)) for step in (0, 1)]
    assert torch.equal(drawn[0].noise_BHA, drawn[1].noise_BHA)
    recorded = Draw(noise_BHA=seeded_normal(4, 2, 3), noise_level_B=torch.rand(4))
    losses = [objective.loss(bound, actions, all_of(actions), draw).entries_BHA for draw in (drawn[0], recorded)]
    assert torch.equal(*losses)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="objective.huber_delta is 0; it must be more than 0"):
        Regression(error="huber", huber_delta=0)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_but_for_the_weights_that_multiply_the_zero_query(name, output):
    policy = make_policy(dataclasses.replace(PRESETS[name](tiny=True), objective=Regression(output=output)))
    batch = make_batch(policy.config)
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for step in range(3):
        loss = mean_of(policy(batch, keys(len(batch.valid_BH), step=step)))
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            trainable = {key: p.grad for key, p in policy.named_parameters() if p.requires_grad}
            # None would be another set of gradients on every rank's reduction; zeros are not.
            assert all(grad is not None for grad in trainable.values())
            zeros = {key for key, grad in trainable.items() if not grad.any()}
            # A bias on keys shifts all scores alike: softmax takes it away, up to rounding.
            assert {key for key in zeros if not key.endswith(("k_proj.bias", "qkv.bias"))} == UNREAD_AT_ZERO[name]
        optimizer.step()
    assert losses[2] < losses[0]
    assert all(torch.equal(policy.state_dict()[key], before[key]) for key in UNREAD_AT_ZERO[name])
    samples = [policy.sample(batch.observation, torch.randn(3, *policy.noise_shape)) for _ in range(2)]
    assert samples[0].shape == (3, *policy.action_shape)
    assert torch.equal(*samples)
