"""Activation checkpointing and compiling, block by block: the same gradients, and what they are for."""

import pytest
import torch
from launched import rows, train, weights
from preset_policies import make_batch, make_policy

from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.policy import Policy
from vlatune.policy.presets import PRESETS
from vlatune.train.blocks import blocks_of, transform_blocks
from vlatune.train.config import ActivationCheckpointingConfig


def gradients(policy, batch):
    """By parameter, and the bytes that the forward pass kept for them."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = policy(batch, DrawKeys(seed=0, step=0, sample_index_B=batch.sample_index_B)).entries_BHA.mean()
    loss.backward()
    by_name = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return by_name, sum(size for place, size in kept.items() if place not in own)


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"clip_flow"}))
def test_less_is_kept_and_gradients_are_equal_bit_for_bit(name):
    policies = [make_policy(name) for _ in range(3)]
    batch = make_batch(policies[0].config, batch=2)
    parts = tuple(blocks_of(policies[0]))
    transform_blocks(policies[1], ActivationCheckpointingConfig(parts=parts), compiled=False)
    transform_blocks(policies[2], ActivationCheckpointingConfig(parts=parts, every=2), compiled=False)
    (expected, kept), (found, kept_less), (_, kept_some) = [gradients(policy, batch) for policy in policies]
    assert kept_less < 0.8 * kept
    assert kept_less < kept_some < kept
    assert expected.keys() == found.keys()
    assert all(expected[key].equal(found[key]) for key in expected)


def test_dropout_is_the_same_when_a_block_is_computed_again():
    """Adapters have some; the second pass must drop what the first one dropped."""
    from vlatune.policy.lora import LoraConfig
    from vlatune.train.trainable import set_trained

    found = []
    for parts in ((), ("language_model", "expert")):
        policy = make_policy("pi05")
        set_trained(policy, "lora", LoraConfig(dropout=0.5))
        transform_blocks(policy, ActivationCheckpointingConfig(parts=parts), compiled=False)
        torch.manual_seed(3)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        torch.manual_seed(4)
        found.append(gradients(policy, make_batch(policy.config, batch=2))[0])
    assert all(found[0][key].equal(found[1][key]) for key in found[0])


def test_a_part_without_blocks_is_refused():
    config = ActivationCheckpointingConfig(parts=("expert",))
    with pytest.raises(ValueError, match="names 'expert', which has no blocks in this policy; parts that have: vision"):
        transform_blocks(make_policy("clip_flow"), config, compiled=False)
    with pytest.raises(ValueError, match="every is 0; it must be at least 1"):
        ActivationCheckpointingConfig(every=0)


@pytest.mark.slow
def test_a_run_computes_the_same_under_zero2(small_cache, tmp_path):
    parts = ("--activation-checkpointing.parts", "vision", "language_model", "expert")
    train(small_cache.path, tmp_path / "plain", "--stop-at-step", "2")
    train(small_cache.path, tmp_path / "checkpointed", "--stop-at-step", "2", *parts)
    for name, expected in weights(tmp_path / "plain", 2).items():
        assert weights(tmp_path / "checkpointed", 2)[name].equal(expected), name


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a minute on two quiet cores
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_a_compiled_and_checkpointed_run_stays_near_the_plain_one(small_cache, tmp_path, engine):
    parts = ("--activation-checkpointing.parts", "language_model", "expert")
    train(small_cache.path, tmp_path / "plain", "--engine", engine)
    train(small_cache.path, tmp_path / "compiled", "--engine", engine, "--compile", *parts)
    for row, other in zip(rows(tmp_path / "plain"), rows(tmp_path / "compiled"), strict=True):
        for column in ("loss", "grad_norm", "validation_loss"):
            if row[column]:
                assert float(other[column]) == pytest.approx(float(row[column]), rel=1e-4)
    assert weights(tmp_path / "plain").keys() == weights(tmp_path / "compiled").keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pi05", "smolvla", "rdt"])
def test_blocks_of_a_kind_share_one_program(name):
    import torch._dynamo as dynamo

    def compiled(policy: Policy) -> int:
        dynamo.reset()
        dynamo.utils.counters.clear()
        transform_blocks(policy, ActivationCheckpointingConfig(), compiled=True)
        found.append(gradients(policy, batch)[0])
        assert not dynamo.utils.counters["graph_break"]
        return dynamo.utils.counters["stats"]["unique_graphs"]

    plain, policy = make_policy(name), make_policy(name)
    batch = make_batch(plain.config, batch=2)
    found = [gradients(plain, batch)[0]]
    num_blocks = sum(len(blocks) for blocks in blocks_of(policy).values())
    assert compiled(policy) < num_blocks
    for key, expected in found[0].items():
        torch.testing.assert_close(found[1][key], expected, rtol=1e-3, atol=1e-5)
