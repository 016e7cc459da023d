"""The schedule is a function of the step; the groups hold every trainable parameter once."""

import itertools

import pytest
from small_policies import make_policy

from vlatune.train.config import AdamWConfig, TrainConfig
from vlatune.train.optim import learning_rate_at, make_optimizer
from vlatune.train.recipes import RECIPES, load_recipe


def test_warm_up_then_cosine():
    config = AdamWConfig(learning_rate=1.0, final_learning_rate=0.1, num_warmup_steps=4)
    rates = [learning_rate_at(step, 104, config) for step in range(105)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == pytest.approx(1.0)
    assert rates[54] == pytest.approx(0.55)
    assert rates[104] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))


def test_every_trainable_parameter_is_in_one_group():
    policy = make_policy()
    groups = make_optimizer(policy, AdamWConfig()).param_groups
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in policy.parameters() if p.requires_grad)
    decayed, spared = groups
    assert decayed["weight_decay"] > 0
    assert spared["weight_decay"] == 0
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert id(policy.backbone.language_model.embed_tokens.weight) in {id(p) for p in spared["params"]}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds(name):
    assert isinstance(load_recipe(name), TrainConfig)


def test_an_unknown_recipe_gets_a_suggestion():
    with pytest.raises(ValueError, match="there is no recipe 'poket'; did you mean 'pocket'"):
        load_recipe("poket")


def test_modules_with_a_rate_of_their_own():
    policy = make_policy()
    factors = {"backbone": 0.1, "backbone.vision_tower": 0.0}
    groups = make_optimizer(policy, AdamWConfig(rate_factors=factors)).param_groups
    factor_of = {id(parameter): group["rate_factor"] for group in groups for parameter in group["params"]}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            wanted = 0.0 if name.startswith("backbone.vision_tower.") else 0.1 if name.startswith("backbone.") else 1.0
            assert factor_of[id(parameter)] == wanted, name
    with pytest.raises(
        ValueError, match="rate_factors names .backbon., where nothing is trained; modules that are: backbone"
    ):
        make_optimizer(policy, AdamWConfig(rate_factors={"backbon": 0.1}))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(
        ValueError, match="--batch-size 4 does not divide into 3 ranks x 1 accumulation steps; type --batch-size 6 or 3"
    ):
        load_recipe("tiny").micro_batch_size(3)
