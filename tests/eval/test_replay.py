"""`vlatune replay`: real recordings of pocket agree, and each planted defect is caught and named."""

import csv
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from small_demonstrations import write_demos

from vlatune.data.episodes import DataError
from vlatune.data.sources.libero_hdf5 import LiberoHdf5Source
from vlatune.eval.collect import Collect, collect
from vlatune.eval.replay import ReplayConfig, main, plan
from vlatune.eval.replay_demos import fixture_poses, read_recording
from vlatune.eval.replay_episode import Replayed, replay_demo
from vlatune.eval.replay_findings import about_file, about_timing, drift_note
from vlatune.eval.replay_rows import COLUMNS, ReplayRow, row_of, table_of

TASK = "pick_up_the_blue_cube_and_put_it_on_the_green_tray"
CAMERAS = ("obs/agentview_rgb", "obs/eye_in_hand_rgb")
OBSERVED = ("robot_states", "obs/joint_states", "obs/ee_pos", "obs/ee_ori", "obs/ee_states", "obs/gripper_states")


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    """Two demonstrations, with noise: what was executed is not what the expert meant."""
    out = tmp_path_factory.mktemp("demos")
    collect(Collect(out=out, tasks=(TASK,), episodes=2, image_px=48, noise=0.1, workers=1))
    return out / f"{TASK}_demo.hdf5"


def planted(collected: Path, folder: Path, change: Callable[[h5py.Group], None]) -> Path:
    """A copy with the first demonstration alone, changed."""
    path = folder / collected.name
    shutil.copy(collected, path)
    with h5py.File(path, "r+") as file:
        del file["data/demo_1"]
        change(file["data/demo_0"])
    return path


def put(group: h5py.Group, name: str, rows: np.ndarray) -> None:
    del group[name]
    group[name] = rows


def each_picture(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[h5py.Group], None]:
    def of_both_cameras(group: h5py.Group) -> None:
        for name in CAMERAS:
            put(group, name, change(group[name][()]))

    return of_both_cameras


def exchange_cameras(group: h5py.Group) -> None:
    agentview, eye_in_hand = (group[name][()] for name in CAMERAS)
    put(group, CAMERAS[0], eye_in_hand)
    put(group, CAMERAS[1], agentview)


def turn_gripper(group: h5py.Group) -> None:
    for name in ("actions", "executed_actions"):
        put(group, name, group[name][()] * [1, 1, 1, 1, 1, 1, -1])


def columns(name: str, order: list[int]) -> Callable[[h5py.Group], None]:
    return lambda group: put(group, name, group[name][()][:, order])


def observe_after(group: h5py.Group) -> None:
    """Row t has what was seen after action t. (Of the last action nothing was recorded: the last row is there twice.)"""
    for name in (*OBSERVED, *CAMERAS):
        rows = group[name][()]
        put(group, name, np.concatenate([rows[1:], rows[-1:]]))


def as_libero(group: h5py.Group) -> None:
    """As LIBERO's own files are: observed after the action, without the first five rows, without our attributes."""
    observe_after(group)
    for name in (*OBSERVED, *CAMERAS, "states", "actions", "executed_actions", "rewards", "dones"):
        put(group, name, group[name][5:])
    put(group, "actions", group["executed_actions"][()])
    del group["executed_actions"], group.attrs["init_state_index"], group.parent.attrs["observation_timing"]


def replayed(path: Path, **options) -> Replayed:
    return replay_demo(plan(ReplayConfig(demos=(path,), **options))[0])


@pytest.mark.sim
def test_a_recording_replays_bit_for_bit_and_is_not_accused(collected, tmp_path):
    found = replayed(collected)
    assert found.recording.executed == "executed_actions"
    for run in (found.from_state, found.open_loop):
        assert run.success and run.num_steps == len(found.recording.actions_TA)
        assert run.deviations.max() == 0
    assert (found.findings, found.lag, found.gripper) == ((), pytest.approx(-0.04), pytest.approx(1, abs=0.05))
    assert found.state_error < 0.2 and max(seen.difference for seen in found.looks.values()) < 1
    assert found.gripper_command == -1


@pytest.mark.sim
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (each_picture(lambda rows: rows[:, ::-1]), "of camera {} are mirrored, their rows in reverse"),
        (each_picture(lambda rows: rows[:, ::-1, ::-1]), "of camera {} are turned by 180 degrees"),
        (each_picture(lambda rows: rows[:, :, ::-1]), "of camera {} are mirrored, their columns in reverse"),
        (exchange_cameras, "of camera {} are those of camera "),
    ],
    ids=["flipud", "rot180", "fliplr", "cameras"],
)
def test_planted_pictures_are_caught(collected, tmp_path, change, said):
    found = replayed(planted(collected, tmp_path, change))
    sentences = [finding.sentence for finding in found.findings]
    assert len(sentences) == 2 and found.from_state.success
    for sentence, camera in zip(sentences, ("agentview", "eye_in_hand"), strict=True):
        assert said.format(camera) in sentence


