"""What competes in a sweep: checkpoints, their averages, sampling settings; races; and which of them is chosen."""

import json
from functools import partial
from pathlib import Path

import fake_point_world
import fake_policy
import pytest

from vlatune.data.episodes import DataError
from vlatune.eval.candidates import Candidate, best_of, candidates_of
from vlatune.eval.results import read
from vlatune.eval.run_folder import Checkpoint, find_runs
from vlatune.eval.sweep import SweepConfig, sweep

SKILLS = {0: 0.0, 100: 0.3, 200: 0.6, 300: 0.75}


def run_sweep(*runs: Path, **changes) -> list[Path]:
    settings = {"selection_episodes": 4, "report_episodes": 2, "videos": 0, "num_workers": 2}
    return sweep(
        SweepConfig(runs=runs, **{**settings, **changes}),
        make_benchmark=partial(fake_point_world.make, None),
        load_policy=fake_policy.load_policy,
    )


def chosen(run: Path) -> dict:
    return json.loads((run / "evaluation" / "chosen.json").read_text())


class FakeRow:
    def __init__(self, task_id, success):
        self.suite, self.task_id, self.success = "s", task_id, success


def rows_of(*tasks):
    return [FakeRow(k, success) for k, successes in enumerate(tasks) for success in successes]


def best(by_step):
    """The step of the best checkpoint."""
    found = best_of({Candidate(checkpoint=Checkpoint(path=Path("x"), step=step)): r for step, r in by_step.items()})
    return None if found is None else found.checkpoint.step


def test_the_best_of_equals_is_the_later_one():
    good, bad = rows_of([True, True], [True, False]), rows_of([True, False], [True, False])
    assert best({100: good, 200: good, 300: bad}) == 200


def test_the_best_is_by_the_mean_over_tasks_and_errors_do_not_count():
    lucky = rows_of([True, True, True, True], [False, None, None, None])  # 4 of 5, but half of the tasks
    even = rows_of([True, True, True, False], [True, True, False, False])  # 5 of 8
    assert best({100: lucky, 200: even}) == 200
    assert best({100: rows_of([None], [True]), 200: rows_of([False], [False])}) == 200, (
        "a task without an ending: unknown"
    )
    assert best({100: rows_of([None], [True])}) is None


def test_of_equals_the_later_checkpoint_then_the_cheaper_setting():
    checkpoints = [Checkpoint(path=Path("a"), step=1), Checkpoint(path=Path("b"), step=2)]
    found = candidates_of(checkpoints, (1, 10), (4, 8))
    assert len(found) == 8 and len(set(found)) == 8
    last = best_of(dict.fromkeys(found, rows_of([True])))
    assert (last.checkpoint.step, last.num_sampling_steps, last.num_executed_steps) == (2, 1, 8)
    assert last.label == "b, 1 sampling steps, 8 executed"


def test_a_grid_of_sampling_settings_is_one_sweep(tmp_path, capsys):
    run = fake_policy.write_run(tmp_path / "demo", {100: 0.9})
    run_sweep(run, num_sampling_steps=(1, 4), num_executed_steps=(2, 10))
    frame = read(run)
    selection = frame[frame["split"] == "selection"]
    cells = selection.groupby(["num_sampling_steps", "num_executed_steps"])["success"].agg(["size", "mean"])
    assert dict(cells["size"]) == {(1, 2): 12, (1, 10): 12, (4, 2): 12, (4, 10): 12}
    assert {json.loads(text)["num_sampling_steps"] for text in selection["sampling"]} == {1, 4}
    report = frame[frame["split"] == "report"]
    settings = chosen(run)["settings"]
    assert set(report["num_executed_steps"]) == {settings["num_executed_steps"]}
    assert set(report["sampling"]) == {settings["sampling"]}
    best_rate = max(cells["mean"])
    sampling = json.loads(settings["sampling"])["num_sampling_steps"]
    assert cells.loc[(sampling, settings["num_executed_steps"]), "mean"] == best_rate
    assert "step_000100, 4 sampling steps, 2 executed" in capsys.readouterr().out


