"""Shortcuts against exact average velocities: of the true flow, and of M Euler steps, which is what can be learned.

What it shares with flow is tested in test_flow.py."""

from dataclasses import replace

import pytest
import torch
from toy_problems import ClosedFormExpert, Gaussian, LearningExpert, seeded_normal, trained

from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.objectives.objective import Draw
from vlatune.policy.objectives.shortcut import Shortcut

G = Gaussian()


def keys(batch):
    return DrawKeys(seed=0, step=0, sample_index_B=torch.arange(batch))


def exact(x, level, length):
    return G.average_velocity(x, level, level - length)


def chained(num_base_steps):
    """The average velocity of Euler steps of 1/num_base_steps along the exact field; of all rows' own number of them."""

    def average_velocity(x, level, length):
        end = x
        for step in range(num_base_steps):
            here = level - step / num_base_steps
            moved = end - G.velocity(end, here) / num_base_steps
            end = torch.where(step < torch.round(length * num_base_steps), moved, end)
        return (x - end) / length

    return average_velocity


def loss_of(objective, expert, actions, draw):
    return objective.loss(expert, actions, torch.ones_like(actions, dtype=torch.bool), draw)


def is_longer(objective, draw):
    return draw.second_level_B > 1 / objective.num_base_steps


@pytest.mark.parametrize("num_draws", [1, 4])
@pytest.mark.parametrize("function", [exact, chained(16)], ids=["the flow's", "16 Euler steps"])
def test_exact_average_velocities_leave_no_error_on_longer_steps(function, num_draws):
    objective = Shortcut(num_base_steps=16, bootstrap_share=0.5, num_draws=num_draws)
    actions = G.actions(600, 2, 3, dtype=torch.float64)
    draw = objective.draw(actions, keys(600))
    loss = loss_of(objective, ClosedFormExpert(function), actions, draw)
    longer = loss.entries_BHA[is_longer(objective, draw)]
    assert longer.max() < 1e-20
    assert loss.metrics["bootstrap_loss"] < 1e-20
    wrong = loss_of(objective, ClosedFormExpert(lambda x, level, length: function(x, level, length**2)), actions, draw)
    assert wrong.entries_BHA[is_longer(objective, draw)].mean() > 1e-3
    assert wrong.metrics["bootstrap_loss"] > 1e-4


def test_the_shortest_step_is_flow_and_reaches_its_floor_without_a_gradient():
    objective = Shortcut(num_base_steps=16, bootstrap_share=0.25, num_draws=4)
    actions = G.actions(20_000, 4, 1)
    draw = objective.draw(actions, keys(20_000))
    shift = torch.zeros((), requires_grad=True)
    entries = loss_of(objective, ClosedFormExpert(chained(16), shift), actions, draw).entries_BHA
    shortest = ~is_longer(objective, draw)
    floor = G.velocity_variance(torch.arange(1, 17) / 16).mean().item()
    assert entries[shortest].mean().item() == pytest.approx(floor, rel=0.01)
    entries.mean().backward()
    assert abs(shift.grad.item()) < 0.01


@pytest.mark.parametrize(
    ("function", "std"), [(exact, G.std), (chained(32), G.euler_std(32))], ids=["flow", "32 Euler steps"]
)
def test_any_number_of_steps_ends_at_the_same_actions(function, std):
    noise = seeded_normal(5, 2, 3, dtype=torch.float64)
    for exponent in range(6):
        expert = ClosedFormExpert(function)
        samples = Shortcut(num_base_steps=32, num_sampling_steps=2**exponent).sample(expert, noise)
        assert torch.allclose(samples, G.mean + std * noise, rtol=0, atol=1e-12)
        assert expert.levels == [1 - step / 2**exponent for step in range(2**exponent)]


