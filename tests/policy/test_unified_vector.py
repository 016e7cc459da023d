"""RDT on LIBERO: the mappings into its vector of 128, from a policy's side."""

import dataclasses
import json

import pytest
import torch
from preset_policies import ACTION_DIM, embodiment_for, make_batch, make_policy, statistics

from vlatune.data.episodes import DataError
from vlatune.data.images import ImageRule
from vlatune.data.normalise import Statistics
from vlatune.data.unified_vector import CODECS
from vlatune.policy.checkpoints.folder import read_policy, write_policy
from vlatune.policy.checkpoints.layout import COMPLETE
from vlatune.policy.checkpoints.pretrained import load_pretrained
from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.policy import Policy
from vlatune.policy.presets import rdt
from vlatune.train.recipes import load_recipe

RECIPES = {"rdt": "libero_osc", "rdt_physical": "libero_physical"}


def legal(batch):
    """The same batch with actions that the controller takes."""
    actions = batch.actions_BHA.clamp(-1, 1)
    actions[..., 6] = actions[..., 6].sign()
    return dataclasses.replace(batch, actions_BHA=actions)


def saved(policy, folder, language):
    folder.mkdir()
    write_policy(folder, policy, policy.state_dict(), language, {})
    (folder / COMPLETE).touch()
    return folder


@pytest.mark.parametrize("codec", CODECS)
def test_a_policy_trains_and_acts_with_every_codec(codec):
    policy = make_policy(rdt(tiny=True, codec=codec))
    batch = legal(make_batch(policy.config))
    loss = policy(batch, DrawKeys(seed=0, step=0, sample_index_B=batch.sample_index_B))
    used = policy.action_layout.mask_W
    assert loss.weight_BHA[..., used].any()
    assert not loss.weight_BHA[..., ~used].any()
    with torch.no_grad():
        actions = policy.sample(batch.observation, torch.randn(3, *policy.noise_shape))
    assert actions.shape == (3, policy.config.horizon, ACTION_DIM)
    assert actions.isfinite().all()
    if codec != "libero_physical":
        assert set(actions[..., 6].unique().tolist()) <= {-1.0, 1.0}


@pytest.mark.parametrize("codec", CODECS)
def test_what_the_expert_learns_is_the_encoded_action(codec):
    """A policy that knew the data's chunk would act exactly as the demonstrator did."""
    policy = make_policy(rdt(tiny=True, codec=codec))
    batch = legal(make_batch(policy.config))
    target = policy.action_layout(policy.action_normaliser(batch.actions_BHA))
    back = policy.action_normaliser.inverse(policy.action_layout.inverse(target))
    torch.testing.assert_close(back, batch.actions_BHA, atol=1e-6, rtol=0)


@pytest.mark.parametrize("codec", CODECS)
def test_the_grippers_weight_lands_on_its_slot(codec):
    policy = make_policy(dataclasses.replace(rdt(tiny=True, codec=codec), gripper_weight=3.0))
    assert (policy.weight_A == 3).nonzero().flatten().tolist() == [10]


def test_one_mask_marks_what_the_robot_has_of_state_and_actions():
    policy = make_policy(rdt(tiny=True))
    mask = policy.prefix(make_batch(policy.config).observation).action_mask_BA
    assert mask[0].nonzero().flatten().tolist() == [*range(7), 10, 11, *range(39, 45)]


def test_another_robot_card_is_refused():
    config = rdt(tiny=True)
    embodiment = dataclasses.replace(embodiment_for(config), robot="libero_panda", state_dim=8)
    with pytest.raises(
        ValueError, match=r"'libero_osc' is for the robot card libero_panda_joints_fingers, .* of 'libero_panda'"
    ):
        Policy(config, embodiment, Statistics(state=statistics(8), actions=statistics(7)))


@pytest.mark.parametrize("field", ["state_normalisation", "action_normalisation"])
def test_what_is_encoded_is_not_normalised_too(field):
    name = field.removesuffix("_normalisation")
    with pytest.raises(
        ValueError, match=f"policy.{name}_layout 'libero_osc' encodes raw units .*{field} is 'quantile'"
    ):
        dataclasses.replace(rdt(tiny=True), **{field: "quantile"})


def test_a_checkpoint_keeps_its_layouts(small_cache, tmp_path):
    policy = make_policy(rdt(tiny=True, codec="libero_physical"))
    folder = saved(policy, tmp_path / "step", small_cache.language)
    returned, _, _ = read_policy(folder)
    assert returned.config.action_layout == CODECS["libero_physical"].actions
    assert returned.embodiment.robot == "libero_panda"
    config = json.loads((folder / "config.json").read_text())
    config["policy"]["action_layout"]["encoding"] = "libero_physics"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="encoding"):
        read_policy(folder)


def test_weights_that_learnt_one_mapping_are_refused_by_a_run_with_another(small_cache, tmp_path):
    osc, physical = (make_policy(rdt(tiny=True, codec=codec)) for codec in ("libero_osc", "libero_physical"))
    folder = saved(osc, tmp_path / "osc", small_cache.language)
    assert load_pretrained(osc, [str(folder)])[1] == []
    with pytest.raises(DataError, match=r"trained with state_layout 'libero_osc', and this run has 'libero_physical'"):
        load_pretrained(physical, [str(folder)])
    layout = dataclasses.replace(osc.config.state_layout, slots=None, encoding="as_is", robots=(), name="rdt")
    base = make_policy(dataclasses.replace(osc.config, state_layout=layout, action_layout=layout))
    assert load_pretrained(physical, [str(saved(base, tmp_path / "base", small_cache.language))])[1] == []


def test_rdt_needs_384_pixels_and_says_why():
    """576 patches of 336 pixels would read rows of the table that belong to other pictures."""
    config = rdt()
    vision = dataclasses.replace(config.backbone.vision, image_px=336)
    smaller = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, vision=vision))
    both = Statistics(state=statistics(9), actions=statistics(7))
    with torch.device("meta"):
        with pytest.raises(
            ValueError, match=r"num_image_tokens is 4374: .*729 a picture, of 384 pixels.*336 pixels have 576 patches"
        ):
            Policy(smaller, embodiment_for(smaller, encoder_width=4096), both)
        prepared = dataclasses.replace(embodiment_for(config, encoder_width=4096), image_rule=ImageRule(size_px=336))
        with pytest.raises(ValueError, match="reads 384-pixel images, .* prepare with --image-px 384"):
            Policy(config, prepared, both)


def test_another_expert_reads_336_pixels():
    config = make_policy("clip_flow").config
    vision = dataclasses.replace(config.backbone.vision, image_px=336, patch_px=14)
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, vision=vision))
    assert make_policy(config).embodiment.image_rule.size_px == 336


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_for_each_reported_mapping(name):
    recipe = load_recipe(name)
    codec = CODECS[RECIPES[name]]
    assert (recipe.policy.state_layout, recipe.policy.action_layout) == (codec.state, codec.actions)
    assert recipe.out.name == name