def test_averaged_weights_compete_with_the_raw_ones(tmp_path):
    run = fake_policy.write_run(tmp_path / "demo", {100: 0.2, 200: 0.2})
    for step in (100, 200):
        average = {"skill": 1.0 if step == 100 else 0.1, "weights_hash": f"ema-{step}"}
        (run / "checkpoints" / f"step_{step:06d}" / "ema.safetensors").write_text(json.dumps(average))
    run_sweep(run, weights=("raw", "ema"))
    frame = read(run)
    assert set(frame["checkpoint"]) == {"step_000100", "step_000100-ema", "step_000200", "step_000200-ema"}
    assert (chosen(run)["checkpoint"], chosen(run)["step"], chosen(run)["weights_hash"]) == (
        "step_000100-ema",
        100,
        "ema-100",
    )


def test_an_average_that_was_not_kept(tmp_path):
    run = fake_policy.write_run(tmp_path / "demo", {100: 0.2})
    with pytest.raises(DataError, match=r"step_000100 has no ema.safetensors: .*give --weights raw"):
        run_sweep(run, weights=("ema",))


@pytest.mark.parametrize(
    ("steps", "found"), [(("last",), [300]), (("1*", 300), [100, 300]), (("*00",), [100, 200, 300]), ((200,), [200])]
)
def test_steps_by_number_pattern_and_last(tmp_path, steps, found):
    (run,) = find_runs([fake_policy.write_run(tmp_path / "demo", SKILLS)])
    assert [checkpoint.step for checkpoint in run.checkpoints(steps)] == found
    with pytest.raises(
        DataError, match=r"no complete checkpoint of step \*50; it has 100, 200, 300; give these, `last`"
    ):
        run.checkpoints(("*50",))


def test_checkpoints_may_be_named_by_their_folders(tmp_path):
    run = fake_policy.write_run(tmp_path / "demo", SKILLS)
    folders = [run / "checkpoints" / "step_000100", run / "checkpoints" / "step_000300"]
    run_sweep(*folders)
    assert set(read(run)["step"]) == {100, 300}
    (found,) = find_runs([folders[0], run])
    assert [checkpoint.step for checkpoint in found.checkpoints()] == [100, 200, 300], "the run names all of them"


def test_a_checkpoint_of_no_run(tmp_path):
    """What `vlatune convert` writes."""
    alone = tmp_path / "converted"
    fake_policy.write_run(tmp_path / "demo", {100: 0.9})
    (tmp_path / "demo" / "checkpoints" / "step_000100").rename(alone)
    run_sweep(alone, selection_episodes=0, report_episodes=None, tasks=(0,))
    frame = read(alone)
    assert set(frame["checkpoint"]) == {"converted"} and frame["step"].isna().all()
    assert len(frame) == 20 and set(frame["split"]) == {"report"}, "all init states that the protocol's results have"
    assert not (alone / "evaluation" / "chosen.json").exists(), "nothing was chosen"
    with pytest.raises(DataError, match="is one checkpoint and no run; leave out --steps 100"):
        run_sweep(alone, steps=(100,))


def test_a_protocols_numbers_can_be_overridden_and_stand_in_the_rows(tmp_path):
    run = fake_policy.write_run(tmp_path / "demo", {100: 0.9})
    run_sweep(run, selection_episodes=1, report_episodes=1, max_steps=3, num_settle_steps=2, image_px=32)
    frame = read(run)
    assert set(frame["max_steps"]) == {3} and set(frame["num_settle_steps"]) == {2} and set(frame["image_px"]) == {32}
    assert frame["num_steps"].max() == 3


