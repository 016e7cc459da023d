"""Weights are found in every layout that public checkpoints use, and what is not weights is named, never run."""

import argparse
import json
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vlatune.data.episodes import DataError
from vlatune.policy.checkpoints.weight_files import load_strict, read_weights

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.0, 2.0]).bfloat16()}


def deepspeed_state(module):
    """The entries that DeepSpeed 0.19.8 writes."""
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, tensor.shape) for name, tensor in module.items())],
        "frozen_param_shapes": None,
        "shared_params": {},
        "lr_scheduler": {"base_lrs": [1e-4], "last_epoch": 1, "lr_lambdas": [None]},
        "random_ltd": None,
        "global_steps": 1,
        "dp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "train_batch_size": "auto"},
        "ds_version": "0.19.8",
    }


def sharded(folder, stem, suffix, save):
    files = {name: f"{stem}-{number}{suffix}" for number, name in enumerate(WEIGHTS)}
    for name, file in files.items():
        save({name: WEIGHTS[name]}, folder / file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def deepspeed(folder, place):
    (folder / place).parent.mkdir(exist_ok=True)
    torch.save(deepspeed_state(WEIGHTS), folder / place)


LAYOUTS = {
    "safetensors": lambda folder: save_file(WEIGHTS, folder / "model.safetensors"),
    "sharded safetensors": lambda folder: sharded(folder, "model", ".safetensors", save_file),
    "bin": lambda folder: torch.save(WEIGHTS, folder / "pytorch_model.bin"),
    "bin of before 1.6": lambda folder: torch.save(
        WEIGHTS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    ),
    "sharded bin": lambda folder: sharded(folder, "pytorch_model", ".bin", torch.save),
    "deepspeed": lambda folder: deepspeed(folder, "mp_rank_00_model_states.pt"),
    "deepspeed in accelerate's folder": lambda folder: deepspeed(folder, "pytorch_model/mp_rank_00_model_states.pt"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors(tmp_path, layout):
    LAYOUTS[layout](tmp_path)
    weights = read_weights(tmp_path)
    assert weights.keys() == WEIGHTS.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == WEIGHTS[name].dtype
        assert torch.equal(tensor, WEIGHTS[name])


def test_a_file_can_be_named_itself(tmp_path):
    torch.save(deepspeed_state(WEIGHTS), tmp_path / "mp_rank_00_model_states.pt")
    save_file({"average": torch.ones(1)}, tmp_path / "ema.safetensors")
    assert read_weights(tmp_path / "mp_rank_00_model_states.pt").keys() == WEIGHTS.keys()
    assert read_weights(tmp_path / "ema.safetensors").keys() == {"average"}


def test_no_weights(tmp_path):
    with pytest.raises(DataError, match=r"no weights in .*; looked for model\.safetensors, .*pytorch_model\.bin"):
        read_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer .* git lfs pull"),
        (b"\0" * 40, "cannot be read as weights"),
        (b"", "cannot be read as weights"),
    ],
    ids=["pointer", "damaged", "empty"],
)
def test_what_is_not_weights_is_named(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_weights(tmp_path)


def test_a_file_cut_short_is_damaged(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save(WEIGHTS, file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DataError, match="cannot be read as weights"):
        read_weights(tmp_path)


class Opens:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("archive", [True, False])
def test_nothing_but_tensors_is_unpickled(tmp_path, archive):
    file = tmp_path / "pytorch_model.bin"
    torch.save({**WEIGHTS, "more": Opens(tmp_path / "ran")}, file, _use_new_zipfile_serialization=archive)
    with pytest.raises(DataError, match="pytorch_model.bin"):
        read_weights(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_other_objects_are_named(tmp_path):
    torch.save({"module": WEIGHTS, "args": argparse.Namespace(lr=1)}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(DataError, match=r"objects besides tensors \(argparse\.Namespace\)"):
        read_weights(tmp_path)


def test_partitioned_weights_are_refused(tmp_path):
    placeholders = {name: torch.empty(0) for name in WEIGHTS}
    torch.save(deepspeed_state(placeholders), tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(DataError, match=r"ZeRO-3 and holds no whole weights \(a\.weight is empty\); .*zero_to_fp32"):
        read_weights(tmp_path)
    (tmp_path / "mp_rank_00_model_states.pt").rename(tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(DataError, match="ZeRO-3 and holds no whole weights"):
        read_weights(tmp_path)


def test_a_trainers_state_without_a_model(tmp_path):
    torch.save({"optimizer": {}, "step": 3}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(DataError, match="has no 'module'"):
        read_weights(tmp_path)


def test_shards_that_are_missing_or_not_listed(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "shard-1.safetensors"}}))
    with pytest.raises(DataError, match=r"names the shard shard-1\.safetensors and does not have it"):
        read_weights(tmp_path)
    index.write_text("{}")
    with pytest.raises(DataError, match="does not list shards"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"), [(torch.ones(2), "but a Tensor"), ({"state": {"a": torch.ones(1)}}, "it has state")]
)
def test_tensors_must_have_names_at_the_top(tmp_path, content, sentence):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match=sentence):
        read_weights(tmp_path)


def test_strict_loading_names_what_is_wrong_and_changes_nothing(tmp_path):
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    wrong = {"0.weight": torch.ones(4, 3), "1.weight": torch.ones(5, 3), "2.weight": torch.ones(1)}
    problems = (
        r"2 missing \(first: 0\.bias\), 1 unexpected \(first: 2\.weight\), "
        r"1 of another shape \(first: 1\.weight is \(5, 3\), not \(5, 4\)\)"
    )
    with pytest.raises(DataError, match=problems):
        load_strict(module, wrong, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_loading_casts_to_the_modules_dtype_or_fills_an_empty_module(tmp_path):
    weights = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}
    half = nn.Linear(3, 2).bfloat16()
    load_strict(half, weights, tmp_path)
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.weight.float(), weights["weight"])
    empty = nn.Linear(3, 2, device="meta")
    load_strict(empty, weights, tmp_path)
    assert torch.equal(empty.weight, weights["weight"])
