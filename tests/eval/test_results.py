"""The rows of episodes.csv: what is written is what is read, after a kill too."""

import os
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
from small_episodes import row

from vlatune.data.episodes import DataError
from vlatune.eval.episode_log import EpisodeLog
from vlatune.eval.results import COLUMNS, EpisodeKey, EpisodeRow, header, read, success_by

ISSUE_COLUMNS = [
    "run",
    "checkpoint",
    "step",
    "weights_hash",
    "benchmark",
    "suite",
    "task_id",
    "task_language",
    "init_state",
    "seed",
    "outcome",
    "success",
    "num_steps",
    "steps_to_success",
    "wall_s",
    "sim_s",
    "render_s",
    "queue_ms",
    "policy_ms_mean",
    "policy_ms_p95",
    "smoothness",
    "action_saturation",
    "failure_mode",
    "split",
    "actor",
    "instruction",
    "video",
    "protocol",
    "num_sampling_steps",
    "num_executed_steps",
    "horizon",
    "batch_size",
    "mujoco",
    "robosuite",
    "libero",
    "torch",
    "vlatune",
    "renderer",
    "device",
    "error",
]


def failed(**changes) -> EpisodeRow:
    return row(
        **{"outcome": "failure", "success": False, "steps_to_success": None, "failure_mode": "dropped", **changes}
    )


def lost(**changes) -> EpisodeRow:
    numbers = ("num_steps", "num_decisions", "wall_s", "sim_s", "render_s", "queue_ms", "smoothness", "policy_ms_mean")
    gone = dict.fromkeys(numbers)
    return row(**{"outcome": "error", "success": None, "steps_to_success": None, "error": "killed", **gone, **changes})


def test_the_schema_has_every_column_of_the_design():
    assert set(ISSUE_COLUMNS) <= set(COLUMNS)
    assert {field.name for field in fields(EpisodeKey)} <= set(COLUMNS)


@pytest.mark.parametrize("original", [row(), failed(), lost()], ids=["success", "failure", "error"])
def test_rows_survive_the_file(tmp_path, original):
    with EpisodeLog(tmp_path) as log:
        log.append(original)
    text = (tmp_path / "episodes.csv").read_text()
    assert text.count("\n") == 2
    if original.outcome != "error":
        with EpisodeLog(tmp_path) as log:
            assert list(log.rows.values()) == [original]


def test_text_with_commas_quotes_and_newlines_stays_one_line(tmp_path):
    nasty = row(task_language='put "it", then\nstop', instruction="pick, place")
    with EpisodeLog(tmp_path) as log:
        log.append(nasty)
    with EpisodeLog(tmp_path) as log:
        (found,) = log.rows.values()
    assert (found.task_language, found.instruction) == ('put "it", then | stop', "pick, place")


def test_read_gives_typed_columns(tmp_path):
    with EpisodeLog(tmp_path) as log:
        for one in (row(), failed(init_state=8), lost(init_state=9), row(init_state=10, actor="zero", step=None)):
            log.append(one)
    frame = read(tmp_path)
    assert list(frame.columns) == list(COLUMNS)
    assert frame["step"].dtype == "Int64" and frame["success"].dtype == "boolean" and frame["wall_s"].dtype == "float64"
    assert pd.api.types.is_string_dtype(frame["failure_mode"])
    assert frame["failure_mode"].tolist() == ["", "dropped", "", ""]
    assert frame["success"].tolist() == [True, False, pd.NA, True]
    assert frame["smoothness"][0] == 0.1 + 0.2, "floats are written exactly"
    assert frame["step"][3] is pd.NA


def test_read_takes_runs_folders_and_files(tmp_path):
    for name in ("a", "b"):
        with EpisodeLog(tmp_path / name / "evaluation") as log:
            log.append(row(run=name))
    frame = read([tmp_path / "a", tmp_path / "b" / "evaluation" / "episodes.csv"])
    assert frame["run"].tolist() == ["a", "b"]
    with pytest.raises(DataError, match=r"no episodes\.csv at .*nowhere; `vlatune sweep RUN`"):
        read(tmp_path / "nowhere")