@pytest.mark.parametrize("num_draws", [1, 3, 8])
@pytest.mark.parametrize("num_base_steps", [2, 32, 128])
def test_drawn_steps_lie_on_the_dyadic_grid(num_base_steps, num_draws):
    objective = Shortcut(num_base_steps=num_base_steps, bootstrap_share=0.25, num_draws=num_draws)
    draw = objective.draw(torch.zeros(24_000 // num_draws, 1, 1), keys(24_000 // num_draws))
    level_B, length_B = draw.noise_level_B, draw.second_level_B
    longer = is_longer(objective, draw)
    assert longer.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal((level_B / length_B).round() * length_B, level_B)
    assert (level_B >= length_B).all()
    assert (level_B <= 1).all()
    lengths = sorted(2.0**-j for j in range(num_base_steps.bit_length() - 1))
    assert length_B[longer].unique().tolist() == lengths
    for length in lengths:
        of_length = length_B == length
        assert (of_length.sum() / longer.sum()).item() == pytest.approx(1 / len(lengths), abs=0.02)
        assert level_B[of_length].mean().item() == pytest.approx((1 + length) / 2, abs=0.05)
        if length >= 1 / 8:
            assert len(level_B[of_length].unique()) == 1 / length
    assert len(level_B[~longer].unique()) == num_base_steps
    assert level_B[~longer].mean().item() == pytest.approx(0.5 + 0.5 / num_base_steps, abs=0.01)


@pytest.mark.parametrize(("num_draws", "share", "halves"), [(1, 0.125, 1), (8, 0.125, 1), (8, 0.2, 2), (4, 0.5, 2)])
def test_the_half_steps_run_on_the_draws_that_can_use_them_alone(num_draws, share, halves):
    objective = Shortcut(bootstrap_share=share, num_draws=num_draws)
    actions = torch.zeros(5, 2, 1)
    expert = ClosedFormExpert(lambda x, level, length: x)
    draw = objective.draw(actions, keys(5))
    loss_of(objective, expert, actions, draw)
    assert expert.num_rows == [5 * halves, 5 * halves, 5 * num_draws]
    assert not is_longer(objective, draw).view(5, num_draws)[:, halves:].any()
    if num_draws * share == halves:
        assert is_longer(objective, draw).view(5, num_draws)[:, :halves].all()


def draw_of(x, level, length):
    """A recorded draw of one row that stands at x, with actions of zero."""
    return Draw(
        noise_BHA=torch.full((1, 1, 1), x / level),
        noise_level_B=torch.tensor([level]),
        second_level_B=torch.tensor([length]),
    )


def test_a_target_is_the_mean_of_two_half_steps_and_gets_no_gradient():
    """By hand: u = w x length, x = 2, from level 1 over a step of 1/2, w = 3."""
    weight = torch.tensor(3.0, requires_grad=True)
    expert = ClosedFormExpert(lambda x, level, length: weight * x * length)
    loss = loss_of(Shortcut(), expert, torch.zeros(1, 1, 1), draw_of(2.0, 1.0, 0.5)).entries_BHA.sum()
    first = 3 * 2 * 0.25
    second = 3 * (2 - 0.25 * first) * 0.25
    error = 3 * 2 * 0.5 - (first + second) / 2
    assert loss.item() == pytest.approx(error**2)
    loss.backward()
    assert weight.grad.item() == pytest.approx(2 * error * 2 * 0.5)  # of the answer alone
    assert expert.levels == [1.0, 0.75, 1.0]


def test_a_bound_holds_the_half_way_point_and_the_target():
    seen = []

    def big(x, level, length):
        seen.append(x.item())
        return torch.full_like(x, -10.0)

    loss = loss_of(Shortcut(clip=4.0), ClosedFormExpert(big), torch.zeros(1, 1, 1), draw_of(3.0, 1.0, 0.5))
    assert seen == [3.0, 4.0, 3.0]
    assert loss.entries_BHA.item() == (-10 + 4) ** 2


def test_learns_the_spread_of_its_base_steps_in_one_step():
    def task(step):
        condition_BC = 2 * torch.rand(128, 1, generator=torch.Generator().manual_seed(10_000 + step)) - 1
        return condition_BC, condition_BC[..., None] + 0.3 * seeded_normal(128, 1, 1, seed=step)

    objective = Shortcut(num_base_steps=8, bootstrap_share=0.25, num_draws=4)
    torch.manual_seed(0)
    expert = trained(objective, task, LearningExpert(condition_dim=1, second_level=True), num_steps=800)
    means = torch.linspace(-0.9, 0.9, 7)
    for num_steps in (1, 8):
        sampler = replace(objective, num_sampling_steps=num_steps)
        with torch.no_grad():
            bound = expert.bind(means.repeat_interleave(400)[:, None])
            samples = sampler.sample(bound, seeded_normal(2800, 1, 1, seed=9)).view(7, 400)
        assert (samples.mean(dim=1) - means).abs().max() < 0.08
        # Flow gives 0 in one step, 0.235 in eight.
        assert samples.std(dim=1).mean().item() == pytest.approx(G.euler_std(8), abs=0.04)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"num_draws is 0; it must be at least 1"):
        Shortcut(num_draws=0)
    for number in (1, 100):
        with pytest.raises(ValueError, match=rf"num_base_steps is {number}; .* must be a power of two"):
            Shortcut(num_base_steps=number)
    for number in (0, 10, 256):
        with pytest.raises(ValueError, match=rf"num_sampling_steps is {number}; .* a power of two up to .*, 128"):
            Shortcut(num_sampling_steps=number)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            Shortcut(bootstrap_share=share)
    actions = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match=r"make it with Shortcut\.draw"):
        loss_of(Shortcut(), ClosedFormExpert(exact), actions, Draw(noise_BHA=actions, noise_level_B=torch.ones(1)))
