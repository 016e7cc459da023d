"""`vlatune collect`: what it writes, that it can be killed, and what it refuses."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest

from vlatune.data.episodes import DataError
from vlatune.eval import collect as collect_module
from vlatune.eval.benchmarks import load_benchmark
from vlatune.eval.benchmarks.benchmark import NoExpert
from vlatune.eval.benchmarks.renderer import RendererError
from vlatune.eval.collect import Collect, collect, main
from vlatune.eval.record import Job, record_episode
from vlatune.eval.workers import SimulatorError

RED_ON_PLATE = "pick_up_the_red_cube_and_put_it_on_the_yellow_plate"
BLUE_ON_TRAY = "pick_up_the_blue_cube_and_put_it_on_the_green_tray"
POCKET = load_benchmark("pocket")


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Every dataset and attribute of an HDF5 file."""
    found: dict[str, np.ndarray] = {}

    def take(name, item):
        found.update({f"{name}@{key}": np.asarray(value) for key, value in item.attrs.items()})
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    with h5py.File(path, "r") as file:
        file.visititems(take)
    return found


def assert_same(one: Path, other: Path) -> None:
    left, right = arrays(one), arrays(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    """Two tasks, three demonstrations each, without noise."""
    out = tmp_path_factory.mktemp("demos")
    tasks = (RED_ON_PLATE, BLUE_ON_TRAY)
    collect(Collect(out=out, tasks=tasks, episodes=3, image_px=32, workers=2))
    return out


@pytest.mark.sim
def test_one_whole_file_a_task_and_nothing_else(collected):
    assert {path.name for path in collected.iterdir()} == {f"{RED_ON_PLATE}_demo.hdf5", f"{BLUE_ON_TRAY}_demo.hdf5"}
    with h5py.File(collected / f"{RED_ON_PLATE}_demo.hdf5", "r") as file:
        data = file["data"]
        assert data.attrs["num_demos"] == len(data) == 3
        assert data.attrs["total"] == sum(group.attrs["num_samples"] for group in data.values())
        assert data.attrs["env_name"] == "Pocket_Tabletop"
        assert data.attrs["macros_image_convention"] == "opengl"
        assert data.attrs["observation_timing"] == "before_action"
        assert "(:language pick up the red cube" in data.attrs["bddl_file_content"]
        info = json.loads(data.attrs["problem_info"])
        assert info["language_instruction"] == "pick up the red cube and put it on the yellow plate"
        env_args = json.loads(data.attrs["env_args"])
        assert (env_args["type"], env_args["problem_name"]) == (1, "pocket_tabletop")
        assert env_args["env_kwargs"]["controller_configs"]["type"] == "OSC_POSE"
        indices = [group.attrs["init_state_index"] for group in data.values()]
        assert indices == [1000, 1001, 1002], "no evaluation starts there"
        for group in data.values():
            steps = group.attrs["num_samples"]
            assert group["obs/agentview_rgb"].shape == (steps, 32, 32, 3)
            assert np.abs(group["actions"][()]).max() <= 1
            assert group["dones"][-1] == 1 and group["dones"][()].sum() == 1
            assert group.attrs["model_file"].startswith("<mujoco")


@pytest.mark.sim
def test_replayed_actions_give_the_recorded_states_and_pictures(collected):
    """Each row is what was true and seen just before its action, to the bit."""
    (task,) = [task for task in POCKET.suites()["pocket"] if task.name == RED_ON_PLATE]
    protocol = next(iter(POCKET.protocols("pocket").values()))
    environment = POCKET.make_environment(task, replace(protocol, image_px=32))
    with h5py.File(collected / f"{RED_ON_PLATE}_demo.hdf5", "r") as file:
        demo = file["data/demo_1"]
        seen = environment.reset(1001, seed=1001)
        for k, action_A in enumerate(demo["actions"][()]):
            np.testing.assert_array_equal(environment.mujoco_state(), demo["states"][k])
            np.testing.assert_array_equal(seen.images["eye_in_hand"], demo["obs/eye_in_hand_rgb"][k])
            np.testing.assert_array_equal(seen.low_dim["robot0_eef_pos"], demo["obs/ee_pos"][k])
            assert not seen.success
            seen = environment.step(action_A, render=True)
        assert seen.success
    environment.close()


@pytest.mark.sim
def test_noise_is_executed_and_the_intention_recorded(tmp_path):
    (task,) = [task for task in POCKET.suites()["pocket"] if task.name == BLUE_ON_TRAY]
    jobs = [
        Job(task=task, init_state=1000, image_px=32, noise=noise, seed=0, part=tmp_path / str(noise))
        for noise in (0.0, 0.3)
    ]
    assert all(record_episode(job).success for job in jobs)
    with h5py.File(jobs[0].success_path) as calm, h5py.File(jobs[1].success_path) as shaken:
        assert "executed_actions" not in calm["data/demo_0"]
        meant, executed = shaken["data/demo_0/actions"][()], shaken["data/demo_0/executed_actions"][()]
        np.testing.assert_array_equal(meant[:, 6], executed[:, 6])
        assert 0.1 < np.std(executed[:, :3] - meant[:, :3]) < 0.4
        np.testing.assert_array_equal(meant[0], calm["data/demo_0/actions"][0])
        assert np.abs(shaken["data/demo_0/states"][5] - calm["data/demo_0/states"][5]).max() > 1e-4


@pytest.mark.sim
def test_killed_and_started_again_it_gives_the_same(collected, tmp_path):
    out = tmp_path / "killed"
    never_done = (
        "import threading, vlatune.eval.collect as c; c.merge_demos = lambda *_: threading.Event().wait(); c.main()"
    )
    command = [sys.executable, "-c", never_done]
    command += ["--out", str(out), "--tasks", RED_ON_PLATE, "--episodes", "3", "--image-px", "32", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list(out.glob(f".parts/{RED_ON_PLATE}/*.hdf5")):
        assert process.poll() is None, "no episode was finished before the kill"
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=300)
    assert children and not alive, "workers outlived their parent"
    assert not (out / f"{RED_ON_PLATE}_demo.hdf5").exists()
    first = min(out.glob(f".parts/{RED_ON_PLATE}/*.hdf5"))
    with h5py.File(first, "r+") as file:
        file["data/demo_0"].attrs["survived"] = 1
    (out / ".parts" / RED_ON_PLATE / ".1002.hdf5.1.tmp").write_text("half an episode")

    collect(Collect(out=out, tasks=(RED_ON_PLATE,), episodes=3, image_px=32, workers=1))
    assert [path.name for path in out.iterdir()] == [f"{RED_ON_PLATE}_demo.hdf5"]
    with h5py.File(out / f"{RED_ON_PLATE}_demo.hdf5", "r+") as file:
        (survivor,) = [group for group in file["data"].values() if "survived" in group.attrs]
        assert survivor.attrs["init_state_index"] == int(first.stem)
        del survivor.attrs["survived"]
    assert_same(out / f"{RED_ON_PLATE}_demo.hdf5", collected / f"{RED_ON_PLATE}_demo.hdf5")


@pytest.mark.sim
def test_a_complete_collection_is_left_alone(collected):
    before = {path: path.stat().st_mtime_ns for path in collected.iterdir()}
    collect(Collect(out=collected, tasks=(RED_ON_PLATE, BLUE_ON_TRAY), episodes=3, image_px=32, workers=2))
    assert {path: path.stat().st_mtime_ns for path in collected.iterdir()} == before


@pytest.mark.sim
def test_files_of_other_settings_are_refused(collected):
    for changed in ({"episodes": 4}, {"noise": 0.1}, {"seed": 1}):
        config = Collect(out=collected, **{"tasks": (RED_ON_PLATE,), "episodes": 3, "image_px": 32, **changed})
        with pytest.raises(DataError, match="delete it or give another --out"):
            collect(config)


def test_parts_of_other_settings_are_refused(tmp_path):
    parts = tmp_path / ".parts"
    parts.mkdir()
    (parts / "settings.json").write_text(json.dumps(Collect(out=tmp_path, noise=0.5).settings()))
    with pytest.raises(DataError, match=r"other settings .*0\.5.* another --out"):
        collect(Collect(out=tmp_path))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tasks": ("stack_them",)}, f"no task 'stack_them'; it has .*{RED_ON_PLATE}"),
        ({"suite": "pockets"}, "pocket has no suite 'pockets'; it has pocket, pocket_holdout"),
        ({"benchmark": "libre"}, "no benchmark 'libre'"),
    ],
)
def test_what_does_not_exist_is_named(tmp_path, changed, said):
    with pytest.raises(ValueError, match=said):
        collect(Collect(out=tmp_path / "demos", **changed))
    assert not (tmp_path / "demos").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"episodes": 0}, "--episodes is 0"), ({"noise": -0.1}, "--noise is -0.1"), ({"image_px": 4}, "--image-px is 4")],
)
def test_numbers_out_of_range(tmp_path, changed, said):
    with pytest.raises(ValueError, match=said):
        Collect(out=tmp_path, **changed)


