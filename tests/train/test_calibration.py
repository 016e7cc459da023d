"""What a policy measures on training data before its first step: once, on any number of ranks, and kept through a resume."""

from dataclasses import replace

import pytest
import torch
from launched import weights

from vlatune.policy.acting import load_policy
from vlatune.policy.backbones.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from vlatune.policy.experts.mlp import FusionConfig, MLPExpertConfig
from vlatune.train.calibration import calibrate
from vlatune.train.recipes import load_recipe
from vlatune.train.run import train
from vlatune.train.stages import stage_policy
from vlatune.train.training_data import TrainingData

MEAN, STD = "expert.condition.token_mean", "expert.condition.token_std"


@pytest.fixture
def config(small_cache, tmp_path):
    recipe = load_recipe("tiny")
    small = {"width": 24, "mlp_dim": 32, "depth": 1, "num_heads": 2}
    fusion = FusionConfig(standardise=True, state_width=8, hidden_width=24, width=16)
    policy = replace(
        recipe.policy,
        backbone=ClipConfig(
            vision=ClipVisionConfig(image_px=16, patch_px=8, **small), text=ClipTextConfig(**small), embedding_width=20
        ),
        expert=MLPExpertConfig(fusion=fusion, width=24, num_layers=1),
    )
    return replace(recipe, engine="plain", cache=small_cache.path, out=tmp_path / "run", policy=policy)


def test_measured_once_and_kept_through_a_resume(config):
    train(replace(config, stop_at_step=2))
    train(config)
    first, last = weights(config.out, step=0), weights(config.out)
    assert first[MEAN].any() and (first[STD] > 0).all() and not first[STD].equal(torch.ones_like(first[STD]))
    assert last[MEAN].equal(first[MEAN]) and last[STD].equal(first[STD]), "nobody trains them"
    straight = replace(config, out=config.out.with_name("straight"))
    train(straight)
    expected = weights(straight.out)
    assert all(expected[name].equal(last[name]) for name in expected)
    policy = load_policy(config.out / "checkpoints" / "step_000004", device="cpu").policy
    assert policy.expert.condition.token_mean.equal(first[MEAN])


def test_every_rank_measures_the_same(config):
    measured = []
    for rank in (0, 1):
        data = TrainingData.open(config, rank=rank, world_size=2)
        torch.manual_seed(0)
        policy = stage_policy(config, config.stages[0], data, filled=True)
        measured.append(policy.expert.condition.token_mean.detach().clone())
    assert measured[0].equal(measured[1])


def test_weights_that_bring_it_along_are_left_alone(config):
    data = TrainingData.open(config, rank=0, world_size=1)
    policy = stage_policy(config, config.stages[0], data, filled=True)
    with torch.no_grad():
        policy.expert.condition.token_mean.fill_(3.0)
    calibrate(policy, data)
    assert (policy.expert.condition.token_mean == 3.0).all()
