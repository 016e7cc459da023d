"""What a run does besides computing: mixtures, other languages, overfitting, augmentation, NaN, and stopping on request.

In this process and without DeepSpeed, which is quick; the engines have tests of their own."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from launched import rows, weights
from small_demonstrations import write_demos

from vlatune.data.augment import AugmentConfig
from vlatune.data.embed import EmbedConfig, embed
from vlatune.data.episodes import DataError
from vlatune.data.language import Language
from vlatune.data.prepare import PrepareConfig, prepare
from vlatune.policy.acting import load_policy
from vlatune.train import loop
from vlatune.train.ema import EmaConfig
from vlatune.train.recipes import load_recipe
from vlatune.train.run import train
from vlatune.train.training_data import TrainingData


@pytest.fixture
def tiny(small_cache, tmp_path):
    return replace(load_recipe("tiny"), engine="plain", cache=small_cache.path, out=tmp_path / "run")


def test_a_few_batches_over_and_over(tiny):
    """The same samples at every step, and the loss goes down further than on all of them."""
    seen = TrainingData.open(replace(tiny, overfit_batches=2), rank=0, world_size=1).batches(1, torch.device("cpu"))
    order = [next(seen).sample_index_B.tolist() for _ in range(4)]
    assert order[0] == order[2] != order[1] == order[3]
    config = replace(tiny, overfit_batches=1, num_steps=200, checkpoint_every=200, validate_every=200, log_every=20)
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=1e-2))
    train(config)
    losses = [float(row["loss"]) for row in rows(config.out)]
    assert losses[-1] < 0.5 * losses[0]
    # Measured on the same batch, with other noise: not on episodes that the policy was kept from.
    assert float(rows(config.out)[-1]["validation_loss"]) < 0.5 * losses[0]
    assert 0 < float(rows(config.out)[-1]["action_mse"]) < 0.5


def test_held_out_actions_are_measured(tiny, small_cache):
    train(tiny)
    last = rows(tiny.out)[-1]
    names = small_cache.robot.action_names
    errors = [float(last[f"action_error_{name}"]) for name in names]
    assert all(error > 0 for error in errors)
    assert float(last["action_error"]) == pytest.approx(sum(errors) / len(names), rel=1e-4)
    assert float(last["action_magnitude"]) > 0
    assert float(last["action_mse"]) > 0


def test_speed_is_measured(tiny):
    """On one rank of a CPU, whose speed nobody knows: then there is no utilisation."""
    train(tiny)
    last = {name: float(value) for name, value in rows(tiny.out)[-1].items() if value}
    assert last["samples_per_s_per_device"] == last["samples_per_s"]
    # A tiny policy's step: a million operations a sample, more or less.
    assert 1e5 < last["tflops_per_device"] * 1e12 / last["samples_per_s"] < 1e8
    assert 0.1 < last["peak_memory_gb"] < 24
    assert "mfu" not in last


def test_several_caches(tiny, small_cache, tmp_path):
    write_demos(tmp_path / "demos" / "pick_up_the_red_cube_demo.hdf5", (30, 30, 30), seed=5)
    tokenizer = str(small_cache.path / "language")
    other = prepare(PrepareConfig(demos=tmp_path / "demos", out=tmp_path / "other", image_px=16, tokenizer=tokenizer))
    config = replace(tiny, more_caches=(other,), cache_weights=(1.0, 3.0))
    data = TrainingData.open(config, rank=0, world_size=1)
    batches = data.batches(0, torch.device("cpu"))
    indices = torch.cat([next(batches).sample_index_B for _ in range(10)])
    assert (indices >= small_cache.num_frames).float().mean() == pytest.approx(0.75, abs=0.03)
    assert data.statistics.actions.count > small_cache.statistics.actions.count
    assert data.validation is not None
    train(config)
    policy = load_policy(config.out / "checkpoints" / "step_000004", device="cpu").policy
    assert policy.statistics == data.statistics


def test_another_language_than_the_caches_own(tiny, small_cache, tmp_path):
    out = embed(EmbedConfig(caches=(small_cache.path,), out=tmp_path / "language", tokenizer="trained", encoder="none"))
    config = replace(tiny, language=out)
    train(config)
    checkpoint = config.out / "checkpoints" / "step_000004"
    assert Language.load(checkpoint / "language").embedding_width is None  # the cache's own has some
    assert small_cache.language.embedding_width is not None
    partial = embed(
        EmbedConfig(caches=(_one_task(tmp_path),), out=tmp_path / "partial", tokenizer="trained", encoder="none")
    )
    with pytest.raises(DataError, match="pick up the blue cube"):
        train(replace(tiny, language=partial, out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def _one_task(folder):
    write_demos(folder / "one" / "pick_up_the_red_cube_demo.hdf5", (5, 5))
    return prepare(PrepareConfig(demos=folder / "one", out=folder / "one_cache", image_px=16, encoder="none"))


def test_augmented_pictures_change_training_and_nothing_else(tiny, tmp_path):
    changed = replace(tiny, out=tmp_path / "augmented", augment=AugmentConfig(brightness=0.5))
    train(tiny)
    train(changed)
    first, second = rows(tiny.out), rows(changed.out)
    assert first[0]["loss"] != second[0]["loss"]
    assert weights(tiny.out, 0).keys() == weights(changed.out, 0).keys()
    assert all(value.equal(weights(changed.out, 0)[name]) for name, value in weights(tiny.out, 0).items())


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(tiny, monkeypatch):
    step_of_nan = 3
    original = loop.mean_over_ranks

    def poisoned(accelerator, loss):
        calls.append(1)
        return original(accelerator, loss) * (float("nan") if len(calls) == step_of_nan else 1)

    calls: list[int] = []
    monkeypatch.setattr(loop, "mean_over_ranks", poisoned)
    config = replace(tiny, log_every=4, checkpoint_every=4, validate_every=4)
    batches = TrainingData.open(config, rank=0, world_size=1).batches(step_of_nan - 1, torch.device("cpu"))
    named = ", ".join(map(str, sorted(next(batches).sample_index_B.tolist())))
    with pytest.raises(
        RuntimeError, match=rf"the loss at step 3 is not finite; its samples are the cache's frames {named}\."
    ):
        train(config)
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == ["step_000000"]


def test_sigterm_saves_and_the_run_goes_on_as_if_undisturbed(tiny, tmp_path, monkeypatch, capsys):
    config = replace(tiny, num_steps=6, checkpoint_every=6, ema=EmaConfig(decay=0.9))
    straight = replace(config, out=tmp_path / "straight")
    train(straight)
    add_norm = loop.FiniteGuard.add_norm

    def interrupted(self, step, norm):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        add_norm(self, step, norm)

    with monkeypatch.context() as patch:
        patch.setattr(loop.FiniteGuard, "add_norm", interrupted)
        train(config)  # returns: exit code 0
    assert "stopped on request at step 3 of 6; the same command goes on" in capsys.readouterr().out
    assert not (config.out / "checkpoints" / "step_000006").exists()
    train(config)
    for name in ("model.safetensors", "ema.safetensors"):
        expected, found = weights(straight.out, 6, name), weights(config.out, 6, name)
        assert all(value.equal(found[key]) for key, value in expected.items())


def test_an_average_that_was_not_kept_is_said(tiny):
    train(tiny)
    with pytest.raises(DataError, match=r"has no ema\.safetensors: its run kept no average"):
        load_policy(tiny.out / "checkpoints" / "step_000004", device="cpu", averaged=True)


@pytest.fixture(autouse=True)
def default_signals():
    """A run listens to signals; the tests after it must not."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
