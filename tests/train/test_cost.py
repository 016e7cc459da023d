"""What a step costs, counted without memory, against what was counted by hand and against what a CPU really allocates."""

from contextlib import nullcontext
from dataclasses import replace

import preset_policies
import pytest
import torch
from small_policies import make_batch, make_policy
from torch.profiler import ProfilerActivity, profile

from vlatune.policy.lora import LoraConfig
from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.objectives.flow import Flow
from vlatune.policy.objectives.rs_imle import RSIMLE
from vlatune.policy.policy import Policy
from vlatune.train.activation_memory import activation_memory, peak_bytes
from vlatune.train.blocks import blocks_of, transform_blocks
from vlatune.train.config import ActivationCheckpointingConfig
from vlatune.train.cost import (
    flops_per_sample,
    meta_batch,
    meta_policy,
    part_sizes,
    peak_flops,
    step_flops,
)
from vlatune.train.recipes import load_recipe
from vlatune.train.trainable import set_trained

EVERYWHERE = LoraConfig(backbone="all", expert="all")


def stage(recipe, trained="full", lora=None):
    policy = meta_policy(load_recipe(recipe).policy)
    set_trained(policy, trained, lora or LoraConfig())
    return policy


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("h200", 989e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("cpu", None),
    ],
)
def test_a_known_chip_has_a_peak_and_another_has_none(name, peak):
    assert peak_flops(name) == peak


@pytest.mark.parametrize(("recipe", "total"), [("pi05", 3_353_433_872), ("smolvla", 402_737_376)])
def test_parameters_are_those_of_the_public_models(recipe, total):
    sizes = part_sizes(stage(recipe))
    assert sizes["together"].total == total == sum(size.total for part, size in sizes.items() if part != "together")
    assert all(sizes[part].total > 0 for part in ("vision", "language model", "expert", "other"))


def test_adapters_are_counted_apart():
    sizes = part_sizes(stage("tiny", "lora"))
    assert sizes["together"].trained == sizes["together"].adapters > 0
    assert sizes["vision"].trained == 0
    joint = part_sizes(stage("tiny", "lora+expert"))
    assert joint["expert"].adapters == 0
    assert joint["expert"].trained == joint["expert"].total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained", "lora", "forward", "total"),
    [
        ("full", None, 2.48, 7.44),
        ("vision_frozen", None, 2.48, 6.56),
        ("expert", None, 2.48, 2.49),
        ("lora", LoraConfig(backbone="attention+mlp", expert="attention+mlp"), 2.48, 4.52),
        # By hand 4.96: the adapters' own products, of rank 16 in every projection of three transformers, were left out.
        ("lora", EVERYWHERE, 2.48, 4.96),
    ],
)
def test_pi05_computes_what_was_counted_by_hand(trained, lora, forward, total):
    """Two cameras, 20 tokens of prompt, a chunk of 10, in TFLOP: from the matrices' sizes, a backward pass being two forward ones where
    weights are trained, and one where only gradients pass through."""
    policy = stage("pi05", trained, lora)
    flops = step_flops(policy, meta_batch(policy, 1, 20))
    assert flops.forward / 1e12 == pytest.approx(forward, rel=0.02)
    assert flops.total / 1e12 == pytest.approx(total, rel=0.04)


def test_an_expert_over_a_frozen_backbone_needs_no_backward_pass_through_it():
    full, expert = (step_flops(policy, meta_batch(policy, 2, 8)) for policy in (stage("tiny"), stage("tiny", "expert")))
    assert expert.forward == full.forward
    assert expert.total < full.total < 3 * full.forward  # images need no gradient


def test_the_search_of_rs_imle_counts_and_draws_share_the_prefix():
    config = load_recipe("tiny").policy

    def cost(objective):
        policy = meta_policy(replace(config, objective=objective))
        return step_flops(policy, meta_batch(policy, 2, 8))

    one, three = cost(Flow(num_draws=1)), cost(Flow(num_draws=3))
    of_expert = (three.forward - one.forward) / 2
    assert 0 < of_expert < one.forward
    # A search among four candidates is four calls without gradients, and then the call that is trained.
    search = cost(RSIMLE(num_candidates=4))
    assert search.forward == pytest.approx(one.forward + 4 * of_expert)
    assert search.total - search.forward == pytest.approx(one.total - one.forward)


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_a_real_policy_is_counted_as_it_is_and_left_alone(trained):
    policy, batch = make_policy(), make_batch()
    set_trained(policy, trained, LoraConfig(rank=2))
    transform_blocks(policy, ActivationCheckpointingConfig(parts=("expert",)), compiled=False)
    before, random_state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}, torch.get_rng_state()
    found = flops_per_sample(policy, batch)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters())

    plain = meta_policy(policy.config, vocab_size=policy.embodiment.vocab_size)
    set_trained(plain, trained, LoraConfig(rank=2))
    assert found == step_flops(plain, meta_batch(plain, 1, batch.observation.prompts.ids_BL.shape[1])).total


def on_the_cpu(policy):
    with torch.device("cpu"):
        return Policy(policy.config, policy.embodiment, policy.statistics)


def allocated(policy, batch, *, autocast):
    """The most bytes that the CPU's allocator gave out at a time in one forward and backward pass, by torch's profiler."""
    keys = DrawKeys(seed=0, step=0, sample_index_B=batch.sample_index_B)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = policy(batch, keys)
        (loss.entries_BHA * loss.weight_BHA).sum().backward()
    now = most = 0
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_activations_are_what_a_real_step_allocates(precision, checkpointed):
    """The same policy with weights, on the CPU. Eight samples: with one, checkpointing's own bookkeeping is the larger part."""
    dtype, autocast = torch.bfloat16 if precision == "bf16" else torch.float32, precision == "autocast"
    policy = stage("pocket")
    real, batch = on_the_cpu(policy), preset_policies.make_batch(policy.config, batch=8)
    for each in (policy, real):
        each.to(dtype)
        if checkpointed:
            transform_blocks(each, ActivationCheckpointingConfig(parts=tuple(blocks_of(each))), compiled=False)
    counted = peak_bytes(policy, meta_batch(policy, 8, batch.observation.prompts.ids_BL.shape[1]), autocast=autocast)
    assert counted == pytest.approx(allocated(real, batch, autocast=autocast), rel=0.04)


def test_the_line_over_micro_batches_is_never_under_the_peak():
    policy = stage("pocket")
    line = activation_memory(policy, lambda size: meta_batch(policy, size, 16), autocast=False)
    for size in (1, 5, 32):
        peak = peak_bytes(policy, meta_batch(policy, size, 16), autocast=False)
        assert peak <= line.at(size) * (1 + 1e-9)
        assert line.at(size) == pytest.approx(peak, rel=0.05)


def test_features_of_a_frozen_tower_take_its_work_away():
    policy = stage("tiny", "vision_frozen")
    pictures, features = (meta_batch(policy, 2, 8, vision_features=given) for given in (False, True))
    assert step_flops(policy, features).total < step_flops(policy, pictures).total
    assert features.observation.images == {}
