"""A two-rank run that is killed again and again, at any moment of its life, ends where an undisturbed one does, bit for bit."""

import contextlib
import csv
import itertools
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace

import psutil
import pytest
from launched import command, environment, rows, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vlatune.train.checkpoint import resumable_checkpoints
from vlatune.train.loop import Interruption
from vlatune.train.recipes import load_recipe
from vlatune.train.run import train

NUM_STEPS = 180  # more than twenty lives get through
NUM_KILLS = 20
CHECKPOINT_EVERY = 3
SETTINGS = (
    *("--num-steps", str(NUM_STEPS), "--checkpoint-every", str(CHECKPOINT_EVERY), "--validate-every", "6"),
    *("--ema.decay", "0.9", "--ema.power", "0.75"),
)
SPEEDS = {"samples_per_s", "samples_per_s_per_device", "tflops_per_device", "data_wait_share"}
MEASURED_COLUMNS = {*SPEEDS, "elapsed_s", "peak_memory_gb"}
PATIENCE_S = 400  # for what takes ten seconds on a quiet machine


class Life:
    """The launcher and its ranks, from their start to their end, in a process group of their own."""

    def __init__(self, cache: pathlib.Path, out: pathlib.Path, log: pathlib.Path) -> None:
        self.out, self.log = out, log
        self.resumes_at = newest_checkpoint(out)
        self.started_ns = time.time_ns()
        self.process = subprocess.Popen(
            command("vlatune.train.run", "tiny", "--cache", str(cache), "--out", str(out), *SETTINGS, num_ranks=2),
            env=environment() | {"TORCH_EXTENSIONS_DIR": str(log.parent / "compiled")},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def has_progressed_to(self) -> int:
        """The last step that this life wrote a row of; the one it resumed from before that."""
        metrics = self.out / "metrics.csv"
        if not metrics.exists() or metrics.stat().st_mtime_ns < self.started_ns:
            return self.resumes_at
        with metrics.open(newline="") as stream:
            return max((int(row["step"]) for row in csv.DictReader(stream)), default=self.resumes_at)

    @property
    def is_writing(self) -> bool:
        """Whether there is a half-written checkpoint, and of this life: an earlier one's lies there until the next is written."""
        for unfinished in self.out.glob("checkpoints/.*.partial"):
            with contextlib.suppress(FileNotFoundError):  # it was finished in the meantime
                if unfinished.stat().st_mtime_ns > self.started_ns:
                    return True
        return False

    def wait_for(self, what: str, is_so) -> float:
        """Seconds since the start. Fails where the life ends before."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            assert self.process.poll() is None, f"ended before {what}: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {what} after {PATIENCE_S} s: {self.log.read_text()}"
            time.sleep(0.002)
        return (time.time_ns() - self.started_ns) / 1e9

    def kill(self) -> None:
        """Launcher and ranks at once, as when the power goes."""
        assert self.process.poll() is None, f"was over before it could be killed: {self.log.read_text()}"
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + PATIENCE_S
        while left := processes_of(self.out):
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.02)

    def end(self) -> None:
        assert self.process.wait(PATIENCE_S) == 0, self.log.read_text()


def newest_checkpoint(out: pathlib.Path) -> int:
    """From the names alone; 0 where there is none."""
    return max((int(path.name[5:]) for path in out.glob("checkpoints/step_*")), default=0)


def processes_of(out: pathlib.Path) -> list[psutil.Process]:
    """Whose command line names the run's folder, as the launcher's and the ranks' do."""
    running = psutil.process_iter(["cmdline", "status"])
    return [
        process
        for process in running
        if str(out) in (process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


@pytest.fixture
def begin(small_cache):
    """Begins a life; ends it where the test did not."""
    lives = []

    def begin(out: pathlib.Path, log: pathlib.Path) -> Life:
        lives.append(Life(small_cache.path, out, log))
        return lives[-1]

    yield begin
    if lives and lives[-1].process.poll() is None:
        lives[-1].kill()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_change_nothing(begin, tmp_path):
    expected, out = tmp_path / "undisturbed", tmp_path / "run"
    undisturbed = begin(expected, tmp_path / "log")
    start_s = undisturbed.wait_for("the first row", lambda: undisturbed.has_progressed_to > 0)
    whole_s = undisturbed.wait_for("the last row", lambda: undisturbed.has_progressed_to == NUM_STEPS)
    undisturbed.end()
    checkpoint_s = CHECKPOINT_EVERY * (whole_s - start_s) / (NUM_STEPS - 1)  # from one to the next

    draw = random.Random(6)
    # Three die before they did anything; of the others, ten live until a checkpoint of theirs is whole.
    kinds = [("starting", False)] * 3 + [("training", long) for long in (False,) * 4 + (True,) * 5]
    kinds += [("writing", long) for long in (False,) * 3 + (True,) * 5]
    assert len(kinds) == NUM_KILLS
    draw.shuffle(kinds)
    resumed, before_progress, while_writing, at_once = [], 0, 0, False
    for number, (kind, lives_long) in enumerate(kinds):
        life = begin(out, tmp_path / f"log{number}")
        resumed.append(life.resumes_at)
        longest_s = start_s if kind == "starting" else checkpoint_s
        if kind != "starting":
            # The row of the step after a checkpoint is written when the checkpoint is.
            goal = life.resumes_at + draw.randint(1, CHECKPOINT_EVERY) + lives_long * CHECKPOINT_EVERY
            life.wait_for(f"step {goal}", lambda life=life, goal=goal: life.has_progressed_to >= goal)
        if kind == "writing":
            life.wait_for("a checkpoint", lambda life=life: life.is_writing)
            at_once = not at_once  # every other one: whatever the machine, some die while a checkpoint is half there
            longest_s *= not at_once
        moment = time.monotonic() + draw.uniform(0, longest_s)
        limit = life.has_progressed_to + CHECKPOINT_EVERY  # where the machine is faster than it was
        while time.monotonic() < moment and life.has_progressed_to < limit:
            time.sleep(0.002)
        life.kill()
        before_progress += life.has_progressed_to == life.resumes_at
        while_writing += life.is_writing
        if "resuming" in (said := life.log.read_text()):
            assert f"resuming {out} at step {life.resumes_at}\n" in said

    assert before_progress <= 3 and while_writing >= 3, (before_progress, while_writing)
    # Every life resumes where the one before it was: nothing that was whole is lost.
    advanced = [later > earlier for earlier, later in itertools.pairwise([*resumed, newest_checkpoint(out)])]
    assert resumed == sorted(resumed), resumed
    assert all(has for has, (_, lives_long) in zip(advanced, kinds, strict=True) if lives_long), (resumed, kinds)
    last = begin(out, tmp_path / "log_of_the_last")
    last.wait_for("the last row", lambda: last.has_progressed_to == NUM_STEPS)
    last.end()
    print(f"resumed at {resumed}; {before_progress} kills before any progress, {while_writing} while writing")

    names = {path.name for path in (expected / "checkpoints").iterdir()}
    assert {path.name for path in (out / "checkpoints").iterdir()} == names  # nothing half-written is left
    assert [path.parent.name for path in out.glob("checkpoints/*/trainer*")] == [f"step_{NUM_STEPS:06d}"]
    for step in range(0, NUM_STEPS + 1, CHECKPOINT_EVERY):
        for name in ("model.safetensors", "ema.safetensors"):
            wanted, found = weights(expected, step, name), weights(out, step, name)
            assert wanted.keys() == found.keys()
            assert all(wanted[key].equal(found[key]) for key in wanted), (step, name)
    # Nothing was compiled: a kill would leave the compiler's lock behind, on which every later start waits for ever.
    assert not (tmp_path / "compiled").exists()
    assert computed(rows(out)) == computed(rows(expected))
    board = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, NUM_STEPS + 1))


def computed(table: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name not in MEASURED_COLUMNS} for row in table]


class Killed(Exception):
    pass


def test_half_of_what_is_deleted_is_never_resumed_from(small_cache, tmp_path, monkeypatch):
    """Killed while the trainer state before the newest is being deleted; and a half-written checkpoint of a step that never returns."""
    monkeypatch.setattr(Interruption, "__init__", lambda self: setattr(self, "asked", False))  # no signal handlers
    config = replace(load_recipe("tiny"), engine="plain", cache=small_cache.path, out=tmp_path / "run")
    rmtree = shutil.rmtree

    def killed_halfway(folder, *arguments, **options):
        if "trainer" in folder.name:
            next(path for path in folder.rglob("*") if path.is_file()).unlink()
            raise Killed
        rmtree(folder, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed_halfway)
        with pytest.raises(Killed):
            train(config)
    (config.out / "checkpoints" / ".step_000001.partial").mkdir()
    assert [step for step, _ in resumable_checkpoints(config.out)] == [2]
    train(config)
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == [
        f"step_{step:06d}" for step in (0, 2, 4)
    ]
    assert [path.parent.name for path in config.out.glob("checkpoints/*/trainer*")] == ["step_000004"]
