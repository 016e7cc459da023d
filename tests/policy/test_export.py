"""An exported policy acts as its checkpoint does, within 1e-4, and what cannot be exported is refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_exports import INSTRUCTIONS, observations, write_checkpoint

from vlatune.data.episodes import DataError
from vlatune.policy.acting import load_policy
from vlatune.policy.export import command
from vlatune.policy.export.check import differences
from vlatune.policy.export.command import ExportConfig, export
from vlatune.policy.export.description import Description
from vlatune.policy.export.graph_inputs import named_inputs, observation_of
from vlatune.policy.export.onnx_policy import OnnxPolicy
from vlatune.policy.objectives.diffusion import Diffusion
from vlatune.policy.objectives.flow import Flow
from vlatune.policy.objectives.one_step import OneStep
from vlatune.policy.objectives.regression import Regression
from vlatune.policy.objectives.rs_imle import RSIMLE

TOLERANCE = 1e-4
SETTINGS = {
    "pi05": {"batch_sizes": (3,)},
    "smolvla": {"batch_sizes": (3,)},
    "clip_flow": {"batch_sizes": (3,), "camera_sets": ("agentview,eye_in_hand", "agentview")},
}


class Exported:
    """A checkpoint, and what was exported of it."""

    def __init__(self, folder: Path, preset: str, changes=None, **settings) -> None:
        self.checkpoint = write_checkpoint(folder / "checkpoint", preset, **(changes or {}))
        self.folder = folder / "exported"
        export(ExportConfig(checkpoint=self.checkpoint, out=self.folder, **settings))
        self.plain = load_policy(self.checkpoint, device="cpu")
        self.onnx = OnnxPolicy(self.folder)

    def noise(self, number: int, seed: int = 1) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((number, *self.plain.noise_shape), dtype=np.float32)

    def seen(self, number: int, seed: int = 0):
        return observations(self.plain.policy.config, number, seed=seed)

    def assert_acts_alike(self, numbers=(1, 3, 8)) -> None:
        for number in numbers:
            ours = self.plain.act(self.seen(number), self.noise(number))
            exported = self.onnx.act(self.seen(number), self.noise(number))
            assert exported.dtype == np.float32
            np.testing.assert_allclose(exported, ours, rtol=0, atol=TOLERANCE)

    def assert_alike(self, prepared, objective=None) -> None:
        """Of inputs that are prepared already."""
        number = len(prepared["state"])
        with torch.inference_mode():
            observation = observation_of({name: torch.from_numpy(value) for name, value in prepared.items()})
            ours = self.plain.policy.sample(observation, torch.from_numpy(self.noise(number)), objective)
        exported = self.onnx.sample(prepared, self.noise(number), objective=objective)
        np.testing.assert_allclose(exported, ours.numpy(), rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """preset -> its export, made once."""
    known: dict[str, Exported] = {}

    def make(preset: str) -> Exported:
        if preset not in known:
            known[preset] = Exported(tmp_path_factory.mktemp(preset), preset, **SETTINGS[preset])
        return known[preset]

    return make


@pytest.mark.parametrize("preset", SETTINGS)
def test_acts_as_the_checkpoint(preset, made):
    exported = made(preset)
    onnx, plain = exported.onnx, exported.plain
    exported.assert_acts_alike()
    one, noise = exported.seen(1)[0], exported.noise(1)
    chunk = onnx.act(one, noise)
    assert np.array_equal(chunk, onnx.act([one], noise)[0])
    assert onnx.act(one).shape == (plain.horizon, plain.action_dim)  # draws its noise
    # It reads all of them: equal answers would not be for lack of reading.
    others = {
        "instruction": replace(one, instruction=INSTRUCTIONS[1]),
        "state": replace(one, state_TS=one.state_TS + 1),
        "pictures": exported.seen(1, seed=5)[0],
    }
    for name, other in others.items():
        assert np.abs(onnx.act(other, noise) - chunk).max() > 1e-3, name
    for name in ("cameras", "image_rule", "robot", "observation_offsets", "weights_hash", "horizon", "action_dim"):
        assert getattr(onnx, name) == getattr(plain, name), name
    assert onnx.noise_shape == plain.noise_shape


@pytest.mark.parametrize("preset", SETTINGS)
def test_a_camera_is_missing_in_one_row(preset, made):
    exported = made(preset)
    prepared = exported.onnx.prepared(exported.seen(3))
    whole = exported.onnx.sample(prepared, exported.noise(3))
    prepared["image_mask.eye_in_hand"][1] = False
    exported.assert_alike(prepared)
    without = exported.onnx.sample(prepared, exported.noise(3))
    assert np.array_equal(without[[0, 2]], whole[[0, 2]])
    assert not np.array_equal(without[1], whole[1])


def test_a_camera_is_absent(made):
    exported = made("clip_flow")
    seen = [replace(raw, images={"agentview": raw.images["agentview"]}) for raw in exported.seen(3)]
    prepared = exported.onnx.prepared(seen)
    assert not any("eye_in_hand" in name for name in prepared)
    exported.assert_alike(prepared)
    with pytest.raises(ValueError, match="has cameras eye_in_hand, and the export has graphs for .* --camera-sets"):
        exported.onnx.act([replace(raw, images={"eye_in_hand": raw.images["eye_in_hand"]}) for raw in exported.seen(1)])


def test_before_an_episodes_start_nothing_is_seen(made):
    exported = made("pi05")
    seen = [replace(exported.seen(1)[0], there_T=np.zeros(1, dtype=bool))]
    np.testing.assert_allclose(
        exported.onnx.act(seen, exported.noise(1)), exported.plain.act(seen, exported.noise(1)), rtol=0, atol=TOLERANCE
    )


OBJECTIVES = {
    "more steps": Flow(num_sampling_steps=17),
    "midpoint": Flow(solver="midpoint", num_sampling_steps=3),
    "heun": Flow(solver="heun", num_sampling_steps=3),
    "clean actions": Flow(prediction="sample"),
    "one step": OneStep(),
    "regression": Regression(),
    "aligned regression": Regression(output="aligned"),
    "rs_imle": RSIMLE(),
    "diffusion": Diffusion(),
    "ddim": Diffusion(sampler="ddim"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_objective_samples_with_the_step_graph(name, made):
    exported = made("clip_flow")
    exported.assert_alike(exported.onnx.prepared(exported.seen(2)), OBJECTIVES[name])


def test_graphs_share_one_copy_of_the_weights(made):
    exported = made("clip_flow")
    assert len(exported.onnx.description.graphs) == 2
    stored = sum(4 * parameter.numel() for parameter in exported.plain.policy.parameters())
    weights = (exported.folder / "weights.bin").stat().st_size
    assert 0.9 * stored < weights < 1.3 * stored  # little ones stay in the graphs; offsets are multiples of a page
    assert not (exported.folder.parent / "exported.unfinished").exists()


def test_differences_are_measured_and_written(made):
    exported = made("pi05")
    (graphs,) = exported.onnx.description.graphs
    assert 0 < graphs.differences.largest < 1e-5
    assert Description.read(exported.folder) == exported.onnx.description


def test_weights_that_were_altered_show(made, tmp_path, monkeypatch):
    exported = made("pi05")
    altered = tmp_path / "altered"
    shutil.copytree(exported.folder, altered)
    content = np.fromfile(altered / "weights.bin", np.float32)
    content[:] += 1e-3
    content.tofile(altered / "weights.bin")
    onnx = OnnxPolicy(altered)
    (graphs,) = onnx.description.graphs
    with torch.no_grad():
        found = differences(exported.plain.policy, onnx, graphs, INSTRUCTIONS)
    assert min(found.prefix, found.output, found.actions) > TOLERANCE

    def badly(folder, policy, buckets):
        shutil.copytree(altered, folder, dirs_exist_ok=True)
        return onnx.description.graphs

    monkeypatch.setattr(command, "write_graphs", badly)
    with pytest.raises(
        ValueError, match=r"batch 3, \d+ prompt tokens, .* differ from torch by .*; nothing was written"
    ):
        export(ExportConfig(checkpoint=exported.checkpoint, out=tmp_path / "out", **SETTINGS["pi05"]))
    assert list(tmp_path.iterdir()) == [altered]


IN_NUMPY = """
import json, sys
from pathlib import Path
import numpy as np, onnxruntime

