"""Flow matching against closed forms: Gaussian actions have an exact velocity, loss floor and Euler chain."""

import math

import pytest
import torch

from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.objectives.flow import Flow

MEAN, STD = 0.4, 0.3


class GaussianExpert:
    """The exact marginal velocity for actions ~ N(MEAN, STD²), per entry."""

    def __call__(self, x_BHA, noise_level_B):
        level = noise_level_B[:, None, None]
        variance = (1 - level) ** 2 * STD**2 + level**2
        slope = (level - (1 - level) * STD**2) / variance
        return -MEAN + slope * (x_BHA - (1 - level) * MEAN)

    def fan_out(self, num_candidates):
        return self


def keys(batch, step=0, seed=0):
    return DrawKeys(seed=seed, step=step, sample_index_B=torch.arange(batch))


@pytest.mark.parametrize(("noise_levels", "floor"), [("uniform", math.pi * STD / 2), ("pi0", 0.3501)])
def test_the_exact_velocity_reaches_the_loss_floor(noise_levels, floor):
    objective = Flow(noise_levels=noise_levels)
    actions = MEAN + STD * torch.randn(4000, 10, 7, generator=torch.Generator().manual_seed(0))
    draw = objective.draw(actions, keys(len(actions)))
    loss = objective.loss(GaussianExpert(), actions, torch.ones_like(actions, dtype=torch.bool), draw)
    assert loss.entries_BHA.mean().item() == pytest.approx(floor, rel=0.02)


@pytest.mark.parametrize(("num_steps", "std"), [(1, 0.0), (2, 0.08257), (10, 0.24687)])
def test_euler_steps_give_the_known_spread(num_steps, std):
    noise = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)[:, None, None]
    samples = Flow(num_sampling_steps=num_steps).sample(GaussianExpert(), noise)
    assert torch.allclose(samples, MEAN + std * noise, atol=1e-5)


def test_draws_depend_on_step_and_sample_but_not_on_the_rank_that_makes_them():
    objective = Flow(num_draws=3)
    actions = torch.zeros(8, 4, 7)
    whole = objective.draw(actions, keys(8, step=5))
    half = objective.draw(actions[:4], DrawKeys(seed=0, step=5, sample_index_B=torch.arange(4, 8)))
    assert torch.equal(whole.noise_BHA[12:], half.noise_BHA)
    assert torch.equal(whole.noise_level_B[12:], half.noise_level_B)
    for other in (keys(8, step=6), keys(8, step=5, seed=1)):
        assert not torch.equal(whole.noise_BHA, objective.draw(actions, other).noise_BHA)
    assert len(whole.noise_BHA.unique()) == whole.noise_BHA.numel()


def test_noise_levels_follow_their_law():
    actions = torch.zeros(20_000, 1, 1)
    uniform = Flow(noise_levels="uniform").draw(actions, keys(20_000)).noise_level_B
    pi0 = Flow(noise_levels="pi0").draw(actions, keys(20_000)).noise_level_B
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert pi0.mean().item() == pytest.approx(0.6004, abs=0.01)
    assert (pi0 > 0.9).float().mean().item() == pytest.approx(0.1463, abs=0.01)
    assert pi0.min() >= 0.001
    assert pi0.max() <= 1


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="must be at least 1"):
        Flow(num_sampling_steps=0)