@pytest.mark.sim
@pytest.mark.parametrize(
    ("name", "order", "said"),
    [
        ("robot_states", [0, 1, 2, 3, 4, 8, 5, 6, 7], "the numbers of its quaternion in the order w, x, y, z"),
        ("robot_states", [2, 3, 4, 0, 1, 5, 6, 7, 8], "the order position, fingers, quaternion"),
        ("obs/ee_ori", [0, 2, 1], "the numbers of its axis angle in the order x, z, y"),
        ("obs/ee_pos", [1, 0, 2], "the numbers of its position in the order y, x, z"),
    ],
)
def test_a_planted_order_of_the_state_is_caught(collected, tmp_path, name, order, said):
    (finding,) = replayed(planted(collected, tmp_path, columns(name, order))).findings
    assert finding.check == "state" and f"`{name}` has {said}" in finding.sentence


@pytest.mark.sim
def test_a_planted_gripper_sign_is_caught_twice(collected, tmp_path):
    found = replayed(planted(collected, tmp_path, turn_gripper))
    (finding,) = found.findings
    assert "its sign is turned (-1 opens and 1 closes here)" in finding.sentence
    assert not found.from_state.success and found.from_state.deviations.max() > 0.02


@pytest.mark.sim
def test_actions_that_were_not_executed_are_noted(collected, tmp_path):
    def only_meant(group: h5py.Group) -> None:
        del group["executed_actions"]

    row = row_of(replayed(planted(collected, tmp_path, only_meant)))
    assert row.executed == "actions" and row.drift > 0.01 and row.findings == ""
    assert "1 of 1 replays leave the recorded states" in drift_note("a", [row])[0]


@pytest.mark.sim
def test_files_as_libero_writes_them(collected, tmp_path):
    """From its sixth row on, with neither seed nor init state, and pictures of the moment after the action."""
    path = planted(collected, tmp_path, as_libero)
    found = replayed(path)
    assert not found.recording.observed_before
    assert found.from_state.success and found.from_state.deviations.max() < 1e-9
    assert (found.findings, found.lag) == ((), pytest.approx(0.96))
    assert not np.array_equal(found.open_loop.deviations[0], 0), (
        "another arrangement: the file does not say which it was"
    )
    (timing,) = replayed(path, observation_timing="before_action").findings
    assert timing.check == "timing" and "--observation-timing after_action" in timing.sentence


@pytest.mark.sim
def test_the_command_writes_a_table_and_pictures_and_fails_where_something_fails(collected, tmp_path, capsys):
    out = tmp_path / "out"
    main([str(collected), "--workers", "1", "--out", str(out)])
    said = capsys.readouterr().out
    assert "100.0%  34.2% to 100.0%" in said and "does not agree" not in said
    with (out / "replay.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["demo"] for row in rows] == ["demo_0", "demo_1"] and list(rows[0]) == COLUMNS
    assert {row["success"] for row in rows} == {"True"} and {float(row["drift"]) for row in rows} == {0.0}
    assert (out / f"pocket__{TASK}_demo__demo_0.png").read_bytes().startswith(b"\x89PNG")

    bad = planted(collected, tmp_path, turn_gripper)
    with h5py.File(bad, "r+") as file:  # beside it one of another model
        file.copy("data/demo_0", file["data"], name="demo_1")
        put(file["data/demo_1"], "states", file["data/demo_1/states"][:, :-1])
    with pytest.raises(SystemExit, match=r"do not agree: .* of 1 demonstrations 0 succeed .* \(and 2 more\)"):
        main([str(bad), "--workers", "1", "--out", str(out)])
    said = capsys.readouterr().out
    assert "its sign is turned" in said
    assert "cannot be replayed: demo_1 of" in said and "has states of 44 numbers, and the model" in said


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"episodes": 0}, "--episodes is 0; at least 1"),
        ({"pictures": 0}, "--pictures is 0; at least 1"),
        ({"min_success": 99.0}, "--min-success is 99; it is a share from 0 to 1"),
        ({"demos": ()}, "no demonstrations are given; name a"),
    ],
)
def test_requests_that_make_no_sense(changed, said):
    with pytest.raises(ValueError, match=said):
        ReplayConfig(**{"demos": (Path("demos"),), **changed})