folder, given = Path(sys.argv[1]), dict(np.load(sys.argv[2]))
noise, expected = given.pop("noise"), given.pop("expected")

# With nothing but what export.json says.
said = json.loads((folder / "export.json").read_text())
(graphs,) = said["graphs"]
prefix, step = (onnxruntime.InferenceSession(folder / graphs[name]["file"]) for name in ("prefix", "step"))
names = [tensor["name"] for tensor in graphs["prefix"]["outputs"]]
encoded = dict(zip(names, prefix.run(names, {t["name"]: given[t["name"]] for t in graphs["prefix"]["inputs"]})))
x = noise
for level in said["noise_levels"]:
    levels = np.full(len(x), level, np.float32)
    x = x - step.run(None, {**encoded, "noisy_actions": x, "noise_level": levels})[0] / len(said["noise_levels"])
reading = said["actions"]
actions = x[..., reading["slots"]] * np.float32(reading["scaling"]["scale"]) + np.float32(reading["scaling"]["centre"])
np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-4)
assert "torch" not in sys.modules

# With ours, but none of the policy's modules.
from vlatune.policy.export.onnx_policy import OnnxPolicy

np.testing.assert_allclose(OnnxPolicy(folder).sample(given, noise), expected, rtol=0, atol=1e-4)
loaded = [name for name in sys.modules if name.startswith(("vlatune.policy.backbones", "vlatune.policy.policy", "transformers"))]
assert not loaded, loaded
"""


def test_another_process_needs_none_of_the_policys_modules(made, tmp_path):
    exported = made("pi05")
    (graphs,) = exported.onnx.description.graphs
    prepared = named_inputs(exported.plain._prepared(exported.seen(3)))
    lacking = graphs.bucket.prompt_tokens - prepared["prompt_ids"].shape[1]
    for name in ("prompt_ids", "prompt_mask"):
        prepared[name] = torch.nn.functional.pad(prepared[name], (0, lacking))
    noise = exported.noise(3)
    arrays = {name: tensor.numpy() for name, tensor in prepared.items()}
    np.savez(tmp_path / "given.npz", noise=noise, expected=exported.plain.act(exported.seen(3), noise), **arrays)
    command_line = [sys.executable, "-c", IN_NUMPY, str(exported.folder), str(tmp_path / "given.npz")]
    done = subprocess.run(command_line, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_does_not_fit_is_refused_before_anything_is_written(made, tmp_path):
    checkpoint, out = made("clip_flow").checkpoint, tmp_path / "out"
    for settings, sentence in (
        ({"batch_sizes": (0,)}, "--batch-sizes is 0; give numbers from 1"),
        ({"camera_sets": ("agentview,wrist",)}, "no camera 'wrist'; it has agentview, eye_in_hand"),
        ({"prompt_tokens": (1,)}, r"--prompt-tokens 1: the shortest prompt of this checkpoint can have \d+ tokens"),
    ):
        with pytest.raises(ValueError, match=sentence):
            export(ExportConfig(checkpoint=checkpoint, out=out, **settings))
    with pytest.raises(DataError, match="exists; give a new folder"):
        export(ExportConfig(checkpoint=checkpoint, out=tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(made, tmp_path, monkeypatch):
    exported = made("clip_flow")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ValueError, match="onnxruntime, which is not installed; type: pip install onnx onnxscript onnxruntime"
    ):
        export(ExportConfig(checkpoint=exported.checkpoint, out=tmp_path / "out"))
    with pytest.raises(ValueError, match="onnxruntime, which is not installed"):
        OnnxPolicy(exported.folder)


def test_observations_that_do_not_fit_are_refused(made):
    onnx, seen = made("pi05").onnx, made("pi05").seen(1)[0]
    with pytest.raises(ValueError, match=r"state is \(1, 9\), the policy needs \(1, 8\)"):
        onnx.act(replace(seen, state_TS=np.zeros((1, 9), np.float32)))
    with pytest.raises(
        ValueError, match=r"longest prompt has \d+ tokens, and the export's graphs read \d+; .* --prompt-tokens"
    ):
        onnx.act(replace(seen, instruction="a " * 200))
    (graphs,) = onnx.description.graphs
    bound = onnx.bound(graphs, onnx.prefix(graphs, onnx.prepared([seen])))
    with pytest.raises(ValueError, match="samples one chunk an observation"):
        bound.fan_out(4)


def test_folders_that_are_no_export_are_refused(made, tmp_path):
    with pytest.raises(DataError, match=r"no export\.json in .*; give a folder that `vlatune export"):
        OnnxPolicy(tmp_path)
    with pytest.raises(ValueError, match="has no FastProvider here; it has .*CPUExecutionProvider"):
        OnnxPolicy(made("pi05").folder, providers=["FastProvider"])
    broken = tmp_path / "broken"
    shutil.copytree(made("pi05").folder, broken)
    (broken / "weights.bin").unlink()
    with pytest.raises(DataError, match=r"prefix_0\.onnx cannot be loaded .*; copy the whole folder again"):
        OnnxPolicy(broken).act(made("pi05").seen(1))
    said = json.loads((broken / "export.json").read_text())
    (broken / "export.json").write_text(json.dumps({**said, "format_version": 2}))
    with pytest.raises(
        DataError, match="format_version.*; use the vlatune that wrote it, or export the checkpoint again"
    ):
        OnnxPolicy(broken)


def test_the_command_says_what_it_measured(made, tmp_path, monkeypatch, capsys):
    exported = made("pi05")
    monkeypatch.setattr(command, "export", lambda config: Description.read(exported.folder))
    command.main([str(exported.checkpoint), str(tmp_path / "out"), "--batch-sizes", "3"])
    printed = capsys.readouterr().out
    assert "largest difference from torch" in printed
    assert f"out: 2 graphs of {exported.checkpoint}" in printed
