"""A grid: read as the command line is, trained run after run in processes of their own, and continued where it was stopped."""

import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest
import torch
from launched import rows, weights

from vlatune.data.episodes import DataError
from vlatune.policy.checkpoints.layout import complete_checkpoints
from vlatune.train import grid
from vlatune.train.grid_plan import plan_grid, setting_names
from vlatune.train.grid_process import why_it_ended
from vlatune.train.recipes import load_recipe
from vlatune.train.run import main, read_config
from vlatune.train.runs import runs_table

FAKE = """
import os, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
if out.name == os.environ.get("FAILS"):
    exec(os.environ["HOW"])
(out / "checkpoints" / "step_000004").mkdir(parents=True)
(out / "metrics.csv").write_text(f"step,loss,validation_loss,elapsed_s\\n2,0.5,{out.name[-1]},3\\n4,0.25,,7\\n")
(out / "checkpoints" / "step_000004" / "COMPLETE").touch()
"""
"""A member as far as a grid sees it: it ends as told, or with what a run of four steps leaves."""


@pytest.fixture
def fake_members(monkeypatch):
    """In place of real ones; a list of those that were started."""
    started = []

    def command(member, ranks):
        started.append(member.name)
        return [sys.executable, "-c", FAKE, *member.words]

    monkeypatch.setattr(grid, "command", command)
    return started


@pytest.fixture
def start(small_cache, tmp_path):
    """Starts a grid; its folder is `tmp_path / "grid"`."""
    return lambda *words: main(["tiny", "--cache", str(small_cache.path), "--out", str(tmp_path / "grid"), *words])


def test_a_grid_is_trained_and_a_lost_run_trained_again(start, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--engine", "plain", "--num-steps", "2", "--grid", "seed=0,1"]
    start(*words)
    out = tmp_path / "grid"
    table = pd.read_csv(out / "grid.csv")
    assert table[["seed", "status", "step"]].to_numpy().tolist() == [[0, "done", 2], [1, "done", 2]]
    for row, run in zip(table.to_dict("records"), [out / "seed=0", out / "seed=1"], strict=True):
        last = rows(run)[-1]
        assert row["folder"] == str(run)
        for name in ("loss", "validation_loss", "action_error", "action_magnitude", "samples_per_s"):
            assert row[name] == pytest.approx(float(last[name])), name
    best = table.loc[table["validation_loss"].idxmin(), "folder"]
    assert re.search(rf"lowest validation loss: [\d.]+, {re.escape(best)}\n", capsys.readouterr().out)
    assert runs_table([out])["state"].tolist() == ["finished", "finished"]

    lost = weights(out / "seed=0", 2)
    shutil.rmtree(out / "seed=0")
    log = (out / "seed=1.log").read_bytes()
    start(*words)
    again = weights(out / "seed=0", 2)
    assert all(lost[name].equal(again[name]) for name in lost)
    assert (out / "seed=1.log").read_bytes() == log, "what is finished is not started again"
    changes = ["loss", "validation_loss", "action_error"]
    pd.testing.assert_frame_equal(pd.read_csv(out / "grid.csv")[changes], table[changes])
    with pytest.raises(
        DataError, match=r"seed=0 holds a run with other settings: batch_size was 4, now 2\. Type --out"
    ):
        start(*words, "--batch-size", "2")


def test_a_dry_run_prints_a_command_a_run_and_writes_nothing(start, tmp_path, capsys):
    grid_words = ["--grid", "lora.rank=8,16", "--grid=optimizer.betas=0.9 0.95,0.8 0.9", "--grid", "compile=true,False"]
    start("--dry-run", *grid_words, "--log_every", "3")
    lines = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "grid").exists()
    read = []
    for line in lines:
        python, dash_m, module, recipe, *settings = shlex.split(line)
        assert [python, dash_m, module, recipe] == [sys.executable, "-m", "vlatune.train.run", "tiny"]
        read.append(read_config(recipe, settings))
    wanted = [(rank, betas, flag) for rank in (8, 16) for betas in ((0.9, 0.95), (0.8, 0.9)) for flag in (True, False)]
    assert [(config.lora.rank, config.optimizer.betas, config.compile) for config in read] == wanted
    assert {config.log_every for config in read} == {3}
    assert read[0].out == tmp_path / "grid" / "lora.rank=8,optimizer.betas=0.9_0.95,compile=true"
    assert len({config.out for config in read}) == 8


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--grid", "lora.rnak=8"], r"--grid lora\.rnak: there is no such setting; did you mean 'lora\.rank'\?"),
        (["--grid", "zzz=8"], "there is no such setting; `vlatune train tiny --help` lists them"),
        (["--grid", "lora.rank"], "--grid lora.rank: type NAME=VALUE,VALUE"),
        (["--grid", "lora.rank=8,,16"], "type NAME=VALUE,VALUE"),
        (["--grid", "out=a,b"], "every run gets a folder of its own"),
        (["--grid", "seed=0", "--grid", "seed=1"], "seed is given a second time; give it once"),
        (["--grid", "log-every=1,2", "--log_every=3"], "log-every is given a second time; give it once"),
        (["--grid", "optimizer.learning_rate=1e-3,0.001"], "two runs of the grid are the same: .*=1e-3 and .*=0.001"),
        (["--grid", "language=a/b,a_b"], "two runs of the grid are the same"),
        (["--grid", f"language={'x' * 200}"], "is longer than 200 letters; give shorter values"),
        (
            ["--grid", "seed=0,1", "--hub.repo-id", "me/mine"],
            "--hub.repo-id me/mine: two runs of the grid would overwrite",
        ),
        (["--grid", "compile=yes"], "it is a switch; type --grid compile=true,false"),
        (["--grid", "batch-size=4,5", "--ranks", "2"], "--batch-size 5 does not divide into 2 ranks"),
        (["--grid", "seed=0,1", "--ranks", "0"], "--ranks 0: a run here can have 1 or more"),
    ],
)
def test_bad_grids_are_one_sentence_before_anything_is_started(words, sentence, start, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=sentence):
        start(*words)
    assert not (tmp_path / "grid").exists()


