import numpy as np
import pytest
import torch

from vlatune.data.episodes import DataError
from vlatune.data.normalise import FieldStatistics, Normaliser, Statistics

ROWS_ND = np.random.default_rng(0).normal((3.0, -20.0, 0.0), (0.5, 4.0, 1.0), (1001, 3)).astype(np.float32)
ROWS_ND[:, 2] = 7.0
MODES = ("mean_std", "quantile", "min_max", "identity")


@pytest.fixture
def of_rows() -> FieldStatistics:
    return FieldStatistics.compute(ROWS_ND)


def test_statistics_are_those_of_numpy_in_float64(of_rows):
    rows = ROWS_ND.astype(np.float64)
    np.testing.assert_allclose(of_rows.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(of_rows.std, rows.std(0), rtol=1e-12)
    np.testing.assert_array_equal(of_rows.min, rows.min(0))
    np.testing.assert_array_equal(of_rows.max, rows.max(0))
    np.testing.assert_array_equal(of_rows.q01, np.quantile(rows, 0.01, axis=0))
    np.testing.assert_array_equal(of_rows.q99, np.quantile(rows, 0.99, axis=0))
    assert of_rows.count == 1001


def test_only_the_chosen_rows_count():
    chosen = np.arange(1001) % 3 == 0
    assert FieldStatistics.compute(ROWS_ND, chosen) == FieldStatistics.compute(ROWS_ND[chosen])
    assert FieldStatistics.compute(ROWS_ND, chosen) != FieldStatistics.compute(ROWS_ND)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="statistics of no rows"):
        FieldStatistics.compute(ROWS_ND, np.zeros(1001, bool))


@pytest.mark.parametrize("mode", MODES)
def test_inverse_undoes_forward(of_rows, mode):
    normaliser = Normaliser(of_rows, mode)
    rows = torch.from_numpy(ROWS_ND)
    torch.testing.assert_close(normaliser.inverse(normaliser(rows)), rows, rtol=1e-5, atol=1e-5)
    unit = torch.linspace(-1, 1, 30).reshape(2, 5, 3)
    torch.testing.assert_close(normaliser(normaliser.inverse(unit)), unit, rtol=1e-4, atol=1e-5)


def test_each_mode_maps_what_it_says(of_rows):
    rows = torch.from_numpy(ROWS_ND)
    scaled = {mode: Normaliser(of_rows, mode)(rows)[:, :2] for mode in MODES}
    torch.testing.assert_close(scaled["mean_std"].mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled["mean_std"].std(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled["min_max"].amin(0), -torch.ones(2))
    torch.testing.assert_close(scaled["min_max"].amax(0), torch.ones(2))
    torch.testing.assert_close(scaled["quantile"].quantile(0.01, dim=0), -torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled["quantile"].quantile(0.99, dim=0), torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled["identity"], rows[:, :2])


@pytest.mark.parametrize("mode", ["mean_std", "quantile", "min_max"])
def test_a_constant_dimension_is_centred_and_not_scaled(of_rows, mode):
    normaliser = Normaliser(of_rows, mode)
    torch.testing.assert_close(normaliser(torch.tensor([0.0, 0.0, 7.5]))[2], torch.tensor(0.5))


def test_buffers_stay_float32_and_exact_when_the_model_becomes_bfloat16(of_rows):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), Normaliser(of_rows, "mean_std"))
    before = model[1].centre_D.clone()
    model.to(torch.bfloat16).half()
    assert model[0].weight.dtype == torch.float16
    assert model[1].scale_D.dtype == model[1].centre_D.dtype == torch.float32
    torch.testing.assert_close(model[1].centre_D, before, rtol=0, atol=0)
    assert model[1](torch.zeros(1, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_model_made_on_meta_gets_its_numbers_when_it_is_materialised(of_rows):
    with torch.device("meta"):
        normaliser = Normaliser(of_rows, "mean_std")
    assert normaliser.centre_D.is_meta
    normaliser.to_empty(device="cpu")
    torch.testing.assert_close(normaliser.centre_D, torch.tensor(of_rows.mean, dtype=torch.float32))


def test_nothing_is_in_the_state_dict(of_rows):
    assert not Normaliser(of_rows, "mean_std").state_dict()


def test_unknown_mode_is_refused(of_rows):
    with pytest.raises(ValueError, match="mode is 'z_score'; it can be mean_std, quantile, min_max, identity"):
        Normaliser(of_rows, "z_score")


def test_file_round_trip_is_exact(tmp_path):
    statistics = Statistics.compute(ROWS_ND, ROWS_ND[:, :2])
    statistics.save(tmp_path / "statistics.json")
    assert Statistics.load(tmp_path / "statistics.json") == statistics
    assert [p.name for p in tmp_path.iterdir()] == ["statistics.json"]


def test_missing_and_damaged_files_are_one_sentence(tmp_path):
    with pytest.raises(DataError, match="there are no statistics at .*nothing.json"):
        Statistics.load(tmp_path / "nothing.json")
    (tmp_path / "half.json").write_text('{"state": {"mean": [1')
    with pytest.raises(DataError, match=r"half\.json does not hold statistics"):
        Statistics.load(tmp_path / "half.json")
