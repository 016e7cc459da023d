"""Recorded outputs of the reference implementations, through the loader that a user's checkpoint takes; and that the comparison
can fail."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlatune.data.episodes import DataError
from vlatune.policy import parity
from vlatune.policy.checkpoints.public import read_public
from vlatune.policy.experts.gemma import BoundGemmaExpert
from vlatune.policy.objectives.flow import Flow

GOLDEN = Path(__file__).parents[1] / "golden"
OUTPUTS = {
    "pi0": {"loss", "sample1", "sample10"},
    "pi05": {"loss", "sample1", "sample10"},
    "smolvla": {"loss", "sample1", "sample10"},
    "rdt": {"loss", "sample5"},
    "unet": {"output"},
}
A_NORM = {
    "pi0": "model.paligemma_with_expert.gemma_expert.model.layers.1.input_layernorm.weight",
    "pi05": "model.paligemma_with_expert.paligemma.model.language_model.layers.1.input_layernorm.weight",
    "smolvla": "model.vlm_with_expert.lm_expert.layers.1.post_attention_layernorm.weight",
    "rdt": "model.blocks.1.norm2.weight",
    "unet": "down_modules.1.0.blocks.0.block.1.weight",
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_agrees_with_the_reference(name):
    differences = parity.compare(GOLDEN / name)
    assert differences.keys() == OUTPUTS[name]
    assert max(differences.values()) < 1e-5, differences


@pytest.mark.parametrize("name", OUTPUTS)
def test_bfloat16_agrees_within_its_eight_bits(name):
    differences = parity.compare(GOLDEN / name, dtype=torch.bfloat16)
    assert max(differences.values()) < 0.05, differences


def altered(name, folder, change):
    """A copy of a golden checkpoint whose weights went through `change`."""
    shutil.copytree(GOLDEN / name, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_perturbed_norm_shows(name, tmp_path):
    def perturb(weights):
        weights[A_NORM[name]][0] += 0.5

    differences = parity.compare(altered(name, tmp_path / "copy", perturb))
    # RDT's recorded loss is one mean over 128 dimensions and all steps: there it shows least.
    assert max(differences.values()) > 1e-3, differences


def pi05():
    io = load_file(GOLDEN / "pi05" / "io.safetensors")
    policy = parity.policy_for_recording(read_public(GOLDEN / "pi05"), io)
    with torch.no_grad():
        return policy.bind(parity.recorded_observation(io)), io


@torch.no_grad()
def test_a_causal_mask_shows_where_it_is_bidirectional():
    bound, io = pi05()

    class Causal(BoundGemmaExpert):
        """Every action sees the prefix and the actions up to itself."""

        def through_layers(self, x_BND, condition_BD):
            steps = []
            keys_values = self
            for step in range(x_BND.shape[1]):
                out, own = BoundGemmaExpert.through_layers(keys_values, x_BND[:, step : step + 1], condition_BD)
                steps.append(out)
                mask = torch.cat([keys_values.mask_BP, torch.ones_like(keys_values.mask_BP[:, :1])], 1)
                seen = tuple(
                    (torch.cat([k, own_k], 2), torch.cat([v, own_v], 2))
                    for (k, v), (own_k, own_v) in zip(keys_values.layers_kv, own, strict=True)
                )
                keys_values = BoundGemmaExpert(self.expert, mask, seen)
            return torch.cat(steps, 1), []

    causal = Causal(bound.expert, bound.mask_BP, bound.layers_kv)
    assert parity.relative_difference(Flow().sample(causal, io["noise"]), io["sample10"]) > 1e-2


@torch.no_grad()
def test_the_noise_direction_and_the_masks_show():
    bound, io = pi05()
    flipped = Flow().sample(lambda x, level: bound(x, 1 - level), io["noise"])
    assert parity.relative_difference(flipped, io["sample10"]) > 1e-2
    everything = BoundGemmaExpert(bound.expert, torch.ones_like(bound.mask_BP), bound.layers_kv)
    assert parity.relative_difference(Flow().sample(everything, io["noise"]), io["sample10"]) > 1e-2


@pytest.mark.parametrize("name", ["pi0", "pi05", "smolvla"])
def test_other_spellings_of_the_same_checkpoint(name, tmp_path):
    """Without `model.`, compiled, with the tower's shorter path, and with a tied head in place of the token table."""

    def respell(weights):
        for old in list(weights):
            new = old.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")
            weights[new] = weights.pop(old)
        table = next(key for key in weights if key.endswith("embed_tokens.weight"))
        head = next(key for key in weights if key.endswith("lm_head.weight") and "expert.lm" not in key)
        weights[head] = weights.pop(table)

    def compiled(weights):
        for old in list(weights):
            weights[old.replace("model.", "model._orig_mod.", 1)] = weights.pop(old)

    for i, change in enumerate((respell, compiled)):
        differences = parity.compare(altered(name, tmp_path / str(i), change))
        assert max(differences.values()) < 1e-5, differences


