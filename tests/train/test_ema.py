"""The average's arithmetic; under ZeRO, test_engines.py compares it with one process."""

import pytest
import torch
from torch import nn

from vlatune.data.episodes import DataError
from vlatune.train.ema import Ema, EmaConfig


def test_the_decay_grows_up_to_its_limit():
    config = EmaConfig(decay=0.9, power=0.75)
    decays = [config.decay_at(n) for n in range(200)]
    assert decays[0] == 0
    assert decays[1] == pytest.approx(1 - 2**-0.75)
    assert decays[-1] == 0.9
    assert decays == sorted(decays)
    assert {EmaConfig(decay=0.9).decay_at(n) for n in range(5)} == {0.9}


@pytest.mark.parametrize(
    ("values", "sentence"), [({"decay": 1.0}, "ema.decay is 1.0"), ({"power": 0.0}, "ema.power is 0.0")]
)
def test_bad_settings(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        EmaConfig(**values)


def test_it_averages_what_is_trained_and_gives_the_weights_back(tmp_path):
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    ema = Ema(model, EmaConfig(decay=0.5))
    expected = model.weight.detach().clone()
    for k in range(3):
        with torch.no_grad():
            model.weight.fill_(float(k))
        ema.update()
        expected = 0.5 * expected + 0.5 * k
    with ema.in_place_of_weights():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert model.weight.eq(2.0).all()

    ema.save(tmp_path, rank=0)
    other = Ema(nn.Linear(3, 2), EmaConfig(decay=0.5))
    other.load(tmp_path, rank=0)
    assert other.num_updates == 3
    torch.testing.assert_close(other.shadows[0], expected)
    with pytest.raises(DataError, match="trained without an average; leave ema.decay at 0"):
        other.load(tmp_path, rank=1)
