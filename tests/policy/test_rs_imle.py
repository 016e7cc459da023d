"""RS-IMLE: which candidate is trained, with which gradient, at what cost; both modes; every preset under it."""

import dataclasses
import math

import pytest
import torch
from preset_policies import embodiment_for, make_batch, make_policy, statistics
from torch.utils._python_dispatch import TorchDispatchMode
from toy_problems import ClosedFormExpert, LearningExpert, TwoModes, seeded_normal, trained

from vlatune.data.normalise import Statistics
from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.objectives.objective import Draw
from vlatune.policy.objectives.regression import Regression
from vlatune.policy.objectives.rs_imle import RSIMLE
from vlatune.policy.policy import Policy
from vlatune.policy.presets import PRESETS


def keys(indices, step=0, seed=0):
    return DrawKeys(seed=seed, step=step, sample_index_B=torch.as_tensor(indices))


def all_of(actions):
    return torch.ones_like(actions, dtype=torch.bool)


def recorded(noise_BHA):
    return Draw(noise_BHA=noise_BHA, noise_level_B=torch.ones(len(noise_BHA), dtype=noise_BHA.dtype))


def mean_of(loss):
    """The trainer's."""
    return (loss.entries_BHA * loss.weight_BHA).sum() / loss.weight_BHA.sum().clamp(min=1)


def table(*distances, **settings):
    """Loss and gradient of a constant shift for samples whose candidates are at given distances from their action, 0."""
    rows = torch.tensor(distances)
    shift = torch.zeros((), requires_grad=True)
    seen = []
    expert = ClosedFormExpert(lambda x, level: seen.append(x.detach().clone()) or x, shift=shift)
    actions = torch.zeros(len(rows), 1, 1)
    loss = RSIMLE(num_candidates=rows.shape[1], **settings).loss(
        expert, actions, all_of(actions), recorded(rows.reshape(-1, 1, 1))
    )
    value = mean_of(loss)
    value.backward()
    return value, shift.grad, seen[1].flatten().tolist(), {key: metric.item() for key, metric in loss.metrics.items()}


def test_the_nearest_candidate_beyond_the_radius_is_trained():
    loss, gradient, winners, metrics = table([0.01, 0.05, 0.2], rejection_rms=0.03)
    assert loss.item() == pytest.approx(0.05)
    assert gradient.item() == pytest.approx(1.0)
    assert winners == pytest.approx([0.05])
    assert metrics == pytest.approx({"rejection_rate": 1 / 3, "all_rejected_rate": 0.0, "mean_nearest_distance": 0.01})


def test_a_sample_whose_candidates_are_all_near_gives_zero_through_a_live_graph():
    loss, gradient, _, metrics = table([0.01, 0.02, 0.029], rejection_rms=0.03)
    assert loss.item() == 0
    assert loss.grad_fn is not None
    assert gradient.item() == 0
    assert metrics == pytest.approx({"rejection_rate": 1.0, "all_rejected_rate": 1.0, "mean_nearest_distance": 0.01})


def test_the_mean_is_over_samples_that_keep_a_candidate():
    loss, gradient, winners, metrics = table(
        [0.01, 0.05, 0.2], [0.01, 0.02, 0.029], [0.9, 0.7, 0.8], rejection_rms=0.03
    )
    assert loss.item() == pytest.approx((0.05 + 0.7) / 2)
    assert gradient.item() == pytest.approx(1.0)
    assert winners[::2] == pytest.approx([0.05, 0.7])  # the farthest of all is no special case
    assert metrics == pytest.approx(
        {"rejection_rate": 4 / 9, "all_rejected_rate": 1 / 3, "mean_nearest_distance": (0.01 + 0.01 + 0.7) / 3}
    )


@pytest.mark.parametrize("distance", ["l2", "squared"])
def test_an_exact_hit_makes_no_nan(distance):
    loss, gradient, _, _ = table([0.0, 0.0], rejection_rms=0.0, distance=distance)
    assert loss.item() == gradient.item() == 0
    loss, gradient, winners, _ = table([0.0, 0.5], rejection_rms=0.0, distance=distance)
    assert winners == [0.5]
    assert loss.item() == pytest.approx({"l2": 0.5, "squared": 0.25}[distance])


def test_one_candidate_is_enough():
    loss, _, winners, _ = table([0.4], [0.5])
    assert (loss.item(), winners) == (pytest.approx(0.45), pytest.approx([0.4, 0.5]))


