"""A sweep that evaluates checkpoints as training writes them."""

import json
import shutil
import threading
from functools import partial

import fake_point_world
import fake_policy
import pytest

from vlatune.data.episodes import DataError
from vlatune.eval import run_sweep
from vlatune.eval.results import read
from vlatune.eval.sweep import SweepConfig, sweep


def test_checkpoints_are_evaluated_as_they_come_and_the_choice_waits_for_the_last(tmp_path, monkeypatch):
    source = fake_policy.write_run(tmp_path / "source" / "demo", {100: 0.9, 200: 0.5, 300: 0.2})
    run = tmp_path / "demo"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"num_steps": 200, "then": [{"num_steps": 100}]}))
    monkeypatch.setattr(run_sweep, "POLL_S", 0.05)
    seen = []

    def train() -> None:
        """One checkpoint more whenever the last one has been evaluated."""
        for step in (100, 200, 300):
            assert not (run / "evaluation" / "chosen.json").exists()
            unfinished = run / "checkpoints" / f".step_{step:06d}"
            shutil.copytree(source / "checkpoints" / f"step_{step:06d}", unfinished)
            unfinished.rename(run / "checkpoints" / f"step_{step:06d}")
            while step < 300 and not (
                (run / "evaluation" / "episodes.csv").exists() and (read(run)["step"] == step).sum() == 6
            ):
                stopped.wait(0.02)
            seen.append(step)

    stopped = threading.Event()
    trainer = threading.Thread(target=train, daemon=True)
    trainer.start()
    sweep(
        SweepConfig(runs=(run,), watch=True, selection_episodes=2, report_episodes=1, videos=0, num_workers=1),
        make_benchmark=partial(fake_point_world.make, None),
        load_policy=fake_policy.load_policy,
    )
    trainer.join(10)
    assert seen == [100, 200, 300]
    chosen = json.loads((run / "evaluation" / "chosen.json").read_text())
    assert (chosen["checkpoint"], chosen["num_candidates"]) == ("step_000100", 3)


def test_a_folder_that_does_not_say_when_training_ends(tmp_path):
    run = fake_policy.write_run(tmp_path / "demo", {100: 0.5})  # its config.json is no run's
    with pytest.raises(DataError, match=r"nothing tells when it ends; sweep without --watch"):
        sweep(SweepConfig(runs=(run,), watch=True), make_benchmark=fake_point_world.make)
