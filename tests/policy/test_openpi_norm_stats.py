"""openpi's statistics: found where they lie, chosen where there are several, refused where there are none."""

import json

import numpy as np
import pytest
import torch

from vlatune.data.episodes import DataError
from vlatune.data.normalise import Normaliser
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
    assert find_norm_stats(checkpoint, "physical-intelligence/libero") == above


def test_several_need_a_choice(tmp_path):
    put(tmp_path / "assets", "trossen")
    libero = put(tmp_path / "assets", "physical-intelligence/libero")
    with pytest.raises(DataError, match="asset ids physical-intelligence/libero, trossen; choose one with --asset-id"):
        find_norm_stats(tmp_path, None)
    with pytest.raises(DataError, match="no asset id 'droid'; it has physical-intelligence/libero, trossen: choose"):
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


@pytest.mark.parametrize("mode", ["mean_std", "quantile"])
@pytest.mark.parametrize("value", [0.0, 5.0])
def test_a_constant_dimension_is_openpis(tmp_path, mode, value):
    """Against openpi's formulas (transforms.py, Normalize and Unnormalize)."""
    mean, std = np.array([value, 1.0]), np.array([0.0, 2.0])
    q01, q99 = np.array([value, -1.0]), np.array([value, 3.0])
    columns = {"mean": mean.tolist(), "std": std.tolist(), "q01": q01.tolist(), "q99": q99.tolist()}
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": columns, "actions": columns}}))
    statistics = read_norm_stats(tmp_path / "norm_stats.json")
    x, y = np.array([value, 2.5]), np.array([0.3, 0.3])
    if mode == "mean_std":
        expected, back = (x - mean) / (std + 1e-6), y * (std + 1e-6) + mean
    else:
        expected, back = (x - q01) / (q99 - q01 + 1e-6) * 2 - 1, (y + 1) / 2 * (q99 - q01 + 1e-6) + q01
    state, actions = (Normaliser(field, mode, 1e-6) for field in (statistics.state, statistics.actions))
    np.testing.assert_allclose(state(torch.from_numpy(x)), expected, atol=1e-5)
    np.testing.assert_allclose(actions.inverse(torch.from_numpy(y)), back, atol=3e-4)
