"""openpi's statistics: found where they lie, chosen where there are several, refused where there are none."""

import json

import pytest

from vlatune.data.episodes import DataError
from vlatune.policy.checkpoints.openpi_norm_stats import find_norm_stats, read_norm_stats

STATS = {
    "norm_stats": {
        "state": {"mean": [0.5, 1], "std": [1, 2], "q01": None, "q99": None},
        "actions": {"mean": [0], "std": [1], "q01": [-1], "q99": [1]},
    }
}


def put(assets, asset_id):
    file = assets / asset_id / "norm_stats.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(STATS))
    return file


def test_beside_the_weights_or_one_folder_up(tmp_path):
    checkpoint = tmp_path / "run" / "30000"
    checkpoint.mkdir(parents=True)
    with pytest.raises(DataError, match=r"no assets/…/norm_stats\.json"):
        find_norm_stats(checkpoint, None)
    above = put(tmp_path / "run" / "assets", "physical-intelligence/libero")
    assert find_norm_stats(checkpoint, None) == above
    beside = put(checkpoint / "assets", "trossen")
    assert find_norm_stats(checkpoint, None) == beside


def test_several_need_a_choice(tmp_path):
    put(tmp_path / "assets", "trossen")
    libero = put(tmp_path / "assets", "physical-intelligence/libero")
    with pytest.raises(DataError, match="asset ids physical-intelligence/libero, trossen; choose one with --asset-id"):
        find_norm_stats(tmp_path, None)
    with pytest.raises(DataError, match="choose one with --asset-id"):
        find_norm_stats(tmp_path, "droid")
    assert find_norm_stats(tmp_path, "physical-intelligence/libero") == libero


def test_what_is_in_it(tmp_path):
    statistics = read_norm_stats(put(tmp_path, "a"))
    assert statistics.state.mean == (0.5, 1.0)
    assert statistics.state.q01 is None
    assert statistics.actions.q99 == (1.0,)
    (tmp_path / "other.json").write_text('{"norm_stats": {"state": 3}}')
    with pytest.raises(DataError, match="does not hold openpi's statistics"):
        read_norm_stats(tmp_path / "other.json")
