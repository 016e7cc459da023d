"""Public T5s, whole and layer by layer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_text_models import write_t5

from vlatune.data.episodes import DataError
from vlatune.data.t5_by_layers import MAX_TOKENS, grouped
from vlatune.data.text_encoder import PretrainedT5, TextEncoder, build_encoder, encoder_device, load_encoder

TEXTS = ("put the red cube on the plate", "open the drawer")
IDS = [[3, 4, 5, 1], [6, 1], [3, 4, 5, 1], [*range(3, 9), 1]]


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5"), TEXTS, num_layers=3)


def as_torch_file(folder: Path, weights: dict[str, torch.Tensor], **options: object) -> None:
    """As the hub has T5-v1.1: a pickle, and the token table under both of its names."""
    (folder / "model.safetensors").unlink()
    weights = {**weights, "encoder.embed_tokens.weight": weights["shared.weight"], "lm_head.weight": torch.zeros(2)}
    torch.save(weights, folder / "pytorch_model.bin", **options)


def copied(t5: Path, folder: Path, layout: str) -> Path:
    """The same T5 in another layout of files."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(t5, folder)
    weights = load_file(folder / "model.safetensors")
    match layout:
        case "torch":
            as_torch_file(folder, weights)
        case "shards":
            (folder / "model.safetensors").unlink()
            shard_of = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(sorted(weights))}
            for shard in set(shard_of.values()):
                part = {name: tensor for name, tensor in weights.items() if shard_of[name] == shard}
                save_file(part, folder / shard, metadata={"format": "pt"})
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
        case "other table":
            weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def encoder_of(folder: Path, **options: object) -> TextEncoder:
    encoder = build_encoder(str(folder), str(folder), 9, **options)  # type: ignore[arg-type]
    assert encoder is not None
    return encoder


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["one file", "torch", "shards", "other table"])
def test_layer_by_layer_the_features_are_those_of_the_whole_model_bit_for_bit(t5, tmp_path, layout, dtype):
    folder = copied(t5, tmp_path / "t5", layout)
    whole = list(encoder_of(t5, dtype=dtype).encode_each(IDS))
    layered = list(encoder_of(folder, dtype=dtype, layer_by_layer=True).encode_each(IDS))
    assert [x.shape for x in whole] == [(4, 16), (2, 16), (4, 16), (7, 16)]
    assert whole[0].dtype == getattr(torch, dtype)
    for one, other in zip(whole, layered, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(whole[0][:2], whole[1])


def test_texts_that_are_too_many_go_in_groups(monkeypatch):
    texts = [[1] * length for length in (5, 3, 2, 9, 1)]
    monkeypatch.setattr("vlatune.data.t5_by_layers.MAX_TOKENS", 8)
    assert list(grouped(texts)) == [texts[:2], texts[2:3], texts[3:4], texts[4:]]
    assert list(grouped([])) == []
    assert MAX_TOKENS > 1000


def test_identity_says_weights_dtype_and_device_and_is_the_same_layer_by_layer(t5):
    identity = encoder_of(t5).identity
    assert (identity["dtype"], identity["device"], identity["width"]) == ("bfloat16", "cpu", 16)
    assert set(identity["files"]) == {"model.safetensors"}
    assert encoder_of(t5, layer_by_layer=True).identity == identity
    assert encoder_of(t5, dtype="float32").identity != identity
    loaded = load_encoder(identity)
    assert isinstance(loaded, PretrainedT5)
    assert torch.equal(next(loaded.encode_each(IDS)), next(encoder_of(t5).encode_each(IDS)))


def test_what_is_no_encoder(t5, tmp_path):
    with pytest.raises(DataError, match="the text encoder .* cannot be loaded .*or --encoder seeded-t5"):
        encoder_of(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DataError, match="is a bert; give a T5"):
        encoder_of(tmp_path)
    shutil.copy(t5 / "config.json", tmp_path)
    with pytest.raises(DataError, match=r"has no weights \(\*.safetensors or \*.bin\)"):
        encoder_of(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "umt5", "vocab_size": 20}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="--layer-by-layer reads T5's blocks, and .* is a umt5; leave it out"):
        encoder_of(tmp_path, layer_by_layer=True)