def test_a_bad_value_is_refused_as_in_a_single_run(start, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        start("--grid", "seed=0,x")
    assert "invalid literal for int() with base 10: 'x'" in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()


def test_bad_data_and_a_folder_with_a_run_in_it_are_refused(start, tmp_path):
    with pytest.raises(DataError, match="it is not a cache"):
        main(["tiny", "--grid", "cache=nowhere,elsewhere", "--out", str(tmp_path / "grid")])
    assert not (tmp_path / "grid").exists()
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "config.json").touch()
    with pytest.raises(DataError, match="grid holds a run; type --out with another folder"):
        start("--grid", "seed=0,1")


def test_a_grid_within_a_launcher_is_refused(start, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match=r"start it without the launcher: vlatune train tiny --grid … --ranks 8"):
        start("--grid", "seed=0,1")


@pytest.mark.filterwarnings("error")  # nor does a second stage's objective confuse the parser
def test_settings_have_the_names_that_the_command_line_has(capsys):
    with pytest.raises(SystemExit):
        read_config("tiny_stages", ["--help"])
    shown = set(re.findall(r"^[│ ]*--([a-z][\w.-]+)", capsys.readouterr().out, re.MULTILINE))
    names = setting_names(load_recipe("tiny_stages"))
    assert names["then.0.lora.rank"] == 2
    assert shown - {"dry-run", "grid"} <= set(names)
    assert {name for name in names if names[name] is not None} <= shown, (
        "a part that the recipe leaves out has no options"
    )


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("print('vlatune train: no such cache', file=sys.stderr); sys.exit(2)", "no such cache"),
        ("raise RuntimeError('CUDA out of memory')", "RuntimeError: CUDA out of memory"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended early by SIGKILL"),
    ],
)
def test_a_run_that_fails_does_not_stop_the_others(how, error, start, fake_members, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAILS", "seed=1")
    monkeypatch.setenv("HOW", how)
    with pytest.raises(SystemExit, match="1"):
        start("--grid", "seed=3,1,2")
    assert fake_members == ["seed=3", "seed=1", "seed=2"]
    table = pd.read_csv(tmp_path / "grid" / "grid.csv", index_col="seed")
    assert table["status"].to_dict() == {3: "done", 1: "failed", 2: "done"}
    assert table.loc[1, "error"] == error
    assert table.loc[3, ["step", "loss", "validation_loss", "seconds"]].tolist() == [4, 0.25, 3, 7]
    printed = capsys.readouterr()
    assert f"lowest validation loss: 2, {tmp_path / 'grid' / 'seed=2'}\n" in printed.out
    assert "vlatune train: 1 of 3 runs failed" in printed.err

    monkeypatch.delenv("FAILS")
    start("--grid", "seed=3,1,2")
    assert fake_members[3:] == ["seed=1"]
    assert pd.read_csv(tmp_path / "grid" / "grid.csv")["status"].tolist() == ["done"] * 3


@pytest.mark.parametrize(
    ("how", "numbers", "code"),
    [
        ("signal.signal(signal.SIGTERM, lambda *_: sys.exit()); ", [signal.SIGTERM], 143),
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN); ", [signal.SIGINT, signal.SIGINT], 130),
    ],
    ids=["asked", "made to"],
)
def test_a_stopped_grid_stops_its_run(how, numbers, code, start, fake_members, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILS", "seed=1")
    monkeypatch.setenv("HOW", f"{how}(out.parent / 'ready').touch()\nwhile True: time.sleep(1)")
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    heard = []

    class Listening(grid.Stop):
        def _hear(self, number, frame):
            super()._hear(number, frame)
            heard.append(number)

    monkeypatch.setattr(grid, "Stop", Listening)

    def stop():
        while not (tmp_path / "grid" / "ready").exists():
            time.sleep(0.02)
        for sent, number in enumerate(numbers, start=1):
            os.kill(os.getpid(), number)
            while len(heard) < sent:  # two of a kind at once would be one
                time.sleep(0.02)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with pytest.raises(SystemExit, match=str(code)):  # it comes back, and its run would never have ended
        start("--grid", "seed=0,1,2")
    thread.join()
    assert fake_members == ["seed=0", "seed=1"]
    assert pd.read_csv(tmp_path / "grid" / "grid.csv")["status"].tolist() == ["done", "waiting", "waiting"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_that_outlived_its_grid_is_left_alone(start, fake_members, tmp_path):
    (tmp_path / "grid").mkdir()
    with (tmp_path / "grid" / "seed=0.log").open("ab") as log:
        orphan = "import fcntl, sys; fcntl.flock(1, fcntl.LOCK_EX); print('x', file=sys.stderr, flush=True); input()"
        with subprocess.Popen(
            [sys.executable, "-c", orphan], stdin=subprocess.PIPE, stdout=log, stderr=subprocess.PIPE
        ) as process:
            assert process.stderr is not None
            process.stderr.read(1)
            with pytest.raises(DataError, match=r"seed=0 is still being trained, by a grid that was killed"):
                start("--grid", "seed=0,1")
            process.kill()
    start("--grid", "seed=0,1")


@pytest.mark.parametrize(
    ("visible", "ranks", "launcher"),
    [
        (None, None, "--num_gpus 4"),
        (None, 2, "--num_gpus 2"),
        ("4,5,6,7", 2, "--include localhost:4,5"),
        (None, 1, None),
    ],
)
def test_ranks_are_the_devices(visible, ranks, launcher, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    member = plan_grid("tiny", ["seed=3"], [], out=tmp_path, ranks=1)[0]
    words = shlex.join(grid.command(member, grid.checked_ranks(ranks)))
    assert words.endswith(f"vlatune.train.run tiny --seed 3 --out {tmp_path}/seed=3")
    if launcher is None:
        assert words.startswith(f"{sys.executable} -m ")
    else:
        assert f"deepspeed --log_level warning {launcher} --master_port " in words
    with pytest.raises(ValueError, match="--ranks 5: a run here can have 1 to 4, one per CUDA device"):
        grid.checked_ranks(5)


def test_the_last_error_is_found_among_progress_and_launchers_chatter():
    output = (
        "train:  10%|#  | 1/10\rtrain:  20%|##  | 2/10\nTraceback (most recent call last):\n  raise ValueError\nValueError: first\n"
        "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried\nException ignored in: <function x>\n"
        "[2026-01-01 00:00:00] [ERROR] [launch.py:1:sigkill_handler] exits with return code = 1\n"
    )
    assert why_it_ended(output, 1) == "torch.OutOfMemoryError: CUDA out of memory. Tried"
    assert why_it_ended("train: 100%\n", 0) == "ended early with exit code 0"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_launchers_ranks_save_when_the_grid_is_stopped(small_cache, tmp_path):
    """Two ranks under the deepspeed launcher, which itself would end at once and leave them behind. More steps than any machine takes
    until the signal comes."""
    words = ["tiny", "--cache", str(small_cache.path), "--out", str(tmp_path), "--num-steps", "1000000"]
    words += ["--checkpoint-every", "1000000", "--validate-every", "1000000", "--ranks", "2", "--grid", "seed=0"]
    command = [sys.executable, "-m", "vlatune.train.run", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        metrics = tmp_path / "seed=0" / "metrics.csv"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        assert process.wait() == 143
    newest = max(complete_checkpoints(tmp_path / "seed=0"))
    assert newest >= 2
    subprocess.run([*command, "--stop-at-step", str(newest + 2)], check=True)
    assert f"at step {newest}" in (tmp_path / "seed=0.log").read_text()
    assert pd.read_csv(tmp_path / "grid.csv")["step"].tolist() == [newest + 2]


def test_stopping_at_a_step_is_an_end(start, fake_members, tmp_path):
    """`--stop-at-step 2` of four steps: a run that has come to step 2 is done."""
    member = plan_grid("tiny", ["seed=0"], ["--stop-at-step", "2"], out=tmp_path, ranks=1)[0]
    assert not member.is_finished
    checkpoint = tmp_path / "seed=0" / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").touch()
    assert member.is_finished
    assert not dataclasses.replace(member, config=load_recipe("tiny")).is_finished
