"""RDT's recipes with conditions hidden: what the expert then reads, a run, and what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from launched import rows
from preset_policies import make_batch, make_policy
from small_demonstrations import write_demos
from small_text_models import without_empty_text

from vlatune.data.batch import HiddenConditions, RawObservation
from vlatune.data.condition_dropout import ConditionsConfig
from vlatune.data.episodes import DataError
from vlatune.data.prepare import PrepareConfig, prepare
from vlatune.policy import presets
from vlatune.policy.acting import load_policy
from vlatune.train.recipes import load_recipe
from vlatune.train.run import train

IS_HZ_HIDDEN = torch.tensor([True, False, True, False])
IS_MASK_HIDDEN = torch.tensor([False, True, True, False])


@torch.no_grad()
def test_the_expert_reads_frequency_0_and_no_entry_where_they_are_hidden():
    policy = make_policy("rdt").eval()
    observation = make_batch(policy.config, batch=4).observation
    hidden = HiddenConditions(control_hz_B=IS_HZ_HIDDEN, action_mask_B=IS_MASK_HIDDEN)
    x_BHA, level_B = torch.randn(4, *policy.noise_shape), torch.rand(4)
    plain = policy.prefix(observation)
    found = policy.bind(replace(observation, hidden=hidden))(x_BHA, level_B)
    control_hz_B, mask_BA = torch.tensor([0.0, 20.0, 0.0, 20.0]), plain.action_mask_BA.clone()
    assert mask_BA.any()
    mask_BA[1:3] = False
    by_hand = replace(plain, control_hz_B=control_hz_B, action_mask_BA=mask_BA)
    assert torch.equal(found, policy.expert.bind(by_hand)(x_BHA, level_B))
    whole = policy.expert.bind(plain)(x_BHA, level_B)
    assert torch.equal(found[3], whole[3])
    for one in (
        replace(by_hand, control_hz_B=plain.control_hz_B),
        replace(by_hand, action_mask_BA=plain.action_mask_BA),
    ):
        assert not torch.allclose(policy.expert.bind(one)(x_BHA, level_B), found, atol=1e-4)  # each of them counts
    none = HiddenConditions(control_hz_B=IS_HZ_HIDDEN & ~IS_HZ_HIDDEN, action_mask_B=IS_HZ_HIDDEN & ~IS_HZ_HIDDEN)
    assert torch.equal(policy.bind(replace(observation, hidden=none))(x_BHA, level_B), whole)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rdt")
    for task, seed in (("pick_up_the_red_cube", 1), ("pick_up_the_blue_cube", 2)):
        write_demos(folder / "demos" / f"{task}_demo.hdf5", (7, 5, 9), seed=seed)
    settings = {"image_px": 28, "robot": "libero_panda_joints_fingers", "background": (127, 127, 127)}
    return prepare(PrepareConfig(demos=folder / "demos", out=folder / "cache", **settings))


@pytest.fixture
def rdt_lora(cache, tmp_path):
    """The recipe with the tiny preset, two steps, and half of everything hidden."""
    recipe = load_recipe("rdt_lora")
    assert (recipe.conditions, recipe.ema.power) == (ConditionsConfig(dropout=0.1, state_noise_db=40.0), 0.75)
    return replace(
        recipe,
        cache=cache,
        out=tmp_path / "run",
        policy=presets.rdt(tiny=True),
        pretrained=(),
        conditions=ConditionsConfig(dropout=0.5, state_noise_db=40.0),
        engine="plain",
        num_steps=2,
        batch_size=8,
        log_every=1,
        validate_every=1,
        num_validation_batches=1,
    )


def test_conditions_are_hidden_in_training_and_never_in_validation(rdt_lora, tmp_path):
    """With a learning rate of 0 the weights stay, so that losses compare; from scratch they would give 0 whatever they read."""
    quick = replace(rdt_lora.optimizer, learning_rate=1e-2, num_warmup_steps=0)
    begun = train(replace(rdt_lora, trained="full", optimizer=quick)) / "checkpoints" / "step_000002"
    still = replace(rdt_lora.optimizer, learning_rate=0.0, final_learning_rate=0.0)
    still = replace(rdt_lora, optimizer=still, pretrained=(str(begun),))
    losses = {}
    for name, conditions in {
        "dropout": ConditionsConfig(dropout=0.5),
        "noise": ConditionsConfig(state_noise_db=-20.0),
        "off": ConditionsConfig(),
    }.items():
        train(replace(still, out=tmp_path / name, conditions=conditions))
        losses[name] = [(row["loss"], row["validation_loss"], row["action_error"]) for row in rows(tmp_path / name)]
    assert len({found[0][0] for found in losses.values()}) == 3
    assert len({found[0][1:] for found in losses.values()}) == 1


def test_a_run_trains_adapters_and_an_average_that_act(rdt_lora):
    train(rdt_lora)
    assert json.loads((rdt_lora.out / "config.json").read_text())["conditions"] == {
        "dropout": 0.5,
        "state_noise_db": 40.0,
    }
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    for averaged in (False, True):
        policy = load_policy(rdt_lora.out / "checkpoints" / "step_000002", device="cpu", averaged=averaged)
        raw = RawObservation(
            images=dict.fromkeys(policy.cameras, pictures),
            state_TS=np.zeros((2, policy.policy.embodiment.state_dim), np.float32),
            instruction="pick up the red cube",
        )
        assert np.isfinite(policy.act(raw)).all()


def test_a_cache_without_the_empty_text_is_refused_before_anything_is_written(rdt_lora, cache, tmp_path):
    older = without_empty_text(shutil.copytree(cache / "language", tmp_path / "older"))
    with pytest.raises(
        DataError,
        match="was made before the features of the empty text were kept.*delete the cache and prepare it again",
    ):
        train(replace(rdt_lora, language=older))
    assert not rdt_lora.out.exists()
    data = replace(rdt_lora, language=older, conditions=ConditionsConfig(state_noise_db=40.0), num_steps=1)
    assert (train(data) / "config.json").exists()


def test_policies_that_cannot_be_trained_so_are_refused():
    dropout, noise = ConditionsConfig(dropout=0.1), ConditionsConfig(state_noise_db=40.0)
    with pytest.raises(ValueError, match="the backbone 'paligemma' reads token ids, .* which RDT reads; set it to 0"):
        replace(load_recipe("pi05"), conditions=dropout)
    with pytest.raises(ValueError, match="policy.prompt 'pi05' spells the state out in words, .* leave it out"):
        replace(load_recipe("pi05"), conditions=noise)
    replace(load_recipe("smolvla"), conditions=noise)