def test_a_checkpoint_named_from_within_its_run(tmp_path, monkeypatch):
    run = fake_policy.write_run(tmp_path / "demo", SKILLS)
    monkeypatch.chdir(run / "checkpoints")
    (found,) = find_runs([Path("step_000200")])
    assert [checkpoint.step for checkpoint in found.checkpoints()] == [200] and found.name == "demo"


def test_episodes_of_the_other_half_are_not_taken_over(tmp_path):
    """What chose is not to be reported as held out, nor the other way round."""
    run = fake_policy.write_run(tmp_path / "demo", {100: 0.9})
    run_sweep(run)
    with pytest.raises(DataError, match=r"init state 0 .* as an episode of the selection half, .* give another --out"):
        run_sweep(run, selection_episodes=0, report_episodes=20)


def test_another_batch_size_is_not_mixed_in(tmp_path):
    run = fake_policy.write_run(tmp_path / "demo", {100: 0.9})
    run_sweep(run, batch_size=2)
    before = (run / "evaluation" / "episodes.csv").read_text()
    with pytest.raises(
        DataError, match=r"with forwards of 2 observations, and these would have 1.* give --batch-size 2"
    ):
        run_sweep(run, report_episodes=3)
    assert (run / "evaluation" / "episodes.csv").read_text() == before


def test_settings_are_refused_before_the_first_episode(tmp_path):
    run = fake_policy.write_run(tmp_path / "demo", SKILLS)
    with pytest.raises(ValueError, match="--num-executed-steps 64: the policy's chunks have 10"):
        run_sweep(run, num_executed_steps=(4, 64))
    assert len(read(run)) == 0


def test_runs_of_one_name_do_not_share_a_folder(tmp_path):
    runs = [fake_policy.write_run(tmp_path / side / "demo", {100: 0.9}) for side in "ab"]
    with pytest.raises(ValueError, match="would both write .*demo; sweep them one by one"):
        run_sweep(*runs, out=tmp_path / "out")


def test_a_suite_named_twice_is_one(tmp_path):
    run = fake_policy.write_run(tmp_path / "demo", {100: 0.9})
    run_sweep(run, suites=("points", "points"), selection_episodes=1, report_episodes=1)
    assert len(read(run)) == 6


def test_a_race_finds_the_best_with_fewer_episodes_and_continues_after_a_stop(tmp_path):
    skills = dict.fromkeys(range(100, 600, 100), 0.25) | {600: 1.0}
    whole = fake_policy.write_run(tmp_path / "whole" / "demo", skills)
    run_sweep(whole, selection_episodes=10)
    raced = fake_policy.write_run(tmp_path / "raced" / "demo", skills)
    run_sweep(raced, selection_episodes=10, race=True, race_error=0.2)
    assert chosen(whole)["checkpoint"] == chosen(raced)["checkpoint"] == "step_000600"
    full, part = (len(read(run).query("split == 'selection'")) for run in (whole, raced))
    assert full == 6 * 30 and part < 0.8 * full
    assert "a race dropped those that could not be the best (error 0.2)" in chosen(raced)["rule"]
    # What is there of a stopped race is taken up, and the same episodes are run.
    stopped = fake_policy.write_run(tmp_path / "stopped" / "demo", skills)
    rows = (raced / "evaluation" / "episodes.csv").read_text().splitlines(keepends=True)
    (stopped / "evaluation").mkdir()
    (stopped / "evaluation" / "episodes.csv").write_text("".join(rows[:40]))
    run_sweep(stopped, selection_episodes=10, race=True, race_error=0.2)
    key = ["split", "step", "task_id", "init_state", "success"]
    assert sorted(map(tuple, read(stopped)[key].to_numpy())) == sorted(map(tuple, read(raced)[key].to_numpy()))


def test_one_candidate_has_nobody_to_race(tmp_path):
    run = fake_policy.write_run(tmp_path / "demo", {100: 0.9})
    run_sweep(run, race=True)
    assert len(read(run).query("split == 'selection'")) == 12 and chosen(run)["num_candidates"] == 1
