"""The sweep: all checkpoints, the choice, its controls; and nothing lost or doubled when it is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import fake_point_world
import fake_policy
import pandas as pd
import pytest

from vlatune.data.episodes import DataError
from vlatune.eval.benchmarks.benchmark import NoExpert
from vlatune.eval.results import CLOCK, read
from vlatune.eval.run_folder import find_run
from vlatune.eval.sweep import SweepConfig, main, sweep
from vlatune.eval.workers import SimulatorError

SKILLS = {0: 0.0, 100: 0.3, 200: 0.6, 300: 0.75}


def config(*runs: Path, **changes) -> SweepConfig:
    settings = {"selection_episodes": 4, "report_episodes": 5, "controls": True, "videos": 0, "num_workers": 2}
    return SweepConfig(runs=runs, **{**settings, **changes})


def run_sweep(*runs: Path, trouble: Path | None = None, **changes) -> list[Path]:
    return sweep(
        config(*runs, **changes),
        make_benchmark=partial(fake_point_world.make, trouble),
        load_policy=fake_policy.load_policy,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run whose sweep has finished, with videos and a baseline."""
    run = fake_policy.write_run(tmp_path_factory.mktemp("runs") / "demo", SKILLS)
    (run / "checkpoints" / "step_000400").mkdir()  # being written: no COMPLETE
    run_sweep(run, videos=1, baselines=("zero", "random"))
    return run


def test_every_checkpoint_task_and_state_is_one_row(finished):
    frame = read(finished)
    selection = frame[frame["split"] == "selection"]
    assert len(selection) == 3 * 3 * 4 and set(selection["step"]) == {100, 200, 300}
    assert set(selection["init_state"]) == {0, 1, 2, 3} and set(selection["actor"]) == {"policy"}
    report = frame[frame["split"] == "report"]
    assert set(report["init_state"]) == {10, 11, 12, 13, 14}, "of 20 init states the second half"
    assert report.groupby("actor").size().to_dict() == {
        "policy": 15,
        "untrained": 15,
        "blind": 15,
        "wrong_instruction": 15,
        "zero": 15,
        "random": 15,
    }
    key = ["weights_hash", "actor", "task_id", "init_state", "seed"]
    assert not frame.duplicated(key).any()


def test_rows_say_what_was_run(finished):
    frame = read(finished)
    policy = frame[frame["actor"] == "policy"].iloc[0]
    assert (policy["run"], policy["protocol"], policy["max_steps"], policy["image_px"]) == ("demo", "short", 24, 16)
    assert (policy["num_sampling_steps"], policy["num_executed_steps"], policy["horizon"], policy["batch_size"]) == (
        4,
        8,
        10,
        1,
    )
    assert json.loads(policy["sampling"]) == {"solver": "euler", "num_sampling_steps": 4}
    assert policy["torch"] and policy["vlatune"] and policy["device"] == "cpu"
    wrong = frame[frame["actor"] == "wrong_instruction"]
    assert (wrong["instruction"] != wrong["task_language"]).all()
    assert (
        frame[frame["actor"] == "policy"]["instruction"] == frame[frame["actor"] == "policy"]["task_language"]
    ).all()
    untrained = frame[frame["actor"] == "untrained"]
    assert set(untrained["step"]) == {0} and set(untrained["weights_hash"]) == {"demo-0"}
    zero = frame[frame["actor"] == "zero"]
    assert zero["step"].isna().all() and set(zero["checkpoint"]) == {""} and zero["batch_size"].isna().all()
    ended = frame[frame["outcome"] == "failure"]
    assert set(ended["failure_mode"]) == {"never_reached"} and ended["steps_to_success"].isna().all()
    assert (ended["num_steps"] == 24).all()


