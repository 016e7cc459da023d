"""Numbers of episodes against published tables, exact power against simulation."""

import re

import numpy as np
import pytest

from vlatune.eval.power import (
    PowerConfig,
    detectable_gain,
    discordance,
    discordance_range,
    episodes_paired,
    episodes_unpaired,
    main,
    power_paired,
    power_unpaired,
)
from vlatune.eval.statistics import mcnemar_exact


@pytest.mark.parametrize(
    ("first", "second", "two_sided", "one_sided", "at_90"),
    [
        (0.90, 0.95, 435, 343, 582),
        (0.92, 0.97, 326, 257, 435),
        (0.94, 0.97, 749, 590, 1002),
        (0.94, 0.96, 1863, 1468, 2494),
        (0.95, 0.97, 1506, 1187, 2016),
        (0.96, 0.97, 5301, 4176, 7096),
    ],
)
def test_episodes_unpaired(first, second, two_sided, one_sided, at_90):
    assert episodes_unpaired(first, second) == two_sided == episodes_unpaired(second, first)
    assert episodes_unpaired(first, second, alpha=0.1) == one_sided
    assert episodes_unpaired(first, second, power=0.9) == at_90
    assert power_unpaired(first, second, two_sided) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(("discordant", "pairs"), [(0.0864, 752), (0.06, 521), (0.04, 347), (0.032, 277)])
def test_episodes_paired(discordant, pairs):
    assert episodes_paired(0.94, 0.97, discordant) == pairs
    assert 0.75 < power_paired(0.94, 0.97, discordant, pairs) < 0.8, "the exact test is a little too cautious"


@pytest.mark.parametrize(("episodes", "percent"), [(100, 17), (400, 54), (500, 63), (1000, 90), (2000, 99.6)])
def test_power_of_common_protocols(episodes, percent):
    """The table's own figures are approximations, which differ most at 100 episodes."""
    assert 100 * power_unpaired(0.94, 0.97, episodes) == pytest.approx(percent, abs=2 if episodes == 100 else 0.7)


@pytest.mark.parametrize(
    ("rate", "episodes", "gain"),
    [
        (0.8, 50, 17.2),
        (0.8, 200, 9.9),
        (0.9, 200, 6.9),
        (0.95, 500, 3.2),
        (0.8, 2000, 3.4),
        (0.96, 2000, 1.56),
        (0.96, 6000, 0.94),
    ],
)
def test_detectable_gain(rate, episodes, gain):
    found = detectable_gain(rate, episodes)
    assert 100 * found == pytest.approx(gain, abs=0.3 if episodes == 50 else 0.1)
    assert episodes_unpaired(rate, rate + found) in (episodes, episodes + 1)
    assert detectable_gain(0.94, 100) is None and detectable_gain(1.0, 100) is None
    assert detectable_gain(0.0, 100) > 0.01


def test_power_unpaired_is_that_of_the_z_test():
    """Simulated: 40,000 evaluations, standard error at most 0.25 pp."""
    rng, n = np.random.default_rng(0), 120
    rates = rng.binomial(n, [[0.7], [0.85]], size=(2, 40_000)) / n
    pooled = rates.mean(axis=0)
    z = (rates[1] - rates[0]) / np.sqrt(2 * pooled * (1 - pooled) / n)
    assert power_unpaired(0.7, 0.85, n) == pytest.approx(np.mean(np.abs(z) > 1.959964), abs=0.01)


def test_power_paired_is_that_of_mcnemar():
    """Simulated with `mcnemar_exact` itself: 40,000 evaluations, standard error at most 0.25 pp."""
    rng, pairs, first, second, discordant = np.random.default_rng(0), 90, 0.7, 0.85, 0.25
    only_first, only_second = (discordant + first - second) / 2, (discordant + second - first) / 2
    drawn = rng.multinomial(pairs, [only_first, only_second, 1 - discordant], size=40_000)
    kinds, counts = np.unique(drawn[:, :2], axis=0, return_counts=True)
    rejected = sum(count for (b, c), count in zip(kinds, counts, strict=True) if mcnemar_exact(int(b), int(c)) <= 0.05)
    assert power_paired(first, second, discordant, pairs) == pytest.approx(rejected / 40_000, abs=0.01)
    assert power_paired(0.5, 0.9, 0.4, 5) == 0, "five pairs can never reject: 2 / 32 is above 0.05"
    assert power_paired(0.5, 0.9, 0.4, 6) == pytest.approx(0.4**6), "six can, if all are discordant"


def test_discordance():
    assert discordance(0.94, 0.97, 0) == pytest.approx(0.0864)
    low, high = discordance_range(0.94, 0.97)
    assert (low, high) == pytest.approx((0.03, 0.09))
    rng = np.random.default_rng(0)
    first = rng.random(400_000) < 0.7
    second = np.where(rng.random(first.size) < 0.5, first, rng.random(first.size) < 0.8)
    correlation = np.corrcoef(first, second)[0, 1]
    measured = discordance(first.mean(), second.mean(), correlation)
    assert measured == pytest.approx(np.mean(first != second), abs=1e-6)


def test_the_command_prints_a_table(capsys):
    main(["0.94", "0.97", "--paired-discordance", "0.06", "--episodes", "500", "--power", "0.8"])
    rows = [re.split(" {2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert ["independent episodes", "749 (80.9%)", "63.5%"] in rows
    assert ["pairs, ψ 0.06", "521 (76.4%)", f"{power_paired(0.94, 0.97, 0.06, 500):.1%}"] in rows
    assert ["gain over 0.94 found with 80% power", "+3.6 pp"] in rows


def test_designs_that_are_impossible_are_not_shown(capsys):
    main(["0.3", "0.95"])
    out = capsys.readouterr().out
    assert "correlation 0 (ψ 0.68)" in out and "correlation 0.25" not in out
    main(["0", "0.1"])
    out = capsys.readouterr().out
    assert "correlation 0 (ψ 0.1)" in out and "correlation 0.25" not in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"first": 94, "second": 0.97}, "the first success rate is 94; rates are shares"),
        ({"first": 0.9, "second": 0.9}, "no number of episodes tells equal policies apart"),
        ({"first": 0.9, "second": 0.8, "power": (80.0,)}, "--power 80: a probability between 0 and 1"),
        ({"first": 0.9, "second": 0.8, "alpha": 0.0}, "--alpha 0: a probability between 0 and 1"),
        ({"first": 0.9, "second": 0.8, "episodes": (0,)}, "--episodes 0: at least 1"),
        ({"first": 0.94, "second": 0.97, "paired_discordance": (0.01,)}, "disagree on 0.03 to 0.09 of them"),
    ],
)
def test_refusals(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        PowerConfig(**arguments)
