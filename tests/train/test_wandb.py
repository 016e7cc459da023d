"""W&B by a flag: TensorBoard's numbers in one W&B run, with every step once, whatever was killed and resumed between."""

import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
from launched import rows

from vlatune.data.episodes import DataError
from vlatune.train.loop import Interruption
from vlatune.train.recipes import load_recipe
from vlatune.train.run import train
from vlatune.train.tracking import Tracker


@pytest.fixture
def tiny(small_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(Interruption, "__init__", lambda self: setattr(self, "asked", False))  # no signal handlers
    return replace(
        load_recipe("tiny"), engine="plain", cache=small_cache.path, out=tmp_path / "run", num_steps=6, wandb="vla"
    )


class Killed(Exception):
    pass


def train_with_a_kill(config, monkeypatch, between=lambda: None) -> None:
    """Killed after step 3 was logged and before the checkpoint of step 4: step 3 is computed twice."""
    log = Tracker.log

    def killed(tracker, step, values):
        log(tracker, step, values)
        if step == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", killed)
        with pytest.raises(Killed):
            train(config)
    between()
    train(config)


class StandIn(ModuleType):
    """As much of wandb as is used; `online`, it knows on resuming what it was sent."""

    class Error(Exception):
        pass

    def __init__(self, *, online: bool) -> None:
        super().__init__("wandb")
        self.online = online
        self.begun: list[dict] = []
        self.sent: list[tuple[int, dict]] = []
        self.refusal = ""

    def init(self, **settings):
        if self.refusal:
            raise self.Error(self.refusal)
        self.begun.append(settings)
        next_step = self.sent[-1][0] + 1 if self.online and self.sent else 0
        return SimpleNamespace(starting_step=next_step, log=self.log, finish=lambda: None)

    def log(self, values, *, step):
        self.sent.append((step, values))


@pytest.mark.parametrize("online", [True, False])
def test_one_wandb_run_has_every_step_once(tiny, monkeypatch, online):
    wandb = StandIn(online=online)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train_with_a_kill(tiny, monkeypatch)
    first, second = wandb.begun
    assert first["id"] == second["id"] and (first["project"], first["name"]) == ("vla", "run")
    assert first["config"]["num_steps"] == 6 and first["resume"] == "allow"
    assert [step for step, _ in wandb.sent] == [1, 2, 3, 4, 5, 6]
    for row, (_, values) in zip(rows(tiny.out), wandb.sent, strict=True):
        assert float(row["loss"]) == pytest.approx(values["train/loss"], rel=1e-5)
        assert bool(row["validation_loss"]) == ("train/validation_loss" in values)


def test_bad_input_is_one_sentence_before_training(tiny, monkeypatch):
    wandb = StandIn(online=True)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"--wandb vla needs a package .*; type: pip install 'wandb>=0\.19', or leave"):
        train(tiny)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    wandb.refusal = "api_key not configured (no-tty).\ncall wandb.login()"
    with pytest.raises(
        DataError, match=r"W&B refuses the run \(api_key not configured \(no-tty\)\); type `wandb login`"
    ):
        train(tiny)
    assert not rows_exist(tiny)
    wandb.refusal = ""
    train(replace(tiny, stop_at_step=1))
    with pytest.raises(DataError, match="is in W&B's project 'vla'; type --wandb vla"):
        train(replace(tiny, wandb="another"))


def rows_exist(config) -> bool:
    return (config.out / "metrics.csv").exists()


def test_a_row_that_was_never_finished_is_no_row(tiny):
    config = replace(tiny, wandb=None, stop_at_step=4)
    train(config)
    metrics = config.out / "metrics.csv"
    metrics.write_text(metrics.read_text() + "5,0.12")
    train(replace(config, stop_at_step=None))
    assert [row["step"] for row in rows(config.out)] == ["1", "2", "3", "4", "5", "6"]
    metrics.write_text(metrics.read_text() + "1")  # of 12
    train(config)
    assert [row["step"] for row in rows(config.out)] == ["1", "2", "3", "4", "5", "6"]


def test_by_wandb_itself_without_a_network(tiny, monkeypatch):
    """Where the package is installed."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sent = []
    log = wandb.Run.log

    def heard(run, values, *, step):
        sent.append((run.id, step))
        log(run, values, step=step)

    monkeypatch.setattr(wandb.Run, "log", heard)
    train_with_a_kill(tiny, monkeypatch, between=wandb.finish)  # as the end of the killed process would
    known = json.loads((tiny.out / "wandb_run.json").read_text())
    assert sent == [(known["id"], step) for step in range(1, 7)]
    files = list((tiny.out / "wandb").glob(f"offline-run-*-{known['id']}/run-{known['id']}.wandb"))
    assert len(files) == 2  # what `wandb sync` uploads, of both starts
