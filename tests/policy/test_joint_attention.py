"""A prefix encoded once and an expert over its keys and values equal one joint attention over all tokens, written densely in
tests/support/dense_pi.py. π0 and π0.5, values and gradients."""

import dataclasses

import pytest
import torch
from dense_pi import dense_joint_forward
from small_policies import make_batch, make_policy

from vlatune.policy.policy import Policy


def make_pi(noise_level: str, state: str) -> Policy:
    small = make_policy()
    backbone = dataclasses.replace(small.config.backbone, state="none", camera_embedding=False)
    expert = dataclasses.replace(small.config.expert, noise_level=noise_level, state=state)
    torch.manual_seed(1)
    config = dataclasses.replace(small.config, backbone=backbone, expert=expert)
    policy = Policy(config, small.embodiment, small.statistics)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return policy


@pytest.mark.parametrize(("noise_level", "state"), [("adaptive_norm", "none"), ("action_token", "token")])
def test_prefix_then_expert_equals_joint_attention(noise_level, state):
    policy = make_pi(noise_level, state)
    batch = make_batch()  # prompts of different lengths; the last sample's wrist camera is masked
    assert not all(mask.all() for mask in batch.observation.image_mask.values())
    assert not batch.observation.prompts.mask_BL.all()
    x_BHA = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))
    level_B = torch.tensor([0.1, 0.5, 1.0])
    outputs, gradients = [], []
    for forward in (
        lambda: policy.bind(batch.observation)(x_BHA, level_B),
        lambda: dense_joint_forward(policy, batch.observation, x_BHA, level_B),
    ):
        policy.zero_grad()
        output = forward()
        output.square().mean().backward()
        outputs.append(output.detach())
        gradients.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5 * max(1, gradient.abs().max())), name
    assert any("vision_tower" in name for name in gradients[0])


def test_the_dense_forward_is_no_copy():
    """With the camera unmasked the two must part: the mask is what both read."""
    policy, batch = make_pi("adaptive_norm", "none"), make_batch()
    everything = {camera: torch.ones_like(mask) for camera, mask in batch.observation.image_mask.items()}
    seen = dataclasses.replace(batch.observation, image_mask=everything)
    x_BHA, level_B = torch.zeros(3, 4, 7), torch.full((3,), 0.5)
    ours = policy.bind(batch.observation)(x_BHA, level_B)
    other = dense_joint_forward(policy, seen, x_BHA, level_B)
    assert torch.allclose(ours[:2], other[:2], atol=1e-5)
    assert (ours[2] - other[2]).abs().max() > 1e-3