def test_the_task_is_found_by_its_name_and_episodes_are_the_first(tmp_path):
    write_demos(tmp_path / "sub" / f"{TASK}_demo.hdf5", (4,) * 12)
    jobs = plan(ReplayConfig(demos=(tmp_path,), episodes=3))
    assert [job.key for job in jobs] == [f"{TASK}_demo.hdf5/demo_{k}" for k in range(3)]
    assert {(job.task.benchmark, job.task.name) for job in jobs} == {("pocket", TASK)}
    assert [job.keep_pictures for job in jobs] == [True, False, False]
    named = {"observation_timing": "before_action", "bddl_file_name": "libero_goal/turn_on_the_stove.bddl"}
    write_demos(tmp_path / "other_demo.hdf5", (4,), attributes=named)
    (job,) = plan(ReplayConfig(demos=(tmp_path / "other_demo.hdf5",)))
    assert (job.task.benchmark, job.task.suite) == ("libero", "libero_goal")


def test_an_unknown_task(tmp_path):
    path = write_demos(tmp_path / "stack_them_demo.hdf5")
    with pytest.raises(
        DataError, match=r"a task 'stack_them', and pocket and libero have none of that name; name the file"
    ):
        plan(ReplayConfig(demos=(path,)))


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("states", None, "demo_0 of .* has no `states`, from which a replay starts"),
        ("states", np.full((5, 20), np.nan), r"`states` of shape \(5, 20\), or with NaN"),
        ("robot_states", np.zeros((4, 9)), r"`robot_states` of shape \(4, 9\), .* beside 5 states"),
        ("robot_states", np.zeros((5, 8)), r"`robot_states` of shape \(5, 8\); LIBERO's has 9 columns"),
    ],
)
def test_recordings_that_cannot_be_replayed(tmp_path, name, rows, said):
    path = write_demos(tmp_path / f"{TASK}_demo.hdf5", (5,))
    with h5py.File(path, "r+") as file:
        del file[f"data/demo_0/{name}"]
        if rows is not None:
            file[f"data/demo_0/{name}"] = rows
    with pytest.raises(DataError, match=said):
        read_recording(LiberoHdf5Source(path), f"{path.name}/demo_0")


def test_furniture_is_read_from_the_recorded_model():
    xml = '<mujoco><worldbody><body name="stove_main" pos="0.1 -0.2 0.9"><body name="knob" quat="0 1 0 0"/></body></worldbody></mujoco>'
    poses = fixture_poses(xml)
    np.testing.assert_array_equal(np.concatenate(poses["stove_main"]), [0.1, -0.2, 0.9, 1, 0, 0, 0])
    np.testing.assert_array_equal(poses["knob"][1], [0, 1, 0, 0])
    assert fixture_poses("") == {}


def test_timing_is_doubted_only_beyond_a_substep():
    assert about_timing(None, True) == about_timing(-0.04, True) == about_timing(-0.96, True) == []
    assert about_timing(0.04, False) == about_timing(0.96, False) == []
    assert "was observed before its action, and its" in about_timing(0.96, True)[0].sentence
    assert "--observation-timing before_action" in about_timing(-0.04, False)[0].sentence


def row(**changes) -> ReplayRow:
    values = dict.fromkeys(COLUMNS, 0.0) | {"file": "a/x.hdf5", "success": True, "drifted_from": None}
    return replace(ReplayRow(**values), **changes)


def test_what_demonstrations_share_is_said_once():
    rows = [row(), row(success=False, drifted_from=7), row(drifted_from=9)]
    said = about_file("x.hdf5", rows, [["turned"], ["turned", "odd"], []], min_success=0.99)
    assert said == [
        "x.hdf5: of 3 demonstrations 2 succeed when their actions are run again from the recorded state, and 99 % should",
        "x.hdf5: turned (2 of 3 demonstrations)",
        "x.hdf5: odd (1 of 3 demonstrations)",
    ]
    assert about_file("x.hdf5", rows, [[], [], []], min_success=0.6) == []
    assert (
        "2 of 3 replays leave the recorded states by more than 1 cm or 0.01 rad (the first in row 7)"
        in drift_note("x", rows)[0]
    )


def test_the_table_has_a_line_a_file_and_one_for_all():
    lines = table_of([row(), row(success=False), row(file="b/y.hdf5")]).splitlines()
    assert lines[1].split()[:3] == ["x.hdf5", "2", "50.0%"]
    assert lines[2].split()[:3] == ["y.hdf5", "1", "100.0%"]
    assert lines[3].split()[:3] == ["together", "3", "66.7%"]
