"""Diffusion against closed forms: Gaussian actions have an exact denoiser, loss floors and deterministic chains."""

import itertools
import math

import pytest
import torch

from vlatune.policy.objectives.diffusion import Diffusion
from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.objectives.objective import Draw

MEAN, STD = 0.4, 0.3


def signal_powers(num_steps):
    """The schedule by its definition, the product of 1 - beta."""
    power, powers = 1.0, []
    cosine = [math.cos((i / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num_steps + 1)]
    for before, after in itertools.pairwise(cosine):
        power *= 1 - min(1 - after / before, 0.999)
        powers.append(power)
    return torch.tensor(powers, dtype=torch.float64)


class GaussianExpert:
    """The exact expectation, per entry, of what is to be predicted, for actions ~ N(MEAN, STD²)."""

    def __init__(self, prediction, num_train_steps=1000):
        self.prediction = prediction
        self.power = signal_powers(num_train_steps)
        self.levels = []

    def __call__(self, x_BHA, noise_level_B):
        self.levels.append(noise_level_B[0].item())
        power = self.power[torch.round(noise_level_B.double() * len(self.power)).long()][:, None, None]
        signal, noise_rate = power.sqrt(), (1 - power).sqrt()
        centred = (x_BHA - signal * MEAN) / (power * STD**2 + 1 - power)
        action = MEAN + signal * STD**2 * centred
        noise = noise_rate * centred
        return {"sample": action, "epsilon": noise, "v": signal * noise - noise_rate * action}[self.prediction].float()

    def fan_out(self, num_candidates):
        return self


def keys(batch, step=0, seed=0):
    return DrawKeys(seed=seed, step=step, sample_index_B=torch.arange(batch))


def valid_like(actions):
    return torch.ones_like(actions, dtype=torch.bool)


@pytest.mark.parametrize(("num_steps", "first", "last"), [(1000, 0.9999587, 2.4287e-9), (100, 0.9993687, 2.4285e-7)])
def test_the_rates_are_those_of_the_schedule(num_steps, first, last):
    level_B = torch.arange(num_steps) / num_steps
    signal, noise_rate = Diffusion(num_train_steps=num_steps).rates(level_B)
    power = signal_powers(num_steps)
    assert torch.allclose(signal.flatten().double(), power.sqrt(), rtol=1e-6)
    assert torch.allclose(noise_rate.flatten().double(), (1 - power).sqrt(), rtol=1e-6)
    assert power[0].item() == pytest.approx(first, abs=1e-7)
    assert power[-1].item() == pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v"])
def test_the_exact_denoiser_reaches_the_loss_floor(prediction):
    power = signal_powers(1000)
    action_variance = (1 - power) * STD**2 / (power * STD**2 + 1 - power)
    floors = {
        "sample": action_variance,
        "epsilon": action_variance * power / (1 - power),
        "v": action_variance / (1 - power),
    }
    objective = Diffusion(prediction=prediction, clip=9.0)
    actions = MEAN + STD * torch.randn(4000, 10, 7, generator=torch.Generator().manual_seed(0))
    draw = objective.draw(actions, keys(len(actions)))
    loss = objective.loss(GaussianExpert(prediction), actions, valid_like(actions), draw)
    assert loss.entries_BHA.mean().item() == pytest.approx(floors[prediction].mean().item(), rel=0.03)


def test_ddim_follows_its_chain():
    power = torch.cat([signal_powers(1000)[[999, 799, 599, 399, 199]], torch.ones(1, dtype=torch.float64)])
    signal, noise_rate = power.sqrt(), (1 - power).sqrt()
    shrunk = (signal[1:] * signal[:-1] * STD**2 + noise_rate[1:] * noise_rate[:-1]) / (
        power[:-1] * STD**2 + 1 - power[:-1]
    )
    noise = torch.tensor([-1.0, 0.0, 1.0])[:, None, None]
    expert = GaussianExpert("sample")
    samples = Diffusion(sampler="ddim").sample(expert, noise)
    assert expert.levels == pytest.approx([0.999, 0.799, 0.599, 0.399, 0.199])
    start = noise - signal[0] * MEAN
    assert torch.allclose(samples, (MEAN + shrunk.prod() * start).float(), atol=1e-4)


@pytest.mark.parametrize("sampler", ["dpm_solver", "ddim"])
def test_more_steps_come_closer_to_the_spread_of_the_actions(sampler):
    spreads = {}
    for num_steps in (1, 2, 5, 50):
        objective = Diffusion(sampler=sampler, num_sampling_steps=num_steps)
        low, high = objective.sample(GaussianExpert("sample"), torch.tensor([-1.0, 1.0])[:, None, None]).flatten()
        spreads[num_steps] = (high - low).item() / 2
    assert spreads[1] == pytest.approx(0, abs=1e-4)  # one call sees nothing but noise: the mean
    assert spreads[1] < spreads[2] < spreads[5] < spreads[50]
    assert spreads[50] == pytest.approx(STD, rel=0.05)


def test_the_solver_calls_the_expert_at_rdts_levels():
    expert = GaussianExpert("sample")
    Diffusion().sample(expert, torch.zeros(2, 1, 1))
    assert [round(1000 * level) for level in expert.levels] == [999, 799, 599, 400, 200]
    assert expert.levels == pytest.approx([0.999, 0.799, 0.599, 0.4, 0.2])


@pytest.mark.parametrize("sampler", ["dpm_solver", "ddim"])
def test_all_predictions_sample_alike(sampler):
    noise = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    samples = {
        prediction: Diffusion(prediction=prediction, sampler=sampler, clip=9.0).sample(
            GaussianExpert(prediction), noise
        )
        for prediction in ("sample", "epsilon", "v")
    }
    assert torch.allclose(samples["v"], samples["sample"], atol=1e-4)
    assert torch.allclose(samples["epsilon"], samples["sample"], atol=1e-2)  # its first step divides by 5e-5
    assert samples["sample"].std() > 0.1


@pytest.mark.parametrize("sampler", ["dpm_solver", "ddim"])
def test_sampling_waits_for_no_device(sampler):
    objective = Diffusion(prediction="v", sampler=sampler, clip=2.0)
    noise = torch.empty(2, 3, 4, device="meta")  # reading a number from it would raise
    assert objective.sample(lambda x_BHA, noise_level_B: x_BHA, noise).shape == (2, 3, 4)
    objective.loss(
        lambda x_BHA, noise_level_B: x_BHA, noise, noise > 0, Draw(noise_BHA=noise, noise_level_B=noise[:, 0, 0])
    )


def test_a_bound_holds_the_actions():
    noise = 4 * torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    free = Diffusion().sample(GaussianExpert("sample"), noise)
    bound = Diffusion(clip=0.5).sample(GaussianExpert("sample"), noise)
    assert free.abs().max() > 1
    assert bound.abs().max() <= 0.5


@pytest.mark.parametrize("num_train_steps", [3, 1000])
def test_drawn_levels_are_whole_steps(num_train_steps):
    objective = Diffusion(num_train_steps=num_train_steps, num_sampling_steps=1)
    level_B = objective.draw(torch.zeros(20_000, 1, 1), keys(20_000)).noise_level_B
    steps = level_B * num_train_steps
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert steps.round().long().unique().tolist() == list(range(num_train_steps))
    assert level_B.mean().item() == pytest.approx(0.5 - 0.5 / num_train_steps, abs=0.01)


def test_several_draws_are_several_rows_and_padding_weighs_nothing():
    objective = Diffusion(num_draws=3)
    actions = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    valid = valid_like(actions)
    valid[1, 2:] = False
    draw = objective.draw(actions, keys(2))
    loss = objective.loss(GaussianExpert("sample"), actions, valid, draw)
    assert torch.equal(loss.weight_BHA, valid.repeat_interleave(3, dim=0).float())
    third = Draw(noise_BHA=draw.noise_BHA[[2, 5]], noise_level_B=draw.noise_level_B[[2, 5]])
    alone = objective.loss(GaussianExpert("sample"), actions, valid, third)
    assert torch.allclose(loss.entries_BHA[[2, 5]], alone.entries_BHA)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="must be at least 1"):
        Diffusion(num_sampling_steps=0)
    with pytest.raises(ValueError, match=r"must be below objective.num_train_steps, 4"):
        Diffusion(num_train_steps=4)
    with pytest.raises(ValueError, match="needs a divisor"):
        Diffusion(sampler="ddim", num_sampling_steps=7)
    with pytest.raises(ValueError, match=r"set objective\.clip"):
        Diffusion(prediction="epsilon")


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v"])
def test_there_and_back_between_what_is_predicted_the_action_and_the_noise(prediction):
    """In float64, at every level from nearly clean to nearly pure noise."""
    objective = Diffusion(prediction=prediction, clip=1e6)
    level_B = (torch.arange(0, 1000, 37, dtype=torch.float64)) / 1000
    generator = torch.Generator().manual_seed(0)
    actions, noise = (torch.randn(len(level_B), 4, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    signal, noise_rate = objective.rates(level_B)
    x = signal * actions + noise_rate * noise
    clean = objective.clean(x, objective.target(actions, noise, level_B), level_B)
    assert torch.allclose(clean, actions, atol=1e-10, rtol=0)
    assert torch.allclose((x - signal * clean) / noise_rate, noise, atol=1e-7, rtol=0)

    # The straight path's velocity, in whose terms flow speaks of the same two.
    level = level_B[:, None, None]
    mixed, velocity = (1 - level) * actions + level * noise, noise - actions
    assert torch.allclose(mixed - level * velocity, actions, atol=1e-12, rtol=0)
    assert torch.allclose(mixed + (1 - level) * velocity, noise, atol=1e-12, rtol=0)
