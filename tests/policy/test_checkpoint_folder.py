"""A checkpoint rebuilds its policy without the recipe, and refuses what does not fit."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_policies import CAMERAS, make_policy

from vlatune.data.batch import RawObservation
from vlatune.data.episodes import DataError
from vlatune.data.language import Language
from vlatune.policy.acting import load_policy
from vlatune.policy.checkpoints.folder import write_policy
from vlatune.policy.checkpoints.layout import COMPLETE, complete_checkpoints

INSTRUCTION = "pick up the red cube"


def raw_observation(seed=0, **changes):
    random = np.random.default_rng(seed)
    fields = {
        "images": {camera: random.integers(0, 256, (1, 24, 24, 3), dtype=np.uint8) for camera in CAMERAS},
        "state_TS": random.normal(size=(1, 8)).astype(np.float32),
        "instruction": INSTRUCTION,
    }
    return RawObservation(**{**fields, **changes})


@pytest.fixture
def checkpoint(tmp_path):
    Language.build([INSTRUCTION, "push the blue cube"], encoder="none").save(tmp_path / "language")
    folder = tmp_path / "run" / "checkpoints" / "step_000005"
    folder.mkdir(parents=True)
    policy = make_policy()
    write_policy(folder, policy, policy.state_dict(), tmp_path / "language", {"step": 5})
    (folder / COMPLETE).write_text("")
    return folder


def test_a_loaded_policy_acts_as_the_saved_one(checkpoint):
    acting = load_policy(checkpoint, device="cpu")
    noise = np.random.default_rng(0).standard_normal((2, 4, 7)).astype(np.float32)
    observations = [raw_observation(0), raw_observation(1)]
    actions = acting.act(observations, noise)
    assert actions.shape == (2, 4, 7)
    saved = make_policy().eval()
    with torch.no_grad():
        direct = saved.sample(acting._prepared(observations), torch.from_numpy(noise))
    assert np.array_equal(actions, direct.numpy())
    assert not np.array_equal(
        actions[0], acting.act([raw_observation(0, instruction="push the blue cube")], noise[:1])[0]
    )


def test_the_weights_hash_follows_the_weights(checkpoint):
    before = load_policy(checkpoint, device="cpu").weights_hash
    weights = load_file(checkpoint / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, checkpoint / "model.safetensors")
    assert load_policy(checkpoint, device="cpu").weights_hash != before


def test_the_hash_follows_what_the_weights_are_used_with(checkpoint):
    before = load_policy(checkpoint, device="cpu").weights_hash
    config = json.loads((checkpoint / "config.json").read_text())
    config["provenance"]["note"] = "nothing that acts"
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert load_policy(checkpoint, device="cpu").weights_hash == before
    config["policy"]["objective"]["solver"] = "midpoint"
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert load_policy(checkpoint, device="cpu").weights_hash != before


def test_a_device_that_is_not_there(checkpoint):
    with pytest.raises(ValueError, match="there is no device 'banana' here; there are auto, cpu"):
        load_policy(checkpoint, device="banana")


def test_only_complete_checkpoints_count(checkpoint):
    run = checkpoint.parents[1]
    assert list(complete_checkpoints(run)) == [5]
    (checkpoint / COMPLETE).unlink()
    assert complete_checkpoints(run) == {}
    with pytest.raises(DataError, match="is not a complete checkpoint"):
        load_policy(checkpoint, device="cpu")


def test_weights_that_do_not_fit_are_named(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights.pop("expert.norm.dense.bias")
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(DataError, match=r"1 missing \(first: expert\.norm\.dense\.bias\)"):
        load_policy(checkpoint, device="cpu")


def test_unknown_config_keys_are_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["policy"]["objective"]["tempo"] = 3
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"this vlatune's PolicyConfig does not know objective\.tempo; use the vlatune"):
        load_policy(checkpoint, device="cpu")


def test_config_keys_that_came_later_have_their_defaults(checkpoint):
    before = load_policy(checkpoint, device="cpu").policy.config
    config = json.loads((checkpoint / "config.json").read_text())
    del config["policy"]["gripper_weight"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert load_policy(checkpoint, device="cpu").policy.config == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"images": {"agentview": np.zeros((1, 24, 24, 3), np.uint8)}}, "the policy needs agentview, eye_in_hand"),
        ({"state_TS": np.zeros((1, 9), np.float32)}, r"the policy needs \(1, 8\)"),
    ],
)
def test_observations_that_do_not_fit_are_refused(checkpoint, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_policy(checkpoint, device="cpu").act([raw_observation(**changes)], np.zeros((1, 4, 7), np.float32))
