"""Every preset and every golden checkpoint, in graphs for batches of 1, 3 and 8, with all cameras and with one: minutes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from preset_policies import CAMERAS
from small_exports import observations, write_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers

from vlatune.data.normalise import FieldStatistics, Statistics
from vlatune.data.raw_observation import RawObservation
from vlatune.policy.acting import load_policy
from vlatune.policy.checkpoints.public import PublicOptions
from vlatune.policy.export.command import ExportConfig, export
from vlatune.policy.export.graph_inputs import observation_of
from vlatune.policy.export.onnx_policy import OnnxPolicy
from vlatune.policy.objectives.shortcut import Shortcut
from vlatune.policy.presets import PRESETS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-4
WORDS = [
    "<pad>",
    "</s>",
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


def assert_acts_alike(plain, onnx, seen, noise):
    ours, exported = plain.act(seen, noise), onnx.act(seen, noise)
    assert np.abs(ours).max() > 0.1  # within 1e-4 of nothing would say nothing
    np.testing.assert_allclose(exported, ours, rtol=0, atol=TOLERANCE)


def noise_of(plain, number):
    return np.random.default_rng(1).standard_normal((number, *plain.noise_shape), dtype=np.float32)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_in_every_bucket(preset, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", preset)
    sets = (",".join(CAMERAS), CAMERAS[1])
    out = tmp_path / "out"
    description = export(ExportConfig(checkpoint=checkpoint, out=out, batch_sizes=(1, 3, 8), camera_sets=sets))
    assert len(description.graphs) == 6
    plain, onnx = load_policy(checkpoint, device="cpu"), OnnxPolicy(out)
    for number in (1, 3, 8, 11):
        seen, noise = observations(plain.policy.config, number), noise_of(plain, number)
        assert_acts_alike(plain, onnx, seen, noise)

        prepared = onnx.prepared([replace(raw, images={CAMERAS[1]: raw.images[CAMERAS[1]]}) for raw in seen])
        with torch.inference_mode():
            observation = observation_of({name: torch.from_numpy(value) for name, value in prepared.items()})
            ours = plain.policy.sample(observation, torch.from_numpy(noise)).numpy()
        np.testing.assert_allclose(onnx.sample(prepared, noise), ours, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_second_level_goes_through_every_expert(preset, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", preset, objective=Shortcut(num_sampling_steps=4))
    export(ExportConfig(checkpoint=checkpoint, out=tmp_path / "out", batch_sizes=(2,)))
    plain, onnx = load_policy(checkpoint, device="cpu"), OnnxPolicy(tmp_path / "out")
    assert_acts_alike(plain, onnx, observations(plain.policy.config, 2), noise_of(plain, 2))
    steps = Shortcut(num_sampling_steps=1)
    one = onnx.act(observations(plain.policy.config, 2), noise_of(plain, 2), objective=steps)
    ours = plain.with_sampling_steps(1).act(observations(plain.policy.config, 2), noise_of(plain, 2))
    np.testing.assert_allclose(one, ours, rtol=0, atol=TOLERANCE)


def write_encoders(folder: Path) -> None:
    """A word tokenizer with a T5 of RDT's golden width, and a SigLIP."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>")
    fast.save_pretrained(folder / "t5")
    torch.manual_seed(0)
    sizes = {"d_model": 40, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(WORDS), **sizes)).save_pretrained(folder / "t5")
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    both = transformers.SiglipConfig(
        vision_config={**vision, "image_size": 42, "patch_size": 14}, text_config=sizes_of_text()
    )
    transformers.SiglipModel(both).save_pretrained(folder / "siglip")


def sizes_of_text() -> dict[str, int]:
    return {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def field(size: int) -> FieldStatistics:
    spread = tuple(float(i + 1) for i in range(size))
    low = tuple(-value for value in spread)
    return FieldStatistics(mean=(0.5,) * size, std=spread, min=low, max=spread, q01=low, q99=spread, count=9)


@pytest.mark.parametrize("name", ["pi0", "pi05", "smolvla", "rdt"])
def test_golden_checkpoints(name, tmp_path):
    write_encoders(tmp_path)
    Statistics(state=field(8), actions=field(7)).save(tmp_path / "normalisation.json")
    slots = {"state_slots": tuple(range(8)), "action_slots": tuple(range(7))} if name == "rdt" else {}
    public = PublicOptions(
        tokenizer=str(tmp_path / "t5"),
        vision=str(tmp_path / "siglip"),
        statistics=tmp_path / "normalisation.json",
        cameras=("front", "wrist"),
        **slots,
    )
    out = tmp_path / "out"
    settings = ExportConfig(checkpoint=GOLDEN / name, out=out, batch_sizes=(1, 3), public=public)
    with pytest.raises(
        ValueError, match=r"names no instructions.* give --prompt-tokens \('pick up the bowl' has \d+\)"
    ):
        export(settings)
    export(replace(settings, prompt_tokens=(32,)))
    plain, onnx = load_policy(GOLDEN / name, device="cpu", public=public), OnnxPolicy(out)
    random = np.random.default_rng(0)
    times = len(plain.observation_offsets)
    seen = [
        RawObservation(
            images={camera: random.integers(0, 256, (times, 40, 48, 3), dtype=np.uint8) for camera in plain.cameras},
            state_TS=random.normal(size=(times, 8)).astype(np.float32),
            instruction=instruction,
        )
        for instruction in ("pick up the bowl", "pick up", "the bowl the bowl the bowl") * 3
    ][:8]
    for number in (1, 3, 8):
        assert_acts_alike(plain, onnx, seen[:number], noise_of(plain, number))