def test_the_best_is_chosen_and_judged_on_other_states(finished):
    chosen = json.loads((finished / "evaluation" / "chosen.json").read_text())
    assert (chosen["checkpoint"], chosen["weights_hash"], chosen["num_candidates"]) == ("step_000300", "demo-300", 3)
    frame = read(finished)
    report = frame[frame["split"] == "report"]
    assert set(report[report["actor"].isin(["policy", "blind", "wrong_instruction"])]["step"]) == {300}
    rates = report.groupby("actor")["success"].mean()
    assert rates["policy"] > 0.7
    assert rates["wrong_instruction"] < 0.3


def test_videos_say_what_they_show_and_none_overwrites_another(finished):
    folder = finished / "evaluation"
    frame = read(finished)
    recorded = frame[frame["video"] != ""]
    first = recorded["init_state"].isin([0, 10])
    assert len(recorded[first]) == 3 * 3 + 6 * 3, "one per task, checkpoint and actor in each half"
    assert set(recorded[~first]["outcome"]) == {"failure"}, "and one failure per task, if the first was none"
    judged = frame[frame["split"] == "report"].groupby(["actor", "task_id"])
    for _, rows in judged:
        failures = rows[rows["outcome"] == "failure"]
        assert len(failures) == 0 or (failures["video"] != "").any()
    assert recorded["video"].is_unique
    assert {f"videos/{path.name}" for path in (folder / "videos").glob("*.mp4")} == set(recorded["video"])
    for row in recorded.itertuples():
        for part in (row.checkpoint, f"task{row.task_id:02d}", f"init{row.init_state:02d}", row.actor, row.outcome):
            assert part in row.video


def test_a_finished_sweep_runs_nothing_again(finished):
    before = (finished / "evaluation" / "episodes.csv").read_bytes()
    run_sweep(finished, baselines=("zero", "random"))
    assert (finished / "evaluation" / "episodes.csv").read_bytes() == before


def test_more_episodes_are_added_to_those_that_are_there(tmp_path):
    run = fake_policy.write_run(tmp_path / "demo", {100: 0.9})
    run_sweep(run, controls=False, selection_episodes=1, report_episodes=1)
    first = read(run)
    run_sweep(run, controls=False, selection_episodes=2, report_episodes=3)
    assert len(first) == 6 and len(read(run)) == 15
    pd.testing.assert_frame_equal(read(run).head(6), first)


def test_killed_again_and_again_it_ends_with_the_same_rows(tmp_path):
    trouble = tmp_path / "trouble"
    trouble.mkdir()
    undisturbed = fake_policy.write_run(tmp_path / "a" / "demo", {0: 0.0, 100: 0.4, 200: 0.75})
    run_sweep(undisturbed, batch_size=2)
    run = fake_policy.write_run(tmp_path / "b" / "demo", {0: 0.0, 100: 0.4, 200: 0.75}, delay_s=0.01)
    path = run / "evaluation" / "episodes.csv"
    command = [sys.executable, fake_policy.__file__, str(run), str(trouble), "4"]
    for num_rows in (3, 20, 40):
        process = subprocess.Popen([*command, str(num_rows + 15)], stdout=subprocess.DEVNULL)
        while not (path.exists() and path.read_text().count("\n") > num_rows):
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with path.open("a") as file:
            file.write("demo,step_000200,20")  # what a kill in the middle of a write leaves
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    key = ["actor", "step", "task_id", "init_state"]
    expected, found = (
        read(one).drop(columns=list(CLOCK)).sort_values(key).reset_index(drop=True) for one in (undisturbed, run)
    )
    assert len(found) == 2 * 3 * 4 + 4 * 3 * 5
    pd.testing.assert_frame_equal(found, expected)


def test_an_error_is_not_averaged_in_and_is_run_again_at_the_next_start(tmp_path):
    run = fake_policy.write_run(tmp_path / "demo", {100: 1.0})
    trouble = tmp_path / "trouble"
    trouble.mkdir()
    (trouble / "1_2.exit").touch()
    run_sweep(run, trouble=trouble, controls=False)
    frame = read(run)
    (error,) = frame[frame["outcome"] == "error"].to_dict("records")
    assert "exit code 3" in error["error"] and (error["task_id"], error["init_state"]) == (1, 2)
    (candidate,) = json.loads((run / "evaluation" / "chosen.json").read_text())["candidates"]
    assert (candidate["step"], candidate["successes"], candidate["episodes"]) == (100, 11, 11)
    (trouble / "1_2.exit").unlink()
    run_sweep(run, trouble=trouble, controls=False)
    assert len(read(run)) == len(frame) and set(read(run)["outcome"]) == {"success"}


