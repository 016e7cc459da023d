"""A public checkpoint into ours and back gives the same tensors; a policy trained here runs as LeRobot's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from preset_policies import make_policy
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlatune.data.batch import RawObservation
from vlatune.data.episodes import DataError
from vlatune.data.normalise import FieldStatistics, Statistics
from vlatune.policy.acting import load_policy
from vlatune.policy.checkpoints.lerobot import write_lerobot
from vlatune.policy.checkpoints.public import PublicOptions, read_public
from vlatune.policy.checkpoints.renaming import RDT
from vlatune.policy.convert import ConvertConfig, convert
from vlatune.policy.lora import LoraConfig, add_adapters, save_adapter
from vlatune.policy.objectives.flow import Flow

GOLDEN = Path(__file__).parents[1] / "golden"
DEAD_HEADS = ("lm_head.weight",)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A public tokenizer's folder, as AutoTokenizer reads it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = [
        "<pad>",
        "<unk>",
        "pick",
        "up",
        "the",
        "bowl",
        "Task",
        "State",
        "Action",
        ":",
        ",",
        ";",
        *map(str, range(256)),
    ]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def statistics(tmp_path):
    def field(size):
        spread = tuple(float(i + 1) for i in range(size))
        low = tuple(-value for value in spread)
        return FieldStatistics(mean=(0.5,) * size, std=spread, min=low, max=spread, q01=low, q99=spread, count=9)

    file = tmp_path / "normalisation.json"
    Statistics(state=field(8), actions=field(7)).save(file)
    return file


def options(tokenizer, statistics, **changes):
    return PublicOptions(tokenizer=tokenizer, statistics=statistics, cameras=("front", "wrist"), **changes)


def observation(px=40, seed=0):
    random = np.random.default_rng(seed)
    return RawObservation(
        images={camera: random.integers(0, 256, (1, px, px + 8, 3), dtype=np.uint8) for camera in ("front", "wrist")},
        state_TS=random.normal(size=(1, 8)).astype(np.float32),
        instruction="pick up the bowl",
    )


@pytest.mark.parametrize("name", ["pi0", "pi05", "smolvla"])
def test_round_trip_of_every_tensor(name, tokenizer, statistics, tmp_path):
    ours, back = tmp_path / "ours", tmp_path / "back"
    convert(ConvertConfig(source=GOLDEN / name, out=ours, to="vlatune", public=options(tokenizer, statistics)))
    convert(ConvertConfig(source=ours, out=back, to="lerobot"))
    reference, returned = (load_file(folder / "model.safetensors") for folder in (GOLDEN / name, back))
    assert returned.keys() == reference.keys()
    for weight, tensor in reference.items():
        # Nothing reads the vocabulary heads: they come back tied, or empty.
        if not weight.endswith(DEAD_HEADS):
            assert torch.equal(returned[weight], tensor), weight
        assert returned[weight].shape == tensor.shape

    modes = {folder: json.loads((folder / "config.json").read_text()) for folder in (ours, back)}
    expected = "quantile" if name == "pi05" else "mean_std"  # the checkpoint's, though the statistics are ours
    assert modes[ours]["policy"]["state_normalisation"] == modes[ours]["policy"]["action_normalisation"] == expected
    assert modes[back]["normalization_mapping"]["ACTION"] == {"quantile": "QUANTILES", "mean_std": "MEAN_STD"}[expected]

    noise = np.random.default_rng(1).standard_normal((1, 10, 32)).astype(np.float32)
    acted = [
        load_policy(folder, device="cpu", public=PublicOptions(tokenizer=tokenizer)).act([seen], noise)
        for folder, seen in ((ours, observation()), (back, _renamed(observation())))
    ]
    np.testing.assert_allclose(acted[0], acted[1], atol=1e-4)


def _renamed(raw):
    return replace(raw, images={f"observation.images.{camera}": image for camera, image in raw.images.items()})


def test_rdt_comes_back_from_ours(tmp_path):
    """LeRobot has no RDT: its own names are what it goes back to."""
    checkpoint = read_public(GOLDEN / "rdt")
    reference = load_file(GOLDEN / "rdt" / "model.safetensors")
    returned = RDT.theirs(checkpoint.weights)
    assert returned.keys() == reference.keys()
    assert all(torch.equal(returned[name], tensor) for name, tensor in reference.items())


def test_acting_is_in_raw_units_with_the_prompt_and_the_cameras_of_the_checkpoint(tokenizer, statistics):
    acting = load_policy(GOLDEN / "pi05", device="cpu", public=options(tokenizer, statistics))
    assert acting.cameras == ("front", "wrist")
    assert (acting.horizon, acting.action_dim, acting.noise_shape) == (10, 7, (10, 32))
    noise = np.random.default_rng(0).standard_normal((1, 10, 32)).astype(np.float32)
    reference = acting.act([observation()], noise)
    assert reference.shape == (1, 10, 7)
    assert np.array_equal(acting.act(observation(), noise), reference[0])
    assert acting.act(observation()).shape == (10, 7)  # draws its noise
    assert not np.array_equal(acting.act([observation(seed=1)], noise), reference)
    # The state speaks through the prompt alone.
    other_state = replace(observation(), state_TS=observation().state_TS + 2)
    assert not np.array_equal(acting.act([other_state], noise), reference)
    stateless = load_policy(GOLDEN / "pi05", device="cpu", public=options(tokenizer, statistics, prompt="newline"))
    assert np.array_equal(stateless.act([other_state], noise), stateless.act([observation()], noise))


def test_a_fine_tuned_rdt_acts_with_its_encoders_named(statistics, tmp_path):
    """Its DeepSpeed checkpoint beside a small SigLIP and a small T5."""
    torch.manual_seed(0)
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = transformers.SiglipConfig(vision_config={**vision, "image_size": 42, "patch_size": 14}, text_config=text)
    transformers.SiglipModel(siglip).save_pretrained(tmp_path / "siglip")
    t5 = tmp_path / "t5"
    transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=300, d_model=40, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).save_pretrained(t5)
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "pick", "up", "the", "bowl"])}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>").save_pretrained(t5)
    engine = tmp_path / "rdt" / "checkpoint-1" / "pytorch_model"
    engine.mkdir(parents=True)
    torch.save({"module": load_file(GOLDEN / "rdt" / "model.safetensors")}, engine / "mp_rank_00_model_states.pt")
    public = PublicOptions(
        tokenizer=str(t5),
        vision=str(tmp_path / "siglip"),
        statistics=statistics,
        cameras=("front", "wrist"),
        state_slots=(0, 1, 2, 3, 4, 5, 6, 10),
        action_slots=(39, 40, 41, 42, 43, 44, 10),
    )
    acting = load_policy(engine.parent, device="cpu", public=public)
    seen = replace(
        observation(),
        images={camera: np.concatenate([image, image]) for camera, image in observation().images.items()},
        state_TS=np.concatenate([observation().state_TS] * 2),
    )
    noise = np.random.default_rng(0).standard_normal((1, *acting.noise_shape)).astype(np.float32)
    assert acting.act([seen], noise).shape == (1, 16, 7)
    other = replace(seen, instruction="the bowl")
    assert not np.array_equal(acting.act([seen], noise), acting.act([other], noise))
    with pytest.raises(DataError, match="--statistics, and --codec or --state-slots and --action-slots"):
        load_policy(engine.parent, public=replace(public, statistics=None))


def test_what_a_public_checkpoint_does_not_say_is_asked_for(tokenizer, statistics, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it retries for most of a minute
    with pytest.raises(DataError, match="--statistics"):
        load_policy(GOLDEN / "pi05", public=PublicOptions(tokenizer=tokenizer, cameras=("front",)))
    with pytest.raises(DataError, match="--cameras"):
        load_policy(GOLDEN / "pi05", public=PublicOptions(tokenizer=tokenizer, statistics=statistics))
    with pytest.raises(DataError, match="no tokenizer 'google/paligemma-3b-pt-224' can be loaded"):
        load_policy(GOLDEN / "pi05", public=PublicOptions(statistics=statistics, cameras=("front",)))
    with pytest.raises(DataError, match="there is nothing at"):
        load_policy(GOLDEN / "pi06")


def test_an_adapter_is_merged_on_the_way(tokenizer, statistics, tmp_path):
    plain, merged, adapter = tmp_path / "plain", tmp_path / "merged", tmp_path / "adapter"
    public = options(tokenizer, statistics)
    convert(ConvertConfig(source=GOLDEN / "pi05", out=plain, to="vlatune", public=public))
    acting = load_policy(plain, device="cpu")
    noise = np.random.default_rng(0).standard_normal((1, 10, 32)).astype(np.float32)
    before = acting.act([observation()], noise)
    add_adapters(acting.policy, LoraConfig(rank=2))
    with torch.no_grad():
        for name, parameter in acting.policy.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    adapted = acting.act([observation()], noise)
    save_adapter(acting.policy, acting.policy.state_dict(), adapter)
    convert(ConvertConfig(source=plain, out=merged, to="lerobot", adapter=adapter))
    back = load_policy(merged, device="cpu", public=PublicOptions(tokenizer=tokenizer))
    np.testing.assert_allclose(back.act([_renamed(observation())], noise), adapted, atol=1e-3)
    assert np.abs(adapted - before).max() > 0.01


def test_what_lerobot_lacks_is_refused(tokenizer, statistics, tmp_path):
    tmp_path = tmp_path / "out"
    for name, sentence in {
        "clip_flow": "a mlp expert on a clip backbone",
        "rdt": "a dit expert on a siglip_t5 backbone",
    }.items():
        with pytest.raises(DataError, match=sentence):
            write_lerobot(tmp_path, make_policy(name), tokenizer=tokenizer)
    pi05 = make_policy("pi05")
    with pytest.raises(DataError, match="trained on its own instructions"):
        write_lerobot(tmp_path, pi05, tokenizer=None)
    stateless = make_policy(replace(pi05.config, prompt="newline"))
    with pytest.raises(DataError, match="its prompt is 'newline' where LeRobot's pi05 has 'pi05'"):
        write_lerobot(tmp_path, stateless, tokenizer=tokenizer)
    actions = make_policy(replace(pi05.config, objective=Flow(prediction="sample")))
    with pytest.raises(DataError, match="its expert predicts actions, LeRobot's velocities"):
        write_lerobot(tmp_path, actions, tokenizer=tokenizer)
    (tmp_path).mkdir()
    with pytest.raises(DataError, match="exists; give a new folder"):
        convert(ConvertConfig(source=GOLDEN / "pi05", out=tmp_path, to="vlatune"))


def test_the_command(tokenizer, statistics, tmp_path, capsys):
    from vlatune.launch.cli import main

    words = ["convert", str(GOLDEN / "pi05"), str(tmp_path / "ours"), "--to", "vlatune", "--tokenizer", tokenizer]
    main([*words, "--statistics", str(statistics), "--cameras", "front", "wrist", "--orientation", "rot180"])
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["embodiment"]["image_rule"]["orientation"] == "rot180"
    assert config["embodiment"]["image_rule"]["resize"] == "torch_bilinear"
    assert config["embodiment"]["cameras"] == ["front", "wrist"]
    assert config["policy"]["prompt"] == "pi05"
    assert "in the layout of vlatune" in capsys.readouterr().out