def test_the_radius_is_that_of_the_paper_whatever_the_size_of_the_chunk():
    """0.03 at 16 steps of 2 numbers; a padded chunk's radius counts the steps it has."""
    radius = RSIMLE().rejection_rms
    assert radius * math.sqrt(32) == pytest.approx(0.03, rel=1e-3)
    expert = ClosedFormExpert(lambda x, level: x)
    for num_valid in (1, 8, 16):
        valid = (torch.arange(16) < num_valid)[None, :, None].expand(1, 16, 2)
        for factor, rate in ((0.99, 1.0), (1.01, 0.0)):
            noise = torch.where(valid, factor * radius, 9.0)
            loss = RSIMLE(num_candidates=1).loss(expert, torch.zeros(1, 16, 2), valid, recorded(noise))
            assert loss.metrics["rejection_rate"].item() == rate


def naive(objective, expert, condition, actions, valid, noise_BKHA):
    """All graphs kept: the mean over samples of the least distance beyond the radius."""
    kept = []
    for b in range(len(actions)):
        distances = []
        for k in range(noise_BKHA.shape[1]):
            noise_1HA = noise_BKHA[b, k][None]
            chunk_HA = expert.bind(condition[b : b + 1])(noise_1HA, torch.ones(1))[0]
            if objective.output == "aligned":
                chunk_HA = noise_1HA[0] - chunk_HA
            error = (chunk_HA - actions[b])[valid[b]]
            distance = error.norm() if objective.distance == "l2" else error.square().mean()
            if error.square().mean().sqrt() > objective.rejection_rms:
                distances.append(distance)
        if distances:
            kept.append(torch.stack(distances).min())
    return torch.stack(kept).mean(), len(kept)


def problem(dtype=torch.float64, output="action"):
    """An expert, six conditions and actions, five noises for each, and what is valid."""
    torch.manual_seed(0)
    expert = LearningExpert(horizon=4, action_dim=3, condition_dim=2, width=16).to(dtype)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.mul_(3)  # from scratch its answers hardly differ
    condition = seeded_normal(6, 2, dtype=dtype)
    noise_BKHA = seeded_normal(6, 5, 4, 3, seed=1, dtype=dtype)
    valid = torch.ones(6, 4, 3, dtype=torch.bool)
    valid[2, 1:], valid[4, 2:], valid[..., 2] = False, False, False
    actions = 0.5 * seeded_normal(6, 4, 3, seed=2, dtype=dtype)
    # The first sample's candidates are all but one, and the demonstration is there.
    noise_BKHA[0] = noise_BKHA[0, :1] + 1e-3 * noise_BKHA[0]
    with torch.no_grad():
        answer_1HA = expert.bind(condition[:1])(noise_BKHA[0, :1], torch.ones(1))
    actions[0] = noise_BKHA[0, 0] - answer_1HA[0] if output == "aligned" else answer_1HA[0]
    return expert, condition, actions, valid, noise_BKHA


