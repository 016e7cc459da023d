"""Every measurement that BENCHMARKS.md names runs, with settings that take seconds."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pretended_gpu import needs_pretended_gpu, pretended_gpu

BENCH = Path(__file__).parent / "bench"
SMALL = {
    "draws_cost": "",
    "export_speed": "--num-calls 1",
    "loader_speed": "--frames 500 --num-rounds 1 --num-batches 1 --growth 500",
    "picture_transport": "--repeats 3",
    "policy_cost": "smolvla --num-rounds 1",
    "prepare_speed": "--share 0.01",
    "repeated_prompts": "--repeats 1 --batch-size 4",
    "serving_latency": "--num-decisions 3 --clients 1 --seconds 0.2",
    "simulator_cost": "--num-steps 3",
    "text_encoding_cost": "",
}
SMALL_ON_LIBERO = {
    "evaluation_throughput": "--tasks 0 --episodes 1 --max-steps 10 --image-px 128 --workers 1",
    "libero_expert": "--tasks 0 --number 1",
}
TESTED_APART = {"acting_latency", "training_speed"}


def run(name: str, options: str) -> str:
    path = f"{Path(__file__).parent / 'support'}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, BENCH / f"{name}.py", *options.split()]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_none_is_left_out():
    assert {path.stem for path in BENCH.glob("*.py")} == SMALL.keys() | SMALL_ON_LIBERO.keys() | TESTED_APART


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name):
    assert re.search(r"\d", run(name, SMALL[name])), "it gives numbers"


@pytest.mark.libero
@pytest.mark.parametrize("name", SMALL_ON_LIBERO)
def test_it_runs_on_libero(name):
    assert re.search(r"\d", run(name, SMALL_ON_LIBERO[name]))


@pytest.mark.slow
def test_decisions_are_timed():
    table = run("acting_latency", "--size tiny --policies pi05 --horizons 4 --repeats 1")
    assert [line.count("compiled") for line in table.splitlines()].count(1) == 4, "four objectives"


@needs_pretended_gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["pi05", "smolvla", "rdt"])
def test_decisions_are_timed_on_a_gpu(name, monkeypatch, capsys):
    """On the one that is played there are no kernels to count, and no backward passes, which real-time chunking takes."""
    monkeypatch.syspath_prepend(BENCH)
    script = importlib.import_module("acting_latency")
    monkeypatch.setattr(script, "real_time_chunking", lambda *_: None)
    monkeypatch.setattr(script, "num_kernels", lambda call: call() is not None)
    settings = ["--precision", "bfloat16", "--horizons", "4", "--repeats", "1"]
    monkeypatch.setattr(
        sys, "argv", ["acting_latency.py", "--size", "tiny", "--device", "cuda", "--policies", name, *settings]
    )
    with pretended_gpu(monkeypatch) as gpu:
        script.main()
    table = capsys.readouterr().out
    assert table.count("compiled") == 4 and "weights GB/s" in table
    assert len(gpu.graphs) == 4 + 3, "four objectives' decisions, and three parts of one"
