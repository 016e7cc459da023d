"""A run of two stages: another trained set, another objective, a fresh optimizer, and a resume that lands in the right one."""

import signal
from dataclasses import replace

import pytest
from launched import rows, run, weights

from vlatune.policy.acting import load_policy
from vlatune.policy.checkpoints.folder import ADAPTER, BASE
from vlatune.train.config import Stage
from vlatune.train.recipes import load_recipe
from vlatune.train.run import train
from vlatune.train.stages import stage_at

EXPERT, BACKBONE = "expert.action_out_proj.weight", "backbone.language_model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module", params=["plain", pytest.param("zero2", marks=pytest.mark.slow)])
def train_until(request, small_cache):
    """Train the two stages into a folder, up to a step: in this process, or through the launcher on two ranks."""
    config = replace(load_recipe("tiny_stages"), cache=small_cache.path, engine=request.param, checkpoint_every=1)

    def train_until(out, step: int | None = None) -> None:
        if request.param == "plain":
            handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
            train(replace(config, out=out, stop_at_step=step))
            for number, handler in handlers.items():
                signal.signal(number, handler)
            return
        arguments = ["tiny_stages", "--cache", str(small_cache.path), "--out", str(out), "--checkpoint-every", "1"]
        run("vlatune.train.run", *arguments, *(() if step is None else ("--stop-at-step", str(step))))

    return train_until


@pytest.fixture(scope="module")
def straight(train_until, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "straight"
    train_until(out)
    return out


def folder(out, step):
    return out / "checkpoints" / f"step_{step:06d}"


def test_each_stage_trains_what_it_says(straight):
    assert [row["step"] for row in rows(straight)] == ["1", "2", "3", "4"]
    first, boundary = weights(straight, 0), weights(straight, 2)
    assert not boundary[EXPERT].equal(first[EXPERT])
    assert boundary[BACKBONE].equal(first[BACKBONE])
    assert not (folder(straight, 2) / BASE).exists()  # a boundary is whole: the next stage stands on it
    last = folder(straight, 4)
    assert "step_000002" in (last / BASE).read_text()
    assert (last / ADAPTER / "adapter_model.safetensors").exists()
    assert not any(name.startswith("backbone.") for name in weights(straight, 4))
    acting = load_policy(last, device="cpu").policy
    assert not acting.state_dict()[BACKBONE].equal(boundary[BACKBONE])  # the adapter, merged
    assert acting.config.objective.type == "rs_imle"
    assert load_policy(folder(straight, 2), device="cpu").policy.config.objective.type == "flow"


def test_schedules_are_the_stages_own(straight):
    first, second = load_recipe("tiny_stages").stages
    rates = [float(row["learning_rate"]) for row in rows(straight)]
    assert rates[2] == pytest.approx(second.stage.optimizer.learning_rate / 2)  # of a warm-up of one step
    assert rates[0] == pytest.approx(first.stage.optimizer.learning_rate / 3)


@pytest.mark.parametrize("stopped_at", [2, 3])
def test_a_resumed_run_lands_in_the_right_stage(train_until, straight, tmp_path, stopped_at):
    out = tmp_path / "resumed"
    train_until(out, stopped_at)
    assert not folder(out, 4).exists()
    train_until(out)
    for step in (2, 4):
        expected, found = weights(straight, step), weights(out, step)
        assert expected.keys() == found.keys()
        assert all(expected[name].equal(found[name]) for name in expected)
    adapters = [folder(path, 4) / ADAPTER / "adapter_model.safetensors" for path in (straight, out)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_the_stage_of_a_step():
    stages = load_recipe("tiny_stages").stages
    assert [stage_at(stages, step) for step in range(5)] == [0, 0, 1, 1, 1]
    three = replace(load_recipe("tiny_stages"), then=(Stage(num_steps=3), Stage(num_steps=1)))
    assert [(planned.first_step, planned.last_step) for planned in three.stages] == [(0, 2), (2, 5), (5, 6)]
    assert three.total_steps == 6
