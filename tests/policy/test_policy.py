"""The whole policy: what may and what must not change its loss and its actions."""

import dataclasses

import pytest
import torch
from small_policies import make_batch, make_policy

from vlatune.data.images import ImageRule
from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.policy import Policy


def keys_of(batch, step=0):
    return DrawKeys(seed=0, step=step, sample_index_B=batch.sample_index_B)


def weighted(loss):
    return (loss.entries_BHA * loss.weight_BHA).sum() / loss.weight_BHA.sum()


def test_every_trained_parameter_gets_a_gradient():
    policy, batch = make_policy(), make_batch()
    weighted(policy(batch, keys_of(batch))).backward()
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_what_is_masked_changes_neither_loss_nor_gradient():
    policy, batch = make_policy(), make_batch()
    observation = batch.observation
    other = dataclasses.replace(
        batch,
        observation=dataclasses.replace(
            observation,
            images={
                camera: torch.where(observation.image_mask[camera][..., None, None, None], image, 255 - image)
                for camera, image in observation.images.items()
            },
            prompts=dataclasses.replace(
                observation.prompts,
                ids_BL=torch.where(observation.prompts.mask_BL, observation.prompts.ids_BL, 7),
            ),
        ),
    )
    losses, gradients = [], []
    for version in (batch, other):
        policy.zero_grad()
        loss = weighted(policy(version, keys_of(batch)))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


def test_the_loss_sees_images_language_state_and_actions():
    policy, batch = make_policy(), make_batch()
    observation = batch.observation
    reference = weighted(policy(batch, keys_of(batch))).item()
    changed = {
        "images": dataclasses.replace(
            observation, images={camera: 255 - image for camera, image in observation.images.items()}
        ),
        "language": dataclasses.replace(
            observation, prompts=dataclasses.replace(observation.prompts, ids_BL=31 - observation.prompts.ids_BL)
        ),
        "state": dataclasses.replace(observation, state_BTS=-observation.state_BTS),
    }
    for name, version in changed.items():
        loss = weighted(policy(dataclasses.replace(batch, observation=version), keys_of(batch))).item()
        assert abs(loss - reference) > 1e-5, name


def test_draws_per_prefix_are_the_mean_of_single_draws():
    policy, batch = make_policy(), make_batch()
    objective = policy.config.objective
    actions = policy.action_normaliser(batch.actions_BHA)
    draw = objective.draw(actions, keys_of(batch))
    together = policy(batch, keys_of(batch), draw).entries_BHA
    for k in range(objective.num_draws):
        rows = slice(k, None, objective.num_draws)
        single = dataclasses.replace(draw, noise_BHA=draw.noise_BHA[rows], noise_level_B=draw.noise_level_B[rows])
        assert torch.allclose(policy(batch, keys_of(batch), single).entries_BHA, together[rows], atol=1e-5)


def test_samples_are_in_raw_units_and_depend_on_the_noise_alone():
    policy, batch = make_policy(), make_batch()
    noise = torch.randn(3, *policy.action_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = policy.sample(batch.observation, noise), policy.sample(batch.observation, noise)
        other = policy.sample(batch.observation, noise + 1)
        normalised = policy.config.objective.sample(policy.bind(batch.observation), noise)
    assert first.shape == (3, 4, 7)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.allclose(policy.action_normaliser(first), normalised, atol=1e-5)


def test_an_absent_camera_is_not_computed_and_equals_a_masked_one():
    policy, batch = make_policy(), make_batch()
    observation = batch.observation
    absent = dataclasses.replace(
        observation,
        images={"agentview": observation.images["agentview"]},
        image_mask={"agentview": observation.image_mask["agentview"]},
    )
    masked = dataclasses.replace(
        observation, image_mask={**observation.image_mask, "eye_in_hand": torch.zeros(3, 1, dtype=torch.bool)}
    )
    noise = torch.randn(3, *policy.action_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(policy.sample(absent, noise), policy.sample(masked, noise), atol=1e-5)


def test_images_of_another_size_than_the_tower_reads_are_refused():
    policy = make_policy()
    embodiment = dataclasses.replace(policy.embodiment, image_rule=ImageRule(size_px=32))
    with pytest.raises(ValueError, match="prepare with --image-px 16"):
        Policy(policy.config, embodiment, policy.statistics)


def test_an_expert_that_cannot_read_the_backbones_cache_is_refused():
    policy = make_policy()
    gemma = dataclasses.replace(policy.config.expert.gemma, depth=3)
    config = dataclasses.replace(policy.config, expert=dataclasses.replace(policy.config.expert, gemma=gemma))
    with pytest.raises(ValueError, match=r"writes keys and values .* \(2, 1, 8\), the expert reads \(3, 1, 8\)"):
        Policy(config, policy.embodiment, policy.statistics)


def test_observations_that_the_backbone_would_ignore_are_refused():
    with pytest.raises(ValueError, match=r"observation_offsets is \(-1, 0\), and the backbone 'paligemma' reads 1"):
        dataclasses.replace(make_policy().config, observation_offsets=(-1, 0))