def test_steps_tasks_and_another_folder(tmp_path):
    run = fake_policy.write_run(tmp_path / "demo", SKILLS)
    out = tmp_path / "elsewhere"
    settings = {"controls": False, "steps": (100, 200), "tasks": (2,), "num_executed_steps": (3,), "out": out}
    assert run_sweep(run, **settings) == [out]
    frame = read(out)
    assert set(frame["step"]) == {100, 200} and set(frame["task_id"]) == {2} and set(frame["num_executed_steps"]) == {3}
    assert not (run / "evaluation").exists()


def test_candidates_are_a_setting_of_the_sampling(tmp_path):
    run = fake_policy.write_run(tmp_path / "demo", {100: 0.6})
    settings = {"controls": False, "selection_episodes": 1, "report_episodes": 2}
    run_sweep(run, **settings)
    alone = (run / "evaluation" / "episodes.csv").read_text()
    run_sweep(run, num_candidates=3, **settings)
    both = (run / "evaluation" / "episodes.csv").read_text()
    assert both.startswith(alone), "episodes with another number of candidates are other episodes"
    frame = read(run)
    candidates = [json.loads(sampling).get("num_candidates") for sampling in frame["sampling"]]
    assert candidates == [None] * 9 + [3] * 9
    chosen = json.loads((run / "evaluation" / "chosen.json").read_text())
    assert json.loads(chosen["settings"]["sampling"])["num_candidates"] == 3
    run_sweep(run, num_candidates=3, **settings)
    run_sweep(run, num_candidates=1, **settings)
    assert (run / "evaluation" / "episodes.csv").read_text() == both


def test_several_runs_share_the_workers(tmp_path):
    runs = [fake_policy.write_run(tmp_path / name, {100: 0.9}) for name in ("a", "b")]
    folders = run_sweep(*runs, controls=False, out=tmp_path / "out")
    assert folders == [tmp_path / "out" / "a", tmp_path / "out" / "b"]
    assert read(folders)["run"].value_counts().to_dict() == {"a": 27, "b": 27}


def test_the_table_that_is_printed(tmp_path, capsys):
    run = fake_policy.write_run(tmp_path / "demo", {0: 0.0, 100: 1.0})
    run_sweep(run)
    printed = capsys.readouterr().out
    assert "step_000100                      100.0 %  [ 75.8, 100.0]  12/12  <- chosen" in printed
    assert "policy                           100.0 %  [ 79.6, 100.0]  15/15" in printed
    assert "wrong_instruction" in printed


def test_a_run_that_is_not_there(tmp_path):
    fake_policy.write_run(tmp_path / "pocket_flow", {100: 1.0})
    with pytest.raises(DataError, match=r"there is no run folder .*pocket_flwo; did you mean .*pocket_flow\?"):
        find_run(tmp_path / "pocket_flwo")
    with pytest.raises(DataError, match=r"there is no run folder .*; `vlatune train` writes runs under runs/"):
        find_run(tmp_path / "nowhere" / "x")


@pytest.mark.parametrize("skills", [{}, {0: 0.0}], ids=["none", "untrained only"])
def test_no_checkpoint_in_the_run(tmp_path, skills):
    run = fake_policy.write_run(tmp_path / "demo", skills)
    (run / "checkpoints" / "step_000100").mkdir(parents=True)  # without COMPLETE
    with pytest.raises(DataError, match=r"no complete checkpoint in .*demo/checkpoints .*`vlatune train`"):
        run_sweep(run)


