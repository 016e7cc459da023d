"""The four commands and `collect`, one after the other, for real: simulator, cache, DeepSpeed, sweep, report."""

import os
import pathlib
import subprocess
import sys

import pytest
from launched import free_port

from vlatune.eval import results

pytestmark = [pytest.mark.slow, pytest.mark.sim, pytest.mark.timeout(3600)]  # two minutes on two quiet cores
BIN = pathlib.Path(sys.executable).parent


def run(*command: object, folder: pathlib.Path) -> str:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    words = [str(word) for word in command]
    finished = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_from_nothing_to_a_report(tmp_path):
    run("vlatune", "collect", "--out", "demos", "--episodes", 2, "--noise", 0.3, folder=tmp_path)
    run("vlatune", "prepare", "demos", "--out", "cache", "--image-px", 64, folder=tmp_path)
    train = ["--module", "vlatune.train.run", "pocket", "--cache", "cache", "--out", "runs/pocket", "--num-steps", 2]
    run("deepspeed", "--num_accelerators", 2, "--master_port", free_port(), *train, folder=tmp_path)
    sweep = [
        "--selection-episodes",
        1,
        "--report-episodes",
        1,
        "--tasks",
        0,
        2,
        "--controls",
        "--baselines",
        "scripted",
    ]
    run("vlatune", "sweep", "runs/pocket", *sweep, folder=tmp_path)
    run("vlatune", "report", "runs/pocket", folder=tmp_path)

    evaluation = tmp_path / "runs" / "pocket" / "evaluation"
    episodes = results.read(evaluation)
    assert len(episodes) == 2 + 2 * 5  # two of the one checkpoint, then policy, three controls and the expert
    assert episodes.outcome.isin(["success", "failure"]).all()
    assert episodes[episodes.actor == "scripted"].success.all()
    assert not episodes[episodes.actor == "untrained"].success.any()
    assert all((evaluation / video).stat().st_size > 1000 for video in episodes.video if video)
    page = (evaluation / "report" / "index.html").read_text()
    assert "step_000002" in page
    assert (evaluation / "summary.csv").exists()

    # Started again, nothing is run twice.
    run("vlatune", "sweep", "runs/pocket", *sweep, folder=tmp_path)
    assert results.read(evaluation).equals(episodes)