def test_a_benchmark_without_an_expert(tmp_path):
    with pytest.raises(NoExpert, match="does not know how to"):
        collect(Collect(out=tmp_path / "demos", benchmark="libero", suite="libero_goal"))
    assert not (tmp_path / "demos").exists()


def test_no_renderer_is_said_before_any_work(tmp_path, monkeypatch):
    def no_renderer() -> str:
        raise RendererError("no renderer")

    monkeypatch.setattr(collect_module, "choose_renderer", no_renderer)
    with pytest.raises(RendererError, match="no renderer"):
        collect(Collect(out=tmp_path / "demos"))
    assert not (tmp_path / "demos").exists()


@pytest.mark.sim
def test_a_hopeless_task_is_given_up(tmp_path, monkeypatch):
    """Episodes that failed are remembered, so that a restart does not run them again."""
    monkeypatch.setattr(collect_module, "FREE_TRIES", 0)
    monkeypatch.setattr(collect_module, "MAX_TRIES_PER_DEMO", 1)
    folder = tmp_path / ".parts" / RED_ON_PLATE
    folder.mkdir(parents=True)
    for k in range(1000, 1004):
        (folder / f"{k}.failed").write_text("dropped")
    with pytest.raises(DataError, match="0 succeeded, and --episodes asks for 1; give less --noise"):
        collect(Collect(out=tmp_path, tasks=(RED_ON_PLATE,), episodes=1, noise=1.0, workers=1))


@pytest.mark.sim
def test_a_killed_worker_is_one_sentence(tmp_path, monkeypatch):
    def killed(*_):
        raise BrokenProcessPool("a process in the pool was terminated abruptly")

    monkeypatch.setattr(collect_module, "_collect_task", killed)
    with pytest.raises(SimulatorError, match="with fewer --workers: what is finished is kept"):
        collect(Collect(out=tmp_path))


def test_help_shows_the_fields_docstrings(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Successful episodes per task" in capsys.readouterr().out
