"""A sweep split over machines, and the rows joined again."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import fake_point_world
import fake_policy
import pandas as pd
import pytest
from small_episodes import row

from vlatune.data.episodes import DataError
from vlatune.eval.episode_log import EpisodeLog, write_rows
from vlatune.eval.merge import MergeConfig, main, merge
from vlatune.eval.results import CLOCK, read
from vlatune.eval.shards import Shard
from vlatune.eval.sweep import SweepConfig, sweep


def run_sweep(run: Path, shard: str = "", trouble: Path | None = None, **changes) -> None:
    settings = {"selection_episodes": 3, "report_episodes": 4, "controls": True, "videos": 1, "num_workers": 1}
    sweep(
        SweepConfig(runs=(run,), shard=shard, **{**settings, **changes}),
        make_benchmark=partial(fake_point_world.make, trouble),
        load_policy=fake_policy.load_policy,
    )


def test_parts_are_neighbours_and_together_everything():
    items = list(range(10))
    parts = [list(Shard.parse(f"{k}/4").part(items)) for k in range(4)]
    assert [n for part in parts for n in part] == items
    assert {len(part) for part in parts} == {2, 3}
    for wrong in ("4/4", "1", "-1/2", "a/b", "0/0"):
        with pytest.raises(ValueError, match=r"counted from 0, as 0/4, 1/4, 2/4 and 3/4; in a SLURM array"):
            Shard.parse(wrong)


def test_shards_joined_are_the_sweep_of_one_machine(tmp_path, capsys):
    skills = {0: 0.0, 100: 0.4, 200: 0.8}
    alone = fake_policy.write_run(tmp_path / "a" / "demo", skills)
    run_sweep(alone)
    run = fake_policy.write_run(tmp_path / "b" / "demo", skills)
    evaluation = run / "evaluation"
    for half in ("selection", "report"):
        for k in range(3):
            run_sweep(run, shard=f"{k}/3")
            printed = capsys.readouterr().out
            assert f"part {k} of 3" in printed and "vlatune merge" in printed
            parts = [read(path) for path in sorted(evaluation.glob("shard-*")) if len(read(path))]
            assert set(parts[-1]["split"]) <= {"selection", half}
        assert (evaluation / "chosen.json").exists() == (half == "report")
        main([str(run)])
        assert f"episodes of 3 files: {evaluation / 'episodes.csv'}" in capsys.readouterr().out
    key = ["split", "actor", "step", "task_id", "init_state"]
    found, expected = (
        read(one).drop(columns=[*CLOCK, "video"]).sort_values(key).reset_index(drop=True) for one in (run, alone)
    )
    pd.testing.assert_frame_equal(found, expected)
    assert json.loads((evaluation / "chosen.json").read_text()) == json.loads(
        (alone / "evaluation" / "chosen.json").read_text()
    )
    videos = [video for video in read(run)["video"] if video]
    assert len(videos) == len([video for video in read(alone)["video"] if video])
    assert all((evaluation / video).is_file() for video in videos), "they stay where they are, and are still found"
    before = (evaluation / "episodes.csv").read_text()
    run_sweep(run)
    assert (evaluation / "episodes.csv").read_text() == before, "nothing is left to run"


def test_an_episode_that_always_fails_to_run_ends_the_parts_all_the_same(tmp_path, capsys):
    """Its own part tries it again; the others count it and go on to the report half."""
    run = fake_policy.write_run(tmp_path / "demo", {0: 0.0, 100: 0.9})
    trouble = tmp_path / "trouble"
    trouble.mkdir()
    (trouble / "1_1.exit").touch()
    for _ in range(2):
        for k in range(2):
            run_sweep(run, shard=f"{k}/2", trouble=trouble, controls=False, videos=0)
        merge(MergeConfig(paths=(run,)))
    frame = read(run)
    assert list(frame[frame["outcome"] == "error"]["init_state"]) == [1]
    assert len(frame) == 9 + 12 and (run / "evaluation" / "chosen.json").exists()


def write(path: Path, *rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, rows)
    return path


def test_an_ending_replaces_an_error_and_equal_rows_are_one(tmp_path):
    success = row(init_state=1, outcome="success", success=True, wall_s=1.0, video="videos/x.mp4")
    error = row(init_state=2, outcome="error", success=None, error="lost twice", video="")
    first = write(tmp_path / "one" / "episodes.csv", success, error)
    second = write(
        tmp_path / "two" / "episodes.csv",
        replace(success, wall_s=2.0),
        replace(error, outcome="failure", success=False),
    )
    text = merge(MergeConfig(paths=(first, second.parent), out=tmp_path / "all"))
    assert text.startswith("2 episodes of 2 files: ")
    frame = read(tmp_path / "all")
    assert list(frame["outcome"]) == ["success", "failure"]
    assert frame["video"][0] == "../one/videos/x.mp4"
    merge(MergeConfig(paths=(first,), out=tmp_path / "all"))
    pd.testing.assert_frame_equal(read(tmp_path / "all"), frame)  # joined again it is the same
    late = write(
        tmp_path / "three" / "episodes.csv", replace(error, outcome="failure", success=False, video="late.mp4")
    )
    merge(MergeConfig(paths=(late,), out=tmp_path / "all"))
    assert list(read(tmp_path / "all")["video"]) == ["../one/videos/x.mp4", "../three/late.mp4"], "recorded since"
    assert "1 of them errors, which the next sweep runs again" in merge(
        MergeConfig(paths=(first,), out=tmp_path / "first")
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"outcome": "failure", "success": False},
            r"contradict each other on .* task 1 init state 1 .*success True and False",
        ),
        ({"mujoco": "9.9"}, "mujoco '.*' and '9.9'"),
        ({"run": "other"}, "are of different runs .* compare them with vlatune report"),
    ],
)
def test_contradictions_are_refused_and_nothing_is_written(tmp_path, change, said):
    one = row(init_state=1, outcome="success", success=True)
    paths = (
        write(tmp_path / "a" / "episodes.csv", one),
        write(tmp_path / "b" / "episodes.csv", replace(one, **change)),
    )
    with pytest.raises(DataError, match=said):
        merge(MergeConfig(paths=paths, out=tmp_path / "all"))
    assert not (tmp_path / "all" / "episodes.csv").exists()


def test_what_cannot_be_joined(tmp_path):
    run = fake_policy.write_run(tmp_path / "demo", {100: 0.5})
    with pytest.raises(DataError, match=r"demo has no shards .*vlatune sweep RUN --shard 0/2"):
        merge(MergeConfig(paths=(run,)))
    one = write(tmp_path / "a" / "episodes.csv", row())
    with pytest.raises(DataError, match="several files are joined into a folder of their own; add --out"):
        merge(MergeConfig(paths=(one, one)))
    with EpisodeLog(tmp_path / "held"), pytest.raises(DataError, match="another sweep is writing"):
        merge(MergeConfig(paths=(one,), out=tmp_path / "held"))
