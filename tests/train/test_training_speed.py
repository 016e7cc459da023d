"""tests/bench/training_speed.py runs, on the project's own loop, and goes on where it was stopped."""

import csv
import importlib
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from step_clock import StepClock
from synthetic_training import random_batch

SCRIPT = pathlib.Path(__file__).parents[1] / "bench" / "training_speed.py"


def measure(out: pathlib.Path, *settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--size", "tiny", "--out", str(out), *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def rows(out: pathlib.Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "results.csv").open()))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute on two quiet cores
def test_two_variants_are_measured_once(tmp_path):
    steps = ("--num-steps", "3", "--num-warmup-steps", "1", "--models", "smolvla")
    both = ("--variants", "full-plain", "expert8-zero2-checkpointed")
    first = measure(tmp_path, *steps, *both, "--micro-batches", "1", "3")
    assert first.returncode == 0, first.stderr
    found = {(row["variant"], row["micro_batch"]): row for row in rows(tmp_path)}
    assert set(found) == {(variant, size) for variant in both[1:] for size in "13"}
    for (variant, size), row in found.items():
        assert row["outcome"] == "measured", first.stderr
        assert float(row["samples_per_s"]) == pytest.approx(1e3 * int(size) / float(row["step_ms"]), rel=1e-3)
        shares = [float(row[f"{phase}_share"]) for phase in ("forward", "backward", "optimizer")]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert all(share > 0 for share in shares)
        is_full = variant.startswith("full")
        assert (int(row["num_trained"]) > 0.5 * int(row["num_parameters"])) == is_full
        rate = float(row["samples_per_s"]) * float(row["tflop_per_sample"])
        assert float(row["model_tflops_per_s"]) == pytest.approx(rate, rel=1e-3)
    # Eight draws through the expert and no backward pass through the backbone, against one draw and both.
    assert found[both[1], "1"]["tflop_per_sample"] != found[both[2], "1"]["tflop_per_sample"]
    assert not list(tmp_path.glob("**/*.safetensors"))

    second = measure(tmp_path, *steps, *both[:2], "--micro-batches", "1", "2", "3")
    assert second.returncode == 0, second.stderr
    assert "micro-batch 2:" in second.stdout
    assert "micro-batch 1:" not in second.stdout
    kept = {(row["variant"], row["micro_batch"]): row for row in rows(tmp_path)}
    assert {key: kept[key] for key in found} == found
    assert f"| SmolVLA (tiny) | full-plain | 2 | {float(kept[both[1], '2']['samples_per_s']):.3g} |" in second.stdout


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("training_speed")


def test_a_variant_ends_where_the_memory_does(script, tmp_path, monkeypatch):
    def spent(policy, size, device):
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return random_batch(policy, size, device)

    monkeypatch.setattr(script, "random_batch", spent)
    monkeypatch.setenv("MASTER_PORT", "29555")  # not one that stays in this process's environment
    options = script.Options(
        out=tmp_path, size="tiny", models=("smolvla",), micro_batches=(1, 2, 4), num_steps=1, num_warmup_steps=1
    )
    script.measure(options, "smolvla", "full-plain")
    found = [(row["micro_batch"], row["outcome"], row["samples_per_s"] != "") for row in rows(tmp_path)]
    assert found == [("1", "measured", True), ("2", "out of memory", False)]
    assert script.sizes_left(options, "smolvla", "full-plain") == []
    assert script.sizes_left(options, "smolvla", "full-zero1") == [1, 2, 4]
    assert "| SmolVLA (tiny) | full-plain | 2 | out of memory |" in script.markdown(script.results(options))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("--variants", "full-zero4"), "there is no variant 'full-zero4'; did you mean 'full-zero"),
        (("--models", "pi06"), "there is no model 'pi06'; did you mean 'pi05'"),
    ],
)
def test_a_name_that_is_none(script, tmp_path, monkeypatch, settings, sentence):
    monkeypatch.setattr(sys, "argv", ["training_speed.py", "--out", str(tmp_path), *settings])
    with pytest.raises(ValueError, match=sentence):
        script.main()


def test_numbers_that_make_no_sense(script, tmp_path):
    with pytest.raises(ValueError, match="--micro-batches is 8 4; give growing numbers from 1 on"):
        script.Options(out=tmp_path, micro_batches=(8, 4))
    with pytest.raises(ValueError, match="--num-steps and --num-warmup-steps must be at least 1"):
        script.Options(out=tmp_path, num_steps=0)


def test_a_clock_gives_each_phase_its_time():
    clock = StepClock(torch.device("cpu"))
    clock.steps = [
        {"forward": 0.0, "backward": 9.0, "optimizer": 9.5},  # skipped
        {"forward": 10.0, "backward": 11.0, "optimizer": 13.0},
        {"forward": 16.0, "backward": 18.0, "optimizer": 18.5},
        {"forward": 19.0},
    ]
    assert clock.seconds(skipped=1) == {
        "step": [6.0, 3.0],
        "forward": [1.0, 2.0],
        "backward": [2.0, 0.5],
        "optimizer": [3.0, 0.5],
    }
