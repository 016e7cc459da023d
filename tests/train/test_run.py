"""Training for real: the deepspeed launcher, two ranks over gloo, checkpoints and an exact resume."""

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from launched import rows, train, weights
from small_demonstrations import write_demos

from vlatune.data.episodes import DataError
from vlatune.data.prepare import PrepareConfig, prepare
from vlatune.policy.acting import load_policy
from vlatune.train.checkpoint import refuse_other_settings, store_config
from vlatune.train.recipes import load_recipe
from vlatune.train.run import main
from vlatune.train.training_data import TrainingData


@pytest.fixture(scope="module")
def straight(small_cache, tmp_path_factory):
    """Four steps without a stop, on two ranks."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    train(small_cache.path, run)
    return run


def test_two_steps_and_two_more_equal_four(small_cache, straight, tmp_path):
    resumed = tmp_path / "resumed"
    train(small_cache.path, resumed, "--stop-at-step", "2")
    assert not (resumed / "checkpoints" / "step_000004").exists()
    assert "resuming" in train(small_cache.path, resumed)
    expected, found = weights(straight), weights(resumed)
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)
    numbers = [(row["step"], row["loss"], row["validation_loss"], row["grad_norm"]) for row in rows(straight)]
    assert numbers == [(row["step"], row["loss"], row["validation_loss"], row["grad_norm"]) for row in rows(resumed)]
    assert [row["step"] for row in rows(resumed)] == ["1", "2", "3", "4"]


def test_a_half_written_checkpoint_is_never_resumed_from(small_cache, straight, tmp_path):
    run = tmp_path / "killed"
    shutil.copytree(straight, run)
    (run / "checkpoints" / "step_000004" / "COMPLETE").unlink()
    shutil.copytree(run / "checkpoints" / "step_000002", run / "checkpoints" / ".step_000003.partial")
    # Step 2's trainer state was pruned when step 4 came, so the only start left is the beginning; and from there on a new
    # checkpoint can be resumed from, although a later one lies there without trainer state.
    assert "resuming" not in train(small_cache.path, run, "--stop-at-step", "1")
    assert "resuming" in (output := train(small_cache.path, run)) and "at step 1" in output
    expected, found = weights(straight), weights(run)
    assert all(expected[name].equal(found[name]) for name in expected)


def test_one_rank_accumulating_computes_what_two_ranks_do(small_cache, straight, tmp_path):
    single = tmp_path / "single"
    train(small_cache.path, single, "--num-accumulation-steps", "2", num_ranks=1)
    for row, other in zip(rows(straight), rows(single), strict=True):
        assert float(row["grad_norm"]) == pytest.approx(float(other["grad_norm"]), rel=1e-5)
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)


def test_without_deepspeed_one_process_computes_what_two_zero2_ranks_do(small_cache, straight, tmp_path):
    command = [
        sys.executable,
        "-m",
        "vlatune.train.run",
        "tiny",
        "--cache",
        small_cache.path,
        "--out",
        tmp_path / "plain",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*map(str, command), "--engine", "plain"], env=environment, check=True)
    for row, other in zip(rows(straight), rows(tmp_path / "plain"), strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-4)
        assert float(row["grad_norm"]) == pytest.approx(float(other["grad_norm"]), rel=1e-4)


def test_bf16_stays_near_float32(small_cache, straight, tmp_path):
    train(small_cache.path, tmp_path / "bf16", "--precision", "bf16")
    for row, other in zip(rows(straight), rows(tmp_path / "bf16"), strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=0.03)
    assert weights(tmp_path / "bf16")["expert.action_out_proj.weight"].dtype == torch.bfloat16
    assert load_policy(tmp_path / "bf16" / "checkpoints" / "step_000004", device="cpu").weights_hash


def test_the_run_folder_says_what_was_run(straight):
    config = json.loads((straight / "config.json").read_text())
    assert config["num_steps"] == 4
    assert config["world_size"] == 2
    assert config["resolved_precision"] == "fp32"
    checkpoints = sorted(path.name for path in (straight / "checkpoints").iterdir())
    assert checkpoints == ["step_000000", "step_000002", "step_000004"]
    assert [path.parent.name for path in straight.glob("checkpoints/*/trainer")] == ["step_000004"]
    untrained, trained = weights(straight, 0), weights(straight)
    assert not untrained["expert.action_out_proj.weight"].equal(trained["expert.action_out_proj.weight"])
    assert any((straight / "tensorboard").iterdir())
    (start,) = [json.loads(line) for line in (straight / "starts.jsonl").read_text().splitlines()]
    assert "--cache" in start["command"]
    assert (start["first_step"], start["num_ranks"]) == (0, 2)
    assert start["versions"]["torch"] == importlib.metadata.version("torch")


def test_few_validation_episodes_make_a_smaller_batch_and_none_make_none(small_cache, tmp_path):
    tiny = load_recipe("tiny")

    def validation(cache):
        config = dataclasses.replace(tiny, cache=cache, batch_size=1000)
        return TrainingData.open(config, rank=0, world_size=1).validation

    loader = validation(small_cache.path)
    assert loader.config.batch_size == loader.num_samples > 0
    write_demos(tmp_path / "pick_up_the_red_cube_demo.hdf5")
    without = prepare(PrepareConfig(demos=tmp_path, out=tmp_path / "cache", image_px=16, validation_share=0.0))
    assert validation(without) is None


def test_a_run_with_other_settings_is_not_overwritten(tmp_path):
    old = {"seed": 0, "policy": {"horizon": 4}, "log_every": 1}
    refuse_other_settings(tmp_path, old)
    store_config(tmp_path, old)
    refuse_other_settings(tmp_path, {**old, "log_every": 7})
    # A setting that the run's version did not have yet.
    refuse_other_settings(tmp_path, {**old, "compile": False})
    with pytest.raises(DataError, match=r"other settings: compile was False, now True"):
        refuse_other_settings(tmp_path, {**old, "compile": True})
    with pytest.raises(DataError, match=r"other settings: policy\.horizon was 4, now 8\. Type --out"):
        refuse_other_settings(tmp_path, {**old, "policy": {"horizon": 8}})


def test_a_run_without_steps_is_refused():
    with pytest.raises(ValueError, match="num_steps is 0; it must be at least 1"):
        dataclasses.replace(load_recipe("tiny"), num_steps=0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pocet"], "did you mean 'pocket'"),
        (["tiny", "--batch-size", "3", "--num-accumulation-steps", "2"], "--batch-size 3 does not divide"),
        (["tiny", "--cache", "nowhere"], "it is not a cache; make one with `vlatune prepare"),
        (["tiny", "--policy.backbone.vision.image-px", "32"], "prepare with --image-px 32"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_written(small_cache, tmp_path, arguments, sentence):
    cache = [] if "--cache" in arguments or arguments[0] != "tiny" else ["--cache", str(small_cache.path)]
    out = ["--out", str(tmp_path / "run")] if arguments[0] == "tiny" else []
    with pytest.raises((ValueError, DataError), match=sentence):
        main([*arguments, *cache, *out])
    assert not (tmp_path / "run").exists()
