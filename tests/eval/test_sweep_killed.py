"""A sweep killed twenty times, its workers killed beside it, and a disk that fills: no row is lost, doubled or half-written."""

import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_policy
import pandas as pd
import psutil
import pytest

from vlatune.eval.results import CLOCK, read

SKILLS = {0: 0.0, 100: 0.3, 200: 0.5, 300: 0.7, 400: 0.8}
EPISODES = 10
NUM_ROWS = 4 * 3 * EPISODES + 4 * 3 * 5
"""Four checkpoints on three tasks, then the chosen one and three controls."""


def run_of(folder: Path) -> Path:
    return fake_policy.write_run(folder / "demo", SKILLS, delay_s=0.02)


def command(run: Path, trouble: Path, *last_row: int) -> list[str]:
    return [sys.executable, fake_policy.__file__, str(run), str(trouble), str(EPISODES), *map(str, last_row)]


def lasting(run: Path) -> pd.DataFrame:
    """The rows but for the clock's columns, in one order."""
    key = ["split", "actor", "step", "task_id", "init_state"]
    return read(run).drop(columns=list(CLOCK)).sort_values(key).reset_index(drop=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(run_of(folder), folder), check=True, stdout=subprocess.DEVNULL)
    rows = lasting(folder / "demo")
    assert len(rows) == NUM_ROWS and set(rows["outcome"]) == {"success", "failure"}
    return rows


def num_lines(run: Path) -> int:
    path = run / "evaluation" / "episodes.csv"
    return path.read_text().count("\n") if path.exists() else 0


def kill_a_worker(parent: psutil.Process, rng: random.Random) -> bool:
    try:
        workers = [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
        if workers:
            rng.choice(workers).kill()
    except psutil.Error:  # one of them ended while it was looked at
        return False
    return bool(workers)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # two minutes on two quiet cores
def test_twenty_kills_and_as_many_of_workers_change_nothing(tmp_path, undisturbed):
    """SIGKILL at random moments: while importing, while workers start, between and within episodes."""
    run, rng = run_of(tmp_path), random.Random(5)
    # Every third dies early, by the clock or with its first row; the others after a few rows. Soon after those they wait for
    # their death: or on a fast machine the sweep would be over before the twentieth.
    worker_kills = 0
    for number in range(20):
        early, num_rows = number % 3 == 0, rng.randint(2, 5)
        goal = num_lines(run) + (1 if early else num_rows)
        process = subprocess.Popen(command(run, tmp_path, goal + 1), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + (rng.uniform(0.05, 2.5) if early else math.inf)
        while time.monotonic() < deadline and process.poll() is None and num_lines(run) < goal:
            time.sleep(rng.uniform(0.0, 0.02))
        assert process.poll() is None, "it ended before it could be killed"
        if number % 2:
            worker_kills += kill_a_worker(psutil.Process(process.pid), rng)
            time.sleep(rng.uniform(0.0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert worker_kills >= 5, "of seven that were asked for beside rows just written"
    for _ in range(2):  # the second start runs again what two kills of its worker made an error, if any
        subprocess.run(command(run, tmp_path), check=True, stdout=subprocess.DEVNULL)
    pd.testing.assert_frame_equal(lasting(run), undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_workers_killed_at_random_lose_and_double_nothing(tmp_path, undisturbed):
    run, rng = run_of(tmp_path), random.Random(7)
    process = subprocess.Popen(command(run, tmp_path), stdout=subprocess.DEVNULL)
    killed, goal = 0, 2
    while process.poll() is None:
        time.sleep(rng.uniform(0.0, 0.1))
        if num_lines(run) >= goal and kill_a_worker(psutil.Process(process.pid), rng):
            killed += 1
            goal = num_lines(run) + rng.randint(5, 20)
    assert process.returncode == 0 and killed >= 3
    subprocess.run(command(run, tmp_path), check=True, stdout=subprocess.DEVNULL)
    pd.testing.assert_frame_equal(lasting(run), undisturbed)


def test_a_full_disk_stops_the_sweep_with_the_rows_that_were_there(tmp_path):
    """The limit on a file's size stands for the disk: a write beyond it fails as one on a full disk does."""
    run = fake_policy.write_run(tmp_path / "demo", SKILLS)
    limit = 10_000
    ended = subprocess.run(
        [*command(run, tmp_path)[:-1], "4"],
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert ended.returncode == 1
    path = run / "evaluation" / "episodes.csv"
    said = ended.stderr.strip().splitlines()[-1]
    text = path.read_text()
    assert f"could not write to {path}: " in said and f"its {len(read(run))} rows are kept" in said
    assert text.endswith("\n") and limit - 1000 < len(text) <= limit
    assert not list(run.glob("evaluation/*.tmp*"))
    subprocess.run([*command(run, tmp_path)[:-1], "4"], check=True, stdout=subprocess.DEVNULL)
    assert path.read_text().startswith(text) and len(read(run)) == 4 * 3 * 4 + 4 * 3 * 5