def test_a_step_that_is_not_there(tmp_path):
    run = fake_policy.write_run(tmp_path / "demo", SKILLS)
    with pytest.raises(DataError, match=r"no complete checkpoint of step 150; it has 100, 200, 300"):
        run_sweep(run, steps=(150, 200))


def test_controls_need_the_untrained_policy(tmp_path):
    run = fake_policy.write_run(tmp_path / "demo", {100: 1.0})
    with pytest.raises(DataError, match=r"no complete checkpoints/step_000000, .*--no-controls"):
        run_sweep(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suites": ("spatial",)}, "benchmark 'fake' has no suite 'spatial'; it has points"),
        ({"tasks": (7,)}, "suite 'points' has no task 7; it has 0, 1, 2"),
        ({"protocol": "openvla"}, "suite 'points' has no protocol 'openvla'; it has short"),
        (
            {"report_episodes": 11},
            "--report-episodes 11: task 'reach_the_red_dot' has 10 init states for report; ask for 1 to 10",
        ),
        ({"selection_episodes": -1}, "--selection-episodes -1: .* ask for 0 to 10"),
        ({"selection_episodes": 0}, "--selection-episodes 0: .* has 3 candidates .* name its step, as in --steps last"),
        ({"max_steps": 0}, "--max-steps 0: a positive number is needed"),
        ({"batch_size": 0}, "--batch-size 0: at least 1 is needed"),
        ({"seed": -1}, "--seed -1: at least 0 is needed"),
        ({"race_error": 0.0}, "--race-error 0: it lies between 0 and 1"),
        ({"weights": ()}, "--weights names nothing; give raw, ema, or both"),
        ({"num_sampling_steps": (0,)}, "--num-sampling-steps 0: give different numbers of 1 or more"),
        ({"num_executed_steps": (4, 4)}, "--num-executed-steps 4 4: give different numbers"),
        ({"temporal_ensemble": -0.1}, "--temporal-ensemble -0.1: the coefficient is 0 or more"),
        ({"shard": "2/2"}, r"--shard 2/2: give the part and the number of parts, counted from 0"),
        ({"race": True, "shard": "0/2"}, "--race compares all candidates round by round, which --shard does not allow"),
        ({"watch": True, "selection_episodes": 0}, "--watch compares checkpoints as they come"),
        ({"tasks": (1,)}, "no other instruction than 'reach the green dot'"),
        ({"baselines": ("scripted",)}, "no expert for blue"),
        ({"num_executed_steps": (11,)}, "--num-executed-steps 11: the policy's chunks have 10; 1 to 10"),
        ({"num_candidates": 0}, "--num-candidates 0: a decision needs at least 1"),
        (
            {"num_candidates": 2, "num_executed_steps": (10,)},
            "--num-candidates 2: .* all 10 are executed; type --num-executed-steps with a number below 10",
        ),
    ],
)
def test_what_cannot_be_asked_for(tmp_path, changes, message):
    run = fake_policy.write_run(tmp_path / "demo", SKILLS)
    with pytest.raises((ValueError, NoExpert), match=message):
        run_sweep(run, **changes)


def test_no_renderer(tmp_path, monkeypatch):
    run = fake_policy.write_run(tmp_path / "demo", SKILLS)
    with pytest.raises(
        SimulatorError, match="no simulator could be started: ImportError: Unable to load OSMesa library"
    ):
        sweep(
            config(run, num_workers=1),
            make_benchmark=partial(fake_point_world.make, broken=True),
            load_policy=fake_policy.load_policy,
        )


def test_the_command_line(tmp_path, capsys):
    with pytest.raises(DataError, match="there is no run folder .*nothing"):
        main([str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="there is no benchmark 'poket'"):
        main([str(tmp_path), "--benchmark", "poket"])
    with pytest.raises(ValueError, match="no run folder was given; .*vlatune sweep runs/pocket"):
        main([])
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    helped = capsys.readouterr().out
    assert "Run folders" in helped and "Init states per task, from the first half" in " ".join(helped.split())