def test_success_by_leaves_errors_out(tmp_path):
    with EpisodeLog(tmp_path) as log:
        for k in range(18):
            log.append(row(init_state=k))
        log.append(failed(init_state=18))
        log.append(failed(init_state=19))
        log.append(lost(init_state=20))
        log.append(lost(init_state=20, task_id=2))
    table = success_by(read(tmp_path), ["step", "task_id"])
    first, second = table.to_dict("records")
    assert (first["episodes"], first["successes"], first["errors"]) == (20, 18, 1)
    assert first["success_rate"] == 0.9
    assert (round(first["low"], 3), round(first["high"], 3)) == (0.699, 0.972)
    assert second["episodes"] == 0 and second["errors"] == 1 and np.isnan(second["success_rate"])


def test_a_torn_last_line_is_cut_off(tmp_path):
    with EpisodeLog(tmp_path) as log:
        log.append(row())
        log.append(row(init_state=8))
    path = tmp_path / "episodes.csv"
    whole = path.read_bytes()
    for cut in (1, 2, 40, len(row().to_line()) - 1):
        path.write_bytes(whole[:-cut])
        with EpisodeLog(tmp_path) as log:
            assert [one.init_state for one in log.rows.values()] == [7], f"{cut} bytes torn off"
            log.append(row(init_state=8))
        assert path.read_bytes() == whole


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    leftover = tmp_path / "episodes.csv.tmp123-elsewhere"
    leftover.write_text("half")
    with EpisodeLog(tmp_path):
        assert not leftover.exists()


def test_a_torn_header_is_written_again(tmp_path):
    (tmp_path / "episodes.csv").write_text(header()[:30])
    with EpisodeLog(tmp_path) as log:
        log.append(row())
    assert len(read(tmp_path)) == 1


def test_errors_are_taken_out_to_be_run_again(tmp_path):
    with EpisodeLog(tmp_path) as log:
        log.append(lost())
        log.append(row(init_state=8))
        assert len(read(tmp_path)) == 2
    with EpisodeLog(tmp_path) as log:
        assert [one.init_state for one in log.rows.values()] == [8]
        log.append(row())
    assert sorted(read(tmp_path)["outcome"]) == ["success", "success"]


def test_no_key_twice(tmp_path):
    with EpisodeLog(tmp_path) as log:
        log.append(row())
        with pytest.raises(ValueError, match="already has the row"):
            log.append(row(wall_s=99.0))


def test_two_sweeps_do_not_write_the_same_file(tmp_path):
    with EpisodeLog(tmp_path), pytest.raises(DataError, match=r"another sweep is writing .*episodes\.csv"):
        EpisodeLog(tmp_path)
    EpisodeLog(tmp_path).close()


def test_a_full_disk_keeps_the_rows_that_are_there(tmp_path, monkeypatch):
    with EpisodeLog(tmp_path) as log:
        log.append(row())
        before = log.path.read_bytes()
        write = os.write
        monkeypatch.setattr("os.write", lambda file, data: write(file, data[:11]))
        with pytest.raises(DataError, match="the disk is full; its 1 rows are kept"):
            log.append(row(init_state=8))
        assert log.path.read_bytes() == before


def test_a_damaged_line_is_named(tmp_path):
    with EpisodeLog(tmp_path) as log:
        log.append(row())
        log.append(row(init_state=8))
    path = tmp_path / "episodes.csv"
    path.write_text(path.read_text().replace(",400,", ",four,", 1))
    with pytest.raises(DataError, match="line 2 of .* is damaged"):
        EpisodeLog(tmp_path)


def test_a_file_of_another_schema_is_refused(tmp_path):
    (tmp_path / "episodes.csv").write_text("task,reward\na,1\n")
    with pytest.raises(DataError, match=r"has other columns .*unknown: reward.*move it away"):
        EpisodeLog(tmp_path)
    with pytest.raises(DataError, match="has other columns"):
        read(tmp_path)


def test_the_key_is_what_names_the_episode():
    assert row().key == row(run="other", wall_s=1.0, video="", outcome="failure").key
    for change in (
        {"init_state": 8},
        {"actor": "blind"},
        {"weights_hash": "x"},
        {"num_executed_steps": 4},
        {"seed": 1},
    ):
        assert row().key.digest() != row(**change).key.digest()
