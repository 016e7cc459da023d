"""Every preset: its size, what may and must not change its loss, bfloat16, and forwards that never wait for the device."""

import dataclasses

import pytest
import torch
from preset_policies import (
    ACTION_DIM,
    embodiment_for,
    make_batch,
    make_policy,
    statistics,
    with_masked_content,
)
from torch.utils._python_dispatch import TorchDispatchMode

from vlatune.data.batch import Batch
from vlatune.data.normalise import Statistics
from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.objectives.objective import Draw
from vlatune.policy.policy import Policy
from vlatune.policy.presets import PRESETS

FULL_SIZES = {"pi05": 3_353_433_872, "pi0": 3_238_048_528, "smolvla": 402_737_376}
RDT_SIZE, RDT_TENSORS = 1_228_319_872, 618


def full_policy(name: str) -> Policy:
    config = PRESETS[name]()
    embodiment = embodiment_for(config, encoder_width=4096, vocab_size=1000)
    with torch.device("meta"):
        return Policy(
            config,
            embodiment,
            Statistics(state=statistics(embodiment.state_dim), actions=statistics(ACTION_DIM)),
        )


def keys_of(batch: Batch) -> DrawKeys:
    return DrawKeys(seed=0, step=0, sample_index_B=batch.sample_index_B)


def weighted(loss):
    return (loss.entries_BHA * loss.weight_BHA).sum() / loss.weight_BHA.sum()


def sampled(policy, batch):
    noise = torch.randn(len(batch.valid_BH), *policy.noise_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.sample(batch.observation, noise)


@pytest.mark.parametrize("name", FULL_SIZES)
def test_full_sizes(name):
    assert sum(parameter.numel() for parameter in full_policy(name).parameters()) == FULL_SIZES[name]


def test_rdt_without_its_encoders():
    expert = full_policy("rdt").expert
    assert sum(parameter.numel() for parameter in expert.parameters()) == RDT_SIZE
    assert len(list(expert.parameters())) == RDT_TENSORS


def test_the_small_baseline_trains_about_four_million():
    trained = [p.numel() for p in full_policy("clip_flow").parameters() if p.requires_grad]
    assert 3.5e6 < sum(trained) < 4.5e6


@pytest.mark.parametrize("name", PRESETS)
def test_a_full_size_training_step_has_the_right_shapes_and_waits_for_nothing(name):
    """On the meta device tensors have shapes and no values: whatever would bring a value to the host raises."""
    config = PRESETS[name]()
    policy = full_policy(name)
    batch = make_batch(config, batch=2)
    prompts = batch.observation.prompts
    if config.backbone.reads_embeddings:
        prompts = dataclasses.replace(prompts, embedding_BLE=torch.zeros(2, 8, 4096))
    observation = dataclasses.replace(batch.observation, prompts=prompts)
    batch = dataclasses.replace(batch, observation=observation).to("meta")
    noise = torch.zeros(2, *policy.noise_shape, device="meta")
    draw = Draw(noise_BHA=noise, noise_level_B=torch.zeros(2, device="meta"))
    keys = DrawKeys(seed=0, step=0, sample_index_B=torch.arange(2))
    loss = policy(batch, keys, draw)
    assert loss.entries_BHA.shape == loss.weight_BHA.shape == noise.shape
    assert loss.entries_BHA.dtype == torch.float32
    loss.entries_BHA.sum().backward()
    assert policy.sample(batch.observation, noise).shape == (2, *policy.action_shape)


class HostReads(TorchDispatchMode):
    """Counts operators that bring a value to the host, or whose shape depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in func.name() for name in self.NAMES):
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PRESETS)
def test_forward_backward_and_sampling_read_nothing_on_the_host(name):
    policy = make_policy(name)
    batch = make_batch(policy.config)
    draw = policy.config.objective.draw(policy.action_layout(batch.actions_BHA), keys_of(batch))
    noise = torch.randn(3, *policy.noise_shape)
    with HostReads() as reads:
        weighted(policy(batch, keys_of(batch), draw)).backward()
        policy.sample(batch.observation, noise)
    assert reads.seen == []
    with HostReads() as reads:
        noise.max().item()
    assert reads.seen  # the counter counts


@pytest.mark.parametrize("name", PRESETS)
def test_every_trained_parameter_gets_a_gradient(name):
    policy = make_policy(name)
    batch = make_batch(policy.config)
    weighted(policy(batch, keys_of(batch))).backward()
    for parameter_name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, parameter_name
            continue
        assert parameter.grad is not None, parameter_name
        # A bias on keys shifts all scores alike: softmax takes it away.
        if not parameter_name.endswith(("k_proj.bias", "qkv.bias")):
            assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_masked_changes_neither_loss_nor_actions(name):
    policy = make_policy(name).eval()
    batch = make_batch(policy.config)
    other = with_masked_content(batch)
    with torch.no_grad():
        losses = [weighted(policy(version, keys_of(batch))).item() for version in (batch, other)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert torch.allclose(sampled(policy, batch), sampled(policy, other), atol=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_padded_steps_and_unused_dimensions_have_no_weight(name):
    policy = make_policy(name)
    batch = make_batch(policy.config)
    weight = policy(batch, keys_of(batch)).weight_BHA
    assert weight.sum() == batch.valid_BH.sum() * ACTION_DIM
    assert not weight[-1, -2:].any()


def test_what_counts_in_the_loss_can_be_switched():
    config = PRESETS["pi05"](tiny=True)
    batch = make_batch(config)
    counted = {}
    for switch in ({}, {"train_unused_dims": True}, {"train_padded_steps": True}, {"gripper_weight": 3.0}):
        loss = make_policy(dataclasses.replace(config, **switch))(batch, keys_of(batch))
        counted[next(iter(switch), "default")] = loss.weight_BHA.sum().item()
    steps = batch.valid_BH.sum().item()
    assert counted == {
        "default": steps * 7,
        "train_unused_dims": steps * 32,
        "train_padded_steps": batch.valid_BH.numel() * 7,
        "gripper_weight": steps * 9,
    }
    with pytest.raises(ValueError, match="must be more than 0"):
        dataclasses.replace(config, gripper_weight=0.0)


@pytest.mark.parametrize("name", PRESETS)
def test_images_language_and_state_change_the_actions(name):
    policy = make_policy(name).eval()
    batch = make_batch(policy.config)
    observation, prompts = batch.observation, batch.observation.prompts
    reference = sampled(policy, batch)
    other_prompt = dataclasses.replace(
        prompts,
        ids_BL=(prompts.ids_BL + 11) % 50,
        embedding_BLE=None if prompts.embedding_BLE is None else -prompts.embedding_BLE,
    )
    changes = {
        "images": {"images": {camera: 255 - image for camera, image in observation.images.items()}},
        "language": {"prompts": other_prompt},
        "state": {"state_BTS": -observation.state_BTS},
    }
    if name == "pi05":  # its state is in the prompt's words, which the loader writes
        del changes["state"]
    for what, change in changes.items():
        version = dataclasses.replace(batch, observation=dataclasses.replace(observation, **change))
        assert (sampled(policy, version) - reference).abs().max() > 1e-4, what


@pytest.mark.parametrize("name", PRESETS)
def test_bfloat16_agrees_within_its_eight_bits(name):
    policy = make_policy(name).eval()
    batch = make_batch(policy.config)
    exact = sampled(policy, batch)
    rounded = sampled(policy.to(torch.bfloat16), batch)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() / exact.abs().max() < 0.05
