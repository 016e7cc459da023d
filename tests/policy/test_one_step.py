"""Acting in one step: what its end point is the mean or the median of, and the sign of its collapse.

What it shares with flow is tested in test_flow.py."""

import math

import pytest
import torch
from toy_problems import ClosedFormExpert, Gaussian, LearningExpert, Skew, TwoModes, seeded_normal, trained

from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.objectives.flow import Flow
from vlatune.policy.objectives.objective import Draw
from vlatune.policy.objectives.one_step import OneStep

G, K = Gaussian(), Skew()


def keys(batch):
    return DrawKeys(seed=0, step=0, sample_index_B=torch.arange(batch))


def loss_of(objective, function, actions, draw=None):
    draw = draw or objective.draw(actions, keys(len(actions)))
    return objective.loss(ClosedFormExpert(function), actions, torch.ones_like(actions, dtype=torch.bool), draw)


def predicts(action):
    """The velocity whose one step ends at `action`."""
    return lambda x, level: x - action


@pytest.mark.parametrize(
    ("problem", "error", "best", "floor"),
    [
        (G, "l2", G.mean, G.std**2),
        (G, "l1", G.mean, G.std * math.sqrt(2 / math.pi)),
        (K, "l2", 0.3, 0.21),
        (K, "l1", 0.0, 0.3),  # the median: the skew's rarer side is given up
    ],
)
def test_the_best_end_point_is_the_mean_or_the_median(problem, error, best, floor):
    objective, actions = OneStep(error=error), problem.actions(2000, 10, 12)
    losses = {shift: loss_of(objective, predicts(best + shift), actions).entries_BHA.mean() for shift in (-0.1, 0, 0.1)}
    assert losses[0].item() == pytest.approx(floor, rel=0.01)
    assert losses[0] < min(losses[-0.1], losses[0.1])


def test_the_gradient_vanishes_at_the_mean():
    actions = G.actions(2000, 10, 12)
    for mean, vanishes in ((G.mean, True), (G.mean + 0.05, False)):
        action = torch.full((), mean, requires_grad=True)
        loss_of(OneStep(), predicts(action), actions).entries_BHA.mean().backward()
        assert (action.grad.abs().item() < 0.005) == vanishes


def test_acting_is_one_step_from_noise():
    noise = seeded_normal(5, 4, 3)
    expert = ClosedFormExpert(TwoModes().velocity)
    assert torch.equal(OneStep().sample(expert, noise), noise - TwoModes().velocity(noise, torch.ones(5, 1, 1)))
    assert expert.levels == [1.0]


def test_below_pure_noise_it_is_flow():
    """A mixture's entries: the end point's error at level 1, flow's elsewhere, and the share is kept."""
    objective = OneStep(error="l1", pure_noise_share=0.5)
    actions = G.actions(4000, 1, 1)
    draw = objective.draw(actions, keys(4000))
    is_pure = draw.noise_level_B == 1
    assert is_pure.float().mean().item() == pytest.approx(0.5, abs=0.02)
    entries = loss_of(objective, lambda x, level: 0.3 * x, actions, draw).entries_BHA
    flow = loss_of(Flow(), lambda x, level: 0.3 * x, actions, draw).entries_BHA
    assert torch.equal(entries[~is_pure], flow[~is_pure])
    assert torch.allclose(entries[is_pure].square(), flow[is_pure])


@pytest.mark.parametrize("scale", [0.0, 0.25])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_the_collapse_detector_is_the_spread_between_draws_of_an_observation(scale, share):
    """Actions differ between observations, which must not count."""
    objective = OneStep(num_draws=8, pure_noise_share=share)
    actions = 3 * seeded_normal(400, 2, 3)
    draw = objective.draw(actions, keys(400))
    constant = actions.repeat_interleave(8, dim=0)
    loss = loss_of(objective, lambda x, level: x - constant - scale * x, actions, draw)
    assert loss.metrics["draw_std"].item() == pytest.approx(scale, rel=0.03, abs=1e-4)
    assert not loss.metrics["draw_std"].requires_grad


def test_the_collapse_detector_leaves_out_padding_and_needs_two_draws():
    actions = torch.zeros(1, 2, 1)
    noise = torch.tensor([[[1.0], [5.0]], [[-1.0], [-7.0]]])
    draw = Draw(noise_BHA=noise, noise_level_B=torch.ones(2))
    valid = torch.tensor([[[True], [False]]])
    expert = ClosedFormExpert(lambda x, level: 0 * x)
    assert OneStep(num_draws=2).loss(expert, actions, valid, draw).metrics["draw_std"].item() == pytest.approx(2**0.5)
    single = Draw(noise_BHA=noise[:1], noise_level_B=torch.ones(1))
    assert OneStep().loss(expert, actions, valid, single).metrics == {}


def test_learns_the_mean_given_a_condition_and_collapses_onto_it():
    def task(step):
        condition_BC = 2 * torch.rand(128, 1, generator=torch.Generator().manual_seed(10_000 + step)) - 1
        return condition_BC, condition_BC[..., None] + 0.3 * seeded_normal(128, 1, 1, seed=step)

    objective = OneStep(num_draws=4)
    torch.manual_seed(0)
    expert = trained(objective, task, LearningExpert(condition_dim=1), num_steps=300)
    condition_BC = torch.linspace(-0.9, 0.9, 7).repeat_interleave(200)[:, None]
    with torch.no_grad():
        samples = objective.sample(expert.bind(condition_BC), seeded_normal(1400, 1, 1, seed=9)).view(7, 200)
    assert (samples.mean(dim=1) - torch.linspace(-0.9, 0.9, 7)).abs().max() < 0.06
    assert samples.std(dim=1).max() < 0.06  # of actions that spread by 0.3


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="must be at least 1"):
        OneStep(num_draws=0)
    with pytest.raises(ValueError, match=r"pure_noise_share is 0, which trains no one step"):
        OneStep(pure_noise_share=0.0)
    with pytest.raises(ValueError, match=r"num_sampling_steps is 10, and .* set num_sampling_steps to 1"):
        OneStep(num_sampling_steps=10)
    with pytest.raises(ValueError, match=r"it is a share, from 0 to 1"):
        OneStep(pure_noise_share=-0.1)