@pytest.mark.parametrize("distance", ["l2", "squared"])
@pytest.mark.parametrize("output", ["action", "aligned"])
def test_loss_and_gradient_are_those_of_all_graphs_kept(output, distance):
    expert, condition, actions, valid, noise_BKHA = problem(output=output)
    drawn = recorded(noise_BKHA.flatten(0, 1))
    free = RSIMLE(num_candidates=5, rejection_rms=0, output=output).loss(expert.bind(condition), actions, valid, drawn)
    radius = 1.2 * free.metrics["mean_nearest_distance"].item()
    objective = RSIMLE(num_candidates=5, rejection_rms=radius, output=output, distance=distance)
    loss = objective.loss(expert.bind(condition), actions, valid, drawn)
    assert loss.metrics["all_rejected_rate"].item() == pytest.approx(1 / 6)
    assert loss.metrics["rejection_rate"] > 1 / 6  # others lose some of theirs
    value = mean_of(loss)
    value.backward()
    gradients = [parameter.grad.clone() for parameter in expert.parameters()]
    expert.zero_grad()
    expected, num_kept = naive(objective, expert, condition, actions, valid, noise_BKHA)
    expected.backward()
    assert loss.weight_BHA.sum().item() == pytest.approx(num_kept)  # a sample counts once, however short
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, parameter in zip(gradients, expert.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("distance", ["l2", "squared"])
def test_padded_steps_and_unused_dimensions_change_neither_winner_nor_loss_nor_gradient(distance):
    expert, condition, actions, valid, noise_BKHA = problem(torch.float32)
    results = []
    for version in (actions, torch.where(valid, actions, 50.0)):
        bound, seen = expert.bind(condition), []

        def recording(x, level, bound=bound, seen=seen):
            seen.append(x)
            return bound(x, level[:, 0, 0]) if len(x) == 6 else bound.fan_out(5)(x, level[:, 0, 0])

        loss = RSIMLE(num_candidates=5, rejection_rms=0.3, distance=distance).loss(
            ClosedFormExpert(recording), version, valid, recorded(noise_BKHA.flatten(0, 1))
        )
        expert.zero_grad()
        value = mean_of(loss)
        value.backward()
        gradients = [parameter.grad.clone() for parameter in expert.parameters()]
        results.append([value.detach(), seen[1], *loss.metrics.values(), *gradients])
    assert results[0][0] > 0
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_weighting_of_dimensions_afterwards_weights_their_pull():
    """As the policy weights the gripper."""
    expert, condition, actions, valid, noise_BKHA = problem()
    answers = []
    for weight in (1.0, 5.0):
        loss = RSIMLE().loss(expert.bind(condition), actions, valid, recorded(noise_BKHA.flatten(0, 1)))
        answers.append((loss.entries_BHA * loss.weight_BHA * torch.tensor([1.0, weight, 1.0])).sum((0, 1)))
    assert torch.allclose(answers[1], answers[0] * torch.tensor([1.0, 5.0, 1.0]))


@pytest.mark.parametrize("radius", [0.0, 0.5, 1e9])
def test_one_call_has_a_graph_and_the_calls_are_the_same_whatever_is_rejected(radius):
    graphs, weight = [], torch.ones((), requires_grad=True)

    def answer(x, level):
        result = weight * x
        graphs.append(result.requires_grad)
        return result

    expert = ClosedFormExpert(answer)
    objective = RSIMLE(num_candidates=7, rejection_rms=radius)
    actions = torch.zeros(3, 2, 2)
    loss = objective.loss(expert, actions, all_of(actions), objective.draw(actions, keys(range(3))))
    mean_of(loss).backward()
    assert (expert.num_rows, graphs, expert.levels) == ([21, 3], [False, True], [1.0, 1.0])
    assert weight.grad is not None
    assert (weight.grad == 0) == (radius == 1e9)
    assert not any(metric.requires_grad for metric in loss.metrics.values())


def test_gradients_arrive_under_autocast():
    """Its cache of cast weights, filled by the search, once had no graph for the call that needs one."""
    expert, condition, actions, valid, noise_BKHA = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = RSIMLE().loss(expert.bind(condition), actions, valid, recorded(noise_BKHA.flatten(0, 1)))
    mean_of(loss).backward()
    assert all(parameter.grad.any() for parameter in expert.parameters())


def test_draws_depend_on_step_and_sample_but_not_on_the_rank_that_makes_them():
    objective, actions = RSIMLE(num_candidates=3), torch.zeros(8, 4, 7)
    whole = objective.draw(actions, keys(range(8), step=5))
    assert whole.noise_BHA.shape == (24, 4, 7)
    assert torch.equal(whole.noise_level_B, torch.ones(24))
    for first, last in ((0, 4), (4, 8), (2, 3)):
        part = objective.draw(actions[first:last], keys(range(first, last), step=5))
        assert torch.equal(whole.noise_BHA[3 * first : 3 * last], part.noise_BHA)
    for other in (keys(range(8), step=6), keys(range(8), step=5, seed=1)):
        assert not torch.equal(whole.noise_BHA, objective.draw(actions, other).noise_BHA)
    assert len(whole.noise_BHA.unique()) == whole.noise_BHA.numel()


def test_both_modes_are_reached_where_regressions_answer_with_one_chunk():
    nothing = torch.zeros(64, 0)
    answers = {}
    for name, objective, num_steps in (
        ("mse", Regression(error="mse"), 150),
        ("l1", Regression(error="l1"), 150),
        ("rs_imle", RSIMLE(num_candidates=4, rejection_rms=0.03), 600),
    ):
        torch.manual_seed(0)
        expert = trained(
            objective,
            lambda step: (nothing, TwoModes().actions(64, 1, 1, seed=step)),
            LearningExpert(width=32),
            num_steps=num_steps,
        )
        with torch.no_grad():
            answers[name] = objective.sample(expert.bind(torch.zeros(2000, 0)), seeded_normal(2000, 1, 1))
    assert answers["mse"].abs().max() < 0.1
    assert answers["l1"].std() < 1e-4
    assert answers["l1"].abs().max() < 1.1
    for mode in (-1, 1):  # uncalibrated, but neither is dropped
        assert ((answers["rs_imle"] - mode).abs() < 0.15).float().mean() > 0.1


@pytest.mark.parametrize("output", ["action", "aligned"])
def test_a_conditional_task_is_learnt(output):
    def task(step):
        condition = seeded_normal(128, 2, seed=step)
        return condition, torch.stack([condition.sin(), condition.flip(1).cos()], dim=1)

    torch.manual_seed(0)
    objective = RSIMLE(num_candidates=4, output=output)
    expert = trained(objective, task, LearningExpert(horizon=2, action_dim=2, condition_dim=2), num_steps=500)
    condition, actions = task(999_999)
    with torch.no_grad():
        answer = objective.sample(expert.bind(condition), seeded_normal(128, 2, 2))
    assert (answer - actions).abs().mean() < 0.08


def test_sampling_is_one_call_at_full_noise_and_a_function_of_the_noise():
    noise = seeded_normal(4, 2, 3)
    for output, expected in (("action", 0.5 * noise), ("aligned", 0.5 * noise)):
        expert = ClosedFormExpert(lambda x, level: 0.5 * x)
        assert torch.allclose(RSIMLE(output=output).sample(expert, noise), expected)
        assert expert.levels == [1.0]
    aligned = RSIMLE(output="aligned").sample(ClosedFormExpert(lambda x, level: x - 0.25), noise)
    assert torch.allclose(aligned, torch.full_like(noise, 0.25), atol=1e-6)
    expert = LearningExpert(horizon=2, action_dim=3).bind(torch.zeros(4, 0))
    samples = [RSIMLE().sample(expert, version) for version in (noise, noise.clone(), noise + 1)]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_candidates": 0}, "objective.num_candidates is 0; it must be at least 1"),
        ({"rejection_rms": -0.1}, "objective.rejection_rms is -0.1; it must be 0 or more"),
        ({"rejection_rms": math.nan}, "objective.rejection_rms is nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RSIMLE(**settings)


class HostReads(TorchDispatchMode):
    """Operators that bring a value to the host, or whose shape depends on values."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in func.name() for name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")):
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("output", ["action", "aligned"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_and_samples(name, output):
    objective = RSIMLE(num_candidates=3, output=output)
    policy = make_policy(dataclasses.replace(PRESETS[name](tiny=True), objective=objective))
    batch = make_batch(policy.config)
    draw = objective.draw(policy.action_layout(batch.actions_BHA), keys(batch.sample_index_B))
    noise = torch.randn(3, *policy.noise_shape)
    with HostReads() as reads:
        value = mean_of(policy(batch, keys(batch.sample_index_B), draw))
        value.backward()
        sample = policy.sample(batch.observation, noise)
    assert reads.seen == []
    assert value > 0
    assert sample.shape == (3, *policy.action_shape)
    for key, parameter in policy.named_parameters():
        # A bias on keys shifts all scores alike: softmax takes it away.
        if parameter.requires_grad and not key.endswith(("k_proj.bias", "qkv.bias")):
            assert parameter.grad is not None and parameter.grad.any(), key


@pytest.mark.parametrize("name", PRESETS)
def test_a_full_size_training_step_waits_for_nothing(name):
    """RS-IMLE's and regression's. On the meta device whatever would bring a value to the host raises."""
    config = PRESETS[name]()
    with torch.device("meta"):
        policy = Policy(
            config,
            embodiment_for(config, encoder_width=40, vocab_size=1000),
            Statistics(state=statistics(8), actions=statistics(7)),
        )
    batch = make_batch(config, batch=2).to("meta")
    with torch.no_grad():  # the backbone's own step is tested with the presets
        bound = policy.bind(batch.observation)
    actions = torch.empty(2, *policy.noise_shape, device="meta")
    total = torch.zeros((), device="meta")
    for objective in (RSIMLE(), Regression(error="huber", output="aligned")):
        loss = objective.loss(bound, actions, all_of(actions), objective.draw(actions, keys([0, 1])))
        assert loss.entries_BHA.shape == loss.weight_BHA.shape == actions.shape
        assert loss.entries_BHA.dtype == torch.float32
        total = total + mean_of(loss)
        assert objective.sample(bound, actions).shape == actions.shape
    total.backward()
