"""Tokens to one vector: what may and what must not change it."""

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch

from vlatune.policy.experts.pooling import PoolingConfig, TokenPooling
from vlatune.policy.prefix import Prefix, PrefixShape

KINDS = get_args(get_type_hints(PoolingConfig)["kind"])
SHAPE = PrefixShape(kv=None, tokens={"image": 12, "language": 12}, state_dim=4)


def make_pooling(kind, shape=SHAPE):
    torch.manual_seed(0)
    return TokenPooling(PoolingConfig(kind=kind, width=16, num_heads=2), shape)


def make_prefix():
    random = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 3:] = False
    mask[2] = False
    return Prefix(
        tokens={
            "image": (torch.randn(3, 6, 12, generator=random), mask),
            "language": (torch.randn(3, 5, 12, generator=random), torch.arange(5) < torch.tensor([[2], [5], [0]])),
        },
        state_BTS=torch.randn(3, 2, 4, generator=random),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_change_nothing_not_even_as_nan(kind):
    pooling, prefix = make_pooling(kind), make_prefix()
    other = {
        name: (torch.where(mask[..., None], features, torch.nan), mask)
        for name, (features, mask) in prefix.tokens.items()
    }
    assert torch.equal(pooling(prefix), pooling(replace(prefix, tokens=other)))
    seen = {name: (features, torch.ones_like(mask)) for name, (features, mask) in prefix.tokens.items()}
    assert not torch.allclose(pooling(prefix), pooling(replace(prefix, tokens=seen)), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    pooling, prefix = make_pooling(kind), make_prefix()
    longer = {
        name: (torch.cat([features, features], dim=1), torch.cat([mask, torch.zeros_like(mask)], dim=1))
        for name, (features, mask) in prefix.tokens.items()
    }
    assert torch.allclose(pooling(prefix), pooling(replace(prefix, tokens=longer)), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_and_of_the_state_the_newest(kind):
    pooling, prefix = make_pooling(kind), make_prefix()
    reference = pooling(prefix)[0]
    for name in prefix.tokens:
        features, mask = prefix.tokens[name]
        changed = replace(prefix, tokens={**prefix.tokens, name: (-features, mask)})
        assert not torch.allclose(pooling(changed)[0], reference, atol=1e-3), name
    shift = torch.tensor([[[1.0], [0.0]]])
    assert torch.equal(pooling(replace(prefix, state_BTS=prefix.state_BTS + shift))[0], reference)
    assert not torch.allclose(pooling(replace(prefix, state_BTS=-prefix.state_BTS))[0], reference, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_token_of_the_backbone_stands_in_for_the_state(kind):
    pooling = make_pooling(kind, PrefixShape(kv=None, tokens={**SHAPE.tokens, "state": 12}, state_dim=4))
    prefix = make_prefix()
    token = (torch.randn(3, 1, 12), torch.ones(3, 1, dtype=torch.bool))
    prefix = replace(prefix, tokens={**prefix.tokens, "state": token})
    assert torch.equal(pooling(prefix), pooling(replace(prefix, state_BTS=-prefix.state_BTS)))
    other = replace(prefix, tokens={**prefix.tokens, "state": (-token[0], token[1])})
    assert not torch.allclose(pooling(prefix), pooling(other), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_of_hidden_states_does_not_matter(kind):
    pooling, prefix = make_pooling(kind), make_prefix()
    louder = {name: (100 * features, mask) for name, (features, mask) in prefix.tokens.items()}
    assert torch.allclose(pooling(prefix), pooling(replace(prefix, tokens=louder)), atol=1e-4)


def test_the_average_is_the_mean_over_valid_tokens():
    pooling, prefix = make_pooling("average"), make_prefix()
    tokens = [pooling.projections["state"](prefix.state_BTS[1, -1:])]
    for name, (features, mask) in prefix.tokens.items():
        normed = torch.nn.functional.layer_norm(features[1][mask[1]], (12,))
        tokens.append(pooling.projections[name](normed))
    assert torch.allclose(pooling(prefix)[1], torch.cat(tokens).mean(dim=0), atol=1e-6)


@pytest.mark.parametrize(("kind", "told_apart"), [("attention", False), ("typed_attention", True)])
def test_only_typed_attention_tells_kinds_apart_by_themselves(kind, told_apart):
    pooling, prefix = make_pooling(kind), make_prefix()
    pooling.projections["language"].load_state_dict(pooling.projections["image"].state_dict())
    swapped = replace(prefix, tokens={"image": prefix.tokens["language"], "language": prefix.tokens["image"]})
    assert torch.allclose(pooling(prefix), pooling(swapped), atol=1e-5) != told_apart


def test_what_the_prefix_lacks_is_named():
    pooling, prefix = make_pooling("attention"), make_prefix()
    with pytest.raises(ValueError, match="reads language tokens, and the backbone hands over none"):
        pooling(replace(prefix, tokens={"image": prefix.tokens["image"]}))
    with pytest.raises(ValueError, match="reads proprioception, and the prefix carries none"):
        pooling(replace(prefix, state_BTS=None))
    with pytest.raises(ValueError, match="choose a backbone that does"):
        make_pooling("average", PrefixShape(kv=(1, 1, 8), tokens={}, state_dim=4))(replace(prefix, tokens={}))


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="width is 20; it must be a multiple of num_heads, 8"):
        PoolingConfig(width=20)