def openpi_copy(name, folder):
    """As openpi's converter writes it: other config, no `model.`."""

    def unprefixed(weights):
        for old in list(weights):
            weights[old.removeprefix("model.")] = weights.pop(old)

    altered(name, folder, unprefixed)
    config = {
        "action_dim": 32,
        "action_horizon": 10,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_openpis_converted_checkpoints(name, tmp_path):
    folder = openpi_copy(name, tmp_path / "checkpoint")
    # Its config does not say the (tiny) image size: sizes.json does.
    assert max(parity.compare(folder).values()) < 1e-5
    assert read_public(folder).config.prompt == ("pi05" if name == "pi05" else "newline")


def test_rdt_as_a_bfloat16_bin_and_as_a_deepspeed_checkpoint(tmp_path):
    source = GOLDEN / "rdt"
    weights = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    as_bin = tmp_path / "bin"
    as_bin.mkdir()
    torch.save(weights, as_bin / "pytorch_model.bin")
    run = tmp_path / "run"
    engine = run / "checkpoint-100" / "pytorch_model"
    engine.mkdir(parents=True)
    state = {"module": weights, "optimizer": None, "lr_scheduler": None, "global_steps": 100, "ds_version": "0.19.8"}
    torch.save(state, engine / "mp_rank_00_model_states.pt")
    for folder in (as_bin, run):
        shutil.copy(source / "config.json", folder)
    for folder in (as_bin, engine.parent):
        shutil.copy(source / "io.safetensors", folder)
    io = load_file(source / "io.safetensors")
    rounded = {name: tensor.float() for name, tensor in weights.items()}
    exact = tmp_path / "exact"
    shutil.copytree(source, exact)
    save_file(rounded, exact / "model.safetensors")
    reference = parity.compare(exact)
    for folder in (as_bin, engine.parent):
        # The weights lost bits, the arithmetic did not: equal to the same rounded weights in safetensors.
        assert parity.compare(folder) == reference
        assert max(reference.values()) < 0.02
    assert io["loss"].ndim == 0


def test_an_rdt_without_its_config_is_read_from_its_weights(tmp_path):
    shutil.copy(GOLDEN / "rdt" / "model.safetensors", tmp_path)
    config = read_public(tmp_path).config
    known = read_public(GOLDEN / "rdt").config
    assert config.expert.norm_kind == "timm103"
    assert replace(config.expert, norm_kind="rms") == known.expert
    assert config.horizon == known.horizon == 16


@pytest.mark.parametrize("name", ["pi05", "smolvla", "rdt"])
def test_a_checkpoint_that_lacks_adds_or_reshapes_a_weight_is_refused(name, tmp_path):
    norm = A_NORM[name]
    cases = {
        "missing": (lambda weights: weights.pop(norm), rf"1 missing \(first: [\w.]*{norm.split('.', 4)[-1]}\)"),
        "more": (lambda weights: weights.update(extra=torch.zeros(2)), r"the first is extra"),
        "shape": (
            lambda weights: weights.update({norm: torch.zeros(3)}),
            r"1 of another shape \(first: .* is \(3,\), not",
        ),
    }
    for case, (change, sentence) in cases.items():
        with pytest.raises(DataError, match=sentence):
            parity.compare(altered(name, tmp_path / case, change))


def test_the_command_prints_each_output_and_fails_above_the_tolerance(tmp_path, capsys):
    parity.main([str(GOLDEN / "rdt")])
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == ["loss", "sample5"]
    assert "ok" in printed
    with pytest.raises(SystemExit, match="1"):
        parity.main([str(GOLDEN / "rdt"), "--tolerance", "1e-12"])
    with pytest.raises(DataError, match=r"no io\.safetensors"):
        parity.main([str(tmp_path)])