def test_a_tokenizer_of_another_model(t5):
    with pytest.raises(DataError, match="has 99 tokens and its text encoder 11: they are of different models"):
        build_encoder(str(t5), str(t5), 99)
    with pytest.raises(DataError, match="reads its own tokens, not those of tokenizer 'trained'; add --tokenizer"):
        build_encoder(str(t5), "trained", 9)


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_weights_that_are_missing_or_damaged(t5, tmp_path, layer_by_layer):
    from safetensors.torch import load_file, save_file

    folder = copied(t5, tmp_path / "t5", "one file")
    weights = load_file(folder / "model.safetensors")
    lost = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    save_file({n: w for n, w in weights.items() if n != lost}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=rf"the weights of .* lack .*{lost}"):
        list(encoder_of(folder, layer_by_layer=layer_by_layer).encode_each(IDS))
    save_file({**weights, lost: torch.zeros(3, 3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"have other sizes than its config\.json"):
        list(encoder_of(folder, layer_by_layer=layer_by_layer).encode_each(IDS))
    (folder / "model.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(DataError, match="cannot be (read|loaded)"):
        list(encoder_of(folder, layer_by_layer=layer_by_layer).encode_each(IDS))


def test_files_that_cannot_be_read_in_parts(t5, tmp_path):
    from safetensors.torch import load_file

    folder = copied(t5, tmp_path / "t5", "shards")
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(DataError, match="names the shard model-1.safetensors and does not have it"):
        list(encoder_of(folder, layer_by_layer=True).encode_each(IDS))
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(DataError, match="does not list shards"):
        list(encoder_of(folder, layer_by_layer=True).encode_each(IDS))
    folder = copied(t5, tmp_path / "old", "one file")
    as_torch_file(folder, load_file(folder / "model.safetensors"), _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match="is no archive of torch 1.6 or later"):
        list(encoder_of(folder, layer_by_layer=True).encode_each(IDS))


def test_a_cuda_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert encoder_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device is cuda, and this machine has no CUDA device"):
        encoder_device("cuda")


def test_ranks_take_the_launchers_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert encoder_device("auto") == torch.device("cuda", 3)
    assert encoder_device("cpu") == torch.device("cpu")


PEAK = """
import sys, torch
from vlatune.data.text_encoder import build_encoder

def memory_mb(kind):
    return int(next(line for line in open("/proc/self/status") if line.startswith(kind)).split()[1]) / 1024

def encode(folder):
    list(build_encoder(folder, folder, 9, layer_by_layer=sys.argv[1] == "layers").encode_each([[3, 4, 5, 1]]))

encode(sys.argv[2])  # imports everything
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
before = memory_mb("VmRSS")
encode(sys.argv[3])
print(memory_mb("VmHWM") - before)
"""


@pytest.mark.slow
def test_layer_by_layer_one_block_is_in_memory(t5, tmp_path):
    """24 blocks of 4.7 M parameters: 432 MiB in float32, of which one block is 18 while it is read, and 9 in bfloat16."""
    from safetensors.torch import save_file
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=32, d_model=768, d_kv=64, d_ff=1024, num_layers=24, num_heads=12, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        model = T5EncoderModel(config)
    config.save_pretrained(tmp_path)
    weights = {
        n: torch.full(w.shape, 0.01) for n, w in model.state_dict().items() if n != "encoder.embed_tokens.weight"
    }
    block_mb = sum(w.nbytes for n, w in weights.items() if n.startswith("encoder.block.1.")) / 2**20
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # Freed memory goes back at once, as it does for blocks of the XXL's size without being told.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    peak_mb = {}
    for mode in ("whole", "layers"):
        finished = subprocess.run(
            [sys.executable, "-c", PEAK, mode, str(t5), str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        peak_mb[mode] = float(finished.stdout.splitlines()[-1])
    print(f"a block has {block_mb:.1f} MB in float32; more memory: {peak_mb}")
    assert peak_mb["whole"] > 24 * block_mb / 2
    assert peak_mb["layers"] < 3 * block_mb + 20  # the file's pages, their bfloat16, and room
