"""`vlatune runs`: every run that lies there, and what its folder says."""

import dataclasses
import io
import json

import pandas as pd
import pytest

from vlatune.data.episodes import DataError
from vlatune.train.recipes import load_recipe
from vlatune.train.runs import COLUMNS, main, runs_table


def make_run(folder, recipe="tiny", *, step=0, metrics=""):
    """What training leaves, without weights."""
    checkpoint = folder / "checkpoints" / f"step_{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").touch()
    config = {**dataclasses.asdict(load_recipe(recipe)), "world_size": 2}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    if metrics:
        (folder / "metrics.csv").write_text(metrics)
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two runs, one of them deep and reached by a link, and a folder of another program."""
    metrics = "step,loss,validation_loss,samples_per_s\n1,0.5,0.875,100\n2,0.25,,200\n3,0.1"
    make_run(tmp_path / "runs" / "a", step=2, metrics=metrics)
    elsewhere = make_run(tmp_path / "large disk" / "stages", "tiny_stages", step=4)
    (tmp_path / "runs" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "runs" / "deep" / "er" / "stages").symlink_to(elsewhere)
    (tmp_path / "runs" / "foreign" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "foreign" / "config.json").write_text('{"model": "resnet"}')
    make_run(tmp_path / "runs" / "a" / "evaluation" / "inner")  # a run's own folder is not searched
    make_run(tmp_path / "runs" / ".trash" / "old")
    (tmp_path / "runs" / "deep" / "round").symlink_to(tmp_path / "runs")
    return tmp_path / "runs"


def test_what_is_listed(runs):
    table = runs_table([runs]).set_index("run")
    assert list(table.index) == [str(runs / "a"), str(runs / "deep" / "er" / "stages"), str(runs / "foreign")]
    a, stages, foreign = (row for _, row in table.iterrows())
    assert a["state"] == "at step 2 of 4"
    assert a[["objective", "trained", "batch", "engine", "ranks"]].tolist() == ["flow", "full", 4, "zero2", 2]
    assert a[["loss", "validation_loss", "samples_per_s"]].tolist() == [0.25, 0.875, 200], (
        "the last of each, of whole lines"
    )
    assert stages["state"] == "finished"
    assert stages[["objective", "trained"]].tolist() == ["flow, rs_imle", "expert, lora+expert"]
    assert stages[["loss", "action_error"]].isna().all()
    assert foreign["state"] == "config.json is not of a run of vlatune"


def test_the_table_is_aligned_and_csv_is_whole(runs, capsys):
    main([str(runs)])
    head, *lines = capsys.readouterr().out.splitlines()
    assert tuple(head.split()) == COLUMNS
    for line in lines[:2]:
        assert line[head.index("state") :].startswith(("at step 2 of 4  ", "finished  "))
    assert lines[0][: head.index("  validation_loss")].endswith(" 0.25")

    main([str(runs), str(runs / "a"), "--csv"])
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert tuple(table.columns) == COLUMNS
    assert len(table) == 3, "a run that lies in two of the folders is listed once"
    assert table["batch"].dropna().tolist() == [4, 4]


def test_bad_folders_are_one_sentence(tmp_path):
    with pytest.raises(DataError, match="there is no folder .*nowhere; type `vlatune runs FOLDER`"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match=r"no run \(a folder with config.json and checkpoints/\) lies under"):
        main([str(tmp_path)])
