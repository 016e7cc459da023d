"""LIBERO's suites: what they say of themselves, and (with its assets) one task that runs."""

import contextlib
import io
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlatune.data.episodes import DataError
from vlatune.eval.benchmarks import load_benchmark
from vlatune.eval.benchmarks.benchmark import NoExpert
from vlatune.eval.benchmarks.libero.init_states import load_init_states
from vlatune.eval.benchmarks.libero_paths import ASSETS_VARIABLE, AssetsError, require_assets
from vlatune.eval.rollout import roll_out

LIBERO = load_benchmark("libero")
SIZES = {"libero_spatial": 10, "libero_object": 10, "libero_goal": 10, "libero_10": 10, "libero_90": 90}
SPATIAL = LIBERO.suites()["libero_spatial"]


def init_states_path(task) -> Path:
    return Path(task.bddl_file).parents[2] / "init_files" / task.suite / f"{task.name}.pruned_init"


def test_five_suites():
    suites = LIBERO.suites()
    assert {suite: len(tasks) for suite, tasks in suites.items()} == SIZES
    for suite, tasks in suites.items():
        assert [task.task_id for task in tasks] == list(range(SIZES[suite]))
        assert all(Path(task.bddl_file).is_file() and task.suite == suite for task in tasks)
    assert SPATIAL[0].language == "pick up the black bowl between the plate and the ramekin and place it on the plate"


@pytest.mark.sim  # imports LIBERO: seconds
def test_tasks_and_languages_are_liberos_own():
    from vlatune.eval.benchmarks import libero_library  # noqa: F401

    with contextlib.redirect_stdout(io.StringIO()):
        from libero.libero.benchmark import get_benchmark

        for suite, tasks in LIBERO.suites().items():
            theirs = [get_benchmark(suite)().get_task(k) for k in range(len(tasks))]
            assert [(t.name, t.language) for t in tasks] == [(t.name, t.language) for t in theirs]


def test_protocols():
    openvla = {suite: next(iter(LIBERO.protocols(suite).values())) for suite in SIZES}
    assert {p.name for p in openvla.values()} == {"openvla"}, "the first is the default"
    assert [p.max_steps for p in openvla.values()] == [220, 280, 300, 520, 400]
    assert {(p.num_settle_steps, p.image_px) for p in openvla.values()} == {(10, 256)}
    libero = LIBERO.protocols("libero_goal")["libero"]
    assert (libero.max_steps, libero.num_settle_steps, libero.image_px) == (600, 5, 128)
    with pytest.raises(ValueError, match="no suite 'libero_100'; it has libero_spatial"):
        LIBERO.protocols("libero_100")


def test_no_expert():
    with pytest.raises(NoExpert, match="libero_spatial and libero_object.* does not know how to 'LIVING_ROOM_SCENE2_"):
        LIBERO.make_expert(LIBERO.suites()["libero_10"][0])


def test_init_states_of_every_task():
    for tasks in LIBERO.suites().values():
        for task in tasks:
            states = load_init_states(init_states_path(task))
            assert len(states) == task.num_init_states == 50 and states.dtype == np.float64
    assert load_init_states(init_states_path(SPATIAL[0])).shape == (50, 92)


class Bomb:
    def __reduce__(self):
        return (print, ("a pickle ran",))


@pytest.mark.parametrize(("payload", "said"), [(Bomb(), "builtins.print"), ([1, 2], "no \\(n, D\\) array")])
def test_a_pickle_of_anything_else_is_refused(tmp_path, capsys, payload, said):
    path = tmp_path / "task.pruned_init"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(payload))
    with pytest.raises(DataError, match=said):
        load_init_states(path)
    assert capsys.readouterr().out == ""


def test_a_damaged_file_of_init_states(tmp_path):
    path = tmp_path / "task.pruned_init"
    path.write_bytes(init_states_path(SPATIAL[0]).read_bytes()[:1000])
    with pytest.raises(DataError, match="reinstall hf-libero"):
        load_init_states(path)


def test_without_assets_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv(ASSETS_VARIABLE, str(tmp_path))
    with pytest.raises(AssetsError, match=ASSETS_VARIABLE) as raised:
        require_assets()
    assert "pocket" in str(raised.value) and "\n" not in str(raised.value)


def test_assets_are_found_where_libero_downloads_them(tmp_path, monkeypatch):
    monkeypatch.delenv(ASSETS_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(AssetsError, match="hf download lerobot/libero-assets"):
        require_assets()
    downloaded = tmp_path / ".cache" / "libero" / "assets"
    (downloaded / "scenes").mkdir(parents=True)
    assert require_assets() == downloaded.resolve()


@pytest.mark.sim
def test_an_environment_without_assets(tmp_path, monkeypatch):
    monkeypatch.setenv(ASSETS_VARIABLE, str(tmp_path))
    with pytest.raises(AssetsError, match=ASSETS_VARIABLE):
        LIBERO.make_environment(SPATIAL[0], LIBERO.protocols("libero_spatial")["openvla"])


@pytest.mark.libero
def test_a_spatial_task_runs_and_does_not_succeed_by_itself():
    protocol = replace(LIBERO.protocols("libero_spatial")["openvla"], image_px=64)
    environment = LIBERO.make_environment(SPATIAL[0], protocol)
    started = []

    def nothing(_decision, _raw, observation):
        started.append(environment.mujoco_state())
        return np.zeros((8, 7))

    outcome = roll_out(environment, nothing, init_state=3, seed=0, max_steps=16, num_executed_steps=8)
    assert (outcome.success, outcome.num_steps, outcome.failure_mode) == (False, 16, "never_reached")
    given = load_init_states(init_states_path(SPATIAL[0]))[3]
    # Settled for 10 steps of 50 ms from the given state: objects have sunk, nothing has gone elsewhere.
    assert started[0][0] == pytest.approx(given[0] + 0.5)
    assert np.abs(started[0][1:8] - given[1:8]).max() < 0.05
    with pytest.raises(ValueError, match="init states 0 to 49, and new ones drawn from 1000 on, not 50"):
        environment.reset(50, seed=0)
    environment.close()


@pytest.mark.libero
@pytest.mark.parametrize(("suite", "task_id"), [("libero_spatial", 4), ("libero_goal", 7)])
def test_a_used_libero_environment_equals_a_fresh_one(suite, task_id):
    """Fixtures (a cabinet, a stove) are not in the simulator's state; the second task's stove is left on."""
    task = LIBERO.suites()[suite][task_id]
    protocol = replace(LIBERO.protocols(suite)["openvla"], image_px=64)
    used, fresh = (LIBERO.make_environment(task, protocol) for _ in range(2))
    used.reset(1, seed=1)
    knobs = [k for k, name in enumerate(used.domain.sim.model.joint_names) if "stove" in name]
    for k in knobs:
        used.domain.sim.data.qpos[used.domain.sim.model.jnt_qposadr[k]] = 1.5
    for _ in range(3):
        used.step(np.array([0.5, -0.5, 0.2, 0, 0, 0.5, 1.0]), render=True)
    assert suite != "libero_goal" or used.domain._check_success(), "the stove should be on"
    rng = np.random.default_rng(0)
    pair = [environment.reset(2, seed=2) for environment in (used, fresh)]
    for _ in range(12):
        assert np.array_equal(used.mujoco_state(), fresh.mujoco_state())
        assert all(np.array_equal(image, pair[1].images[camera]) for camera, image in pair[0].images.items())
        action_A = rng.uniform(-1, 1, 7)
        pair = [environment.step(action_A, render=True) for environment in (used, fresh)]
    used.close()
    fresh.close()
