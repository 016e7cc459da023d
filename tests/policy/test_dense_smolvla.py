"""The dense SmolVLA that tests/bench compares with is SmolVLA: the policy's values and gradients, whatever is computed again."""

import dataclasses

import pytest
import torch
from dense_pi import called, checkpointed
from dense_smolvla import dense_smolvla_forward
from preset_policies import make_batch, make_policy


def output_and_gradients(policy, forward):
    policy.zero_grad()
    output = forward()
    output.square().mean().backward()
    return output.detach(), {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("run", [called, checkpointed])
def test_dense_smolvla_is_the_policy(run):
    policy = make_policy("smolvla")
    observation = make_batch(policy.config).observation  # a masked camera, prompts of different lengths
    x_BHA = torch.randn(3, *policy.noise_shape, generator=torch.Generator().manual_seed(0))
    level_B = torch.tensor([0.1, 0.5, 1.0])
    ours, gradients = output_and_gradients(policy, lambda: policy.bind(observation)(x_BHA, level_B))
    dense, expected = output_and_gradients(
        policy, lambda: dense_smolvla_forward(policy, observation, x_BHA, level_B, run)
    )
    assert torch.allclose(ours, dense, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], atol=1e-5 * max(1, gradient.abs().max())), name


def test_nested_checkpoints_compute_the_trunk_three_times():
    """And the towers twice, as the benchmark says of them."""
    policy = make_policy("smolvla")
    observation = make_batch(policy.config).observation
    counts = {"trunk": 0, "vision": 0}
    layer, tower = policy.backbone.language_model.layers[1].mlp, policy.backbone.vision_tower
    for name, module in (("trunk", layer), ("vision", tower)):
        module.register_forward_pre_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    x_BHA = torch.randn(3, *policy.noise_shape)
    dense_smolvla_forward(policy, observation, x_BHA, torch.full((3,), 0.5), checkpointed).sum().backward()
    assert counts == {"trunk": 3, "vision": 2 * len(observation.images)}


def test_the_dense_forward_is_no_copy():
    """With the camera unmasked the two must part: the mask is what both read."""
    policy = make_policy("smolvla")
    observation = make_batch(policy.config).observation
    everything = {camera: torch.ones_like(mask) for camera, mask in observation.image_mask.items()}
    seen = dataclasses.replace(observation, image_mask=everything)
    x_BHA, level_B = torch.zeros(3, *policy.noise_shape), torch.full((3,), 0.5)
    ours = policy.bind(observation)(x_BHA, level_B)
    other = dense_smolvla_forward(policy, seen, x_BHA, level_B)
    assert torch.allclose(ours[:2], other[:2], atol=1e-5)
    assert (ours[2] - other[2]).abs().max() > 1e-3
