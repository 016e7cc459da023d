"""What is trained: the rest stays as it was, is not saved again, and comes back with every checkpoint."""

import csv
import json
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file

from vlatune.data.episodes import DataError
from vlatune.policy.acting import load_policy
from vlatune.policy.objectives.rs_imle import RSIMLE
from vlatune.train.recipes import load_recipe
from vlatune.train.run import main
from vlatune.train.run import train as run_training

SETTINGS = ("--engine", "plain", "--num-steps", "2", "--checkpoint-every", "1", "--lora.rank", "2")


def train(cache, out, *settings):
    main(["tiny", "--cache", str(cache.path), "--out", str(out), *SETTINGS, *settings])
    return out / "checkpoints"


def weights(checkpoint):
    return {name: tensor.clone() for name, tensor in load_policy(checkpoint, device="cpu").policy.state_dict().items()}


@pytest.mark.parametrize("trained", ["full", "vision_frozen", "expert", "lora"])
def test_only_what_is_trained_moves_and_is_saved(trained, small_cache, tmp_path):
    checkpoints = train(small_cache, tmp_path / "run", "--trained", trained)
    first, last = weights(checkpoints / "step_000000"), weights(checkpoints / "step_000002")
    assert first.keys() == last.keys()
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    saved = load_file(checkpoints / "step_000002" / "model.safetensors").keys()
    match trained:
        case "full":
            assert saved == first.keys()
            assert any(name.startswith("backbone.vision_tower.") for name in moved)
        case "vision_frozen":
            assert not any(name.startswith("backbone.vision_tower.") for name in moved | saved)
            assert any(name.startswith("backbone.language_model.") for name in moved)
        case "expert":
            assert all(name.startswith("expert.") for name in moved | saved)
            assert {name for name in first if name.startswith("expert.")} == set(saved)
        case "lora":
            assert not saved
            assert moved
            assert all(name.endswith("_proj.weight") for name in moved)
    assert moved <= set(saved) or trained == "lora"
    assert (checkpoints / "step_000002" / "base.json").exists() == (trained != "full")
    hashes = {load_policy(checkpoints / f"step_00000{step}", device="cpu").weights_hash for step in (0, 1, 2)}
    assert len(hashes) == 3


def test_adapters_are_pefts_and_the_base_must_be_there_unaltered(small_cache, tmp_path):
    checkpoints = train(small_cache, tmp_path / "run", "--trained", "lora")
    last = checkpoints / "step_000002"
    base = load_policy(checkpoints / "step_000000", device="cpu").policy
    merged = peft.PeftModel.from_pretrained(base, str(last / "adapter")).merge_and_unload()
    ours = load_policy(last, device="cpu").policy.state_dict()
    assert all(torch.allclose(tensor, ours[name], atol=1e-6) for name, tensor in merged.state_dict().items())

    reference = json.loads((last / "base.json").read_text())
    (last / "base.json").write_text(json.dumps({**reference, "sha256": "0" * 64}))
    with pytest.raises(DataError, match="its sha256 is not the recorded one"):
        load_policy(last, device="cpu")
    (last / "base.json").write_text(json.dumps(reference))
    (checkpoints / "step_000000" / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(DataError, match="which is not there; keep the run's checkpoints together"):
        load_policy(last, device="cpu")


def test_a_killed_lora_run_goes_on_and_ends_where_it_would_have(small_cache, tmp_path):
    straight = train(small_cache, tmp_path / "straight", "--trained", "lora")
    halted = train(small_cache, tmp_path / "halted", "--trained", "lora", "--stop-at-step", "1")
    assert not (halted / "step_000002").exists()
    train(small_cache, tmp_path / "halted", "--trained", "lora")
    ours, theirs = (weights(run / "step_000002") for run in (straight, halted))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_cannot_be_adapted_is_refused(small_cache, tmp_path):
    with pytest.raises(ValueError, match=r"lora\.expert is 'cross_attn', and a gemma has"):
        train(small_cache, tmp_path / "run", "--trained", "lora", "--lora.expert", "cross_attn")


def test_an_objectives_metrics_are_columns_of_the_runs_csv(small_cache, tmp_path):
    out = tmp_path / "run"
    script = replace(load_recipe("tiny"), cache=small_cache.path, out=out, engine="plain")
    policy = replace(script.policy, objective=RSIMLE(num_candidates=3))
    run_training(replace(script, policy=policy, num_steps=3, stop_at_step=2, log_every=1))
    run_training(replace(script, policy=policy, num_steps=3, log_every=1))
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert all(0 <= float(row["rejection_rate"]) <= 1 for row in rows)
    assert all(float(row["mean_nearest_distance"]) > 0 for row in rows)
