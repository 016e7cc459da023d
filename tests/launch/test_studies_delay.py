"""The delay study with a world of points and policies that tremble: what it runs, what it goes on with, and its tables by hand."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from small_studies import FAKES, FakePocket, is_a_picture, read

from vlatune.data.episodes import DataError
from vlatune.eval.statistics import mcnemar_exact, wilson
from vlatune.launch.studies import delay
from vlatune.launch.studies.delay_report import compare, findings, grouped, summarise
from vlatune.launch.studies.pocket import PocketSettings


def small(out: Path, cache: Path, **changes) -> delay.DelayConfig:
    settings = PocketSettings(num_steps=100, episodes=2, num_workers=1)
    return delay.DelayConfig(
        out=out, cache=cache, delays=(0, 3), num_executed_steps=4, horizon=10, settings=settings, **changes
    )


def test_every_way_is_asked_for_as_a_sweep_would_be():
    config = delay.DelayConfig(delays=(0, 2))
    assert config.arms() == [
        *[(way, 0) for way in ("hold", "ensemble", "real_time")],
        *[(way, 2) for way in ("hold", "previous", "ensemble", "real_time")],
    ]
    asked = {way: config.sampling(way, 2) for way, at in config.arms() if at == 2}
    assert {way: one.while_waiting for way, one in asked.items()} == {
        "hold": "hold",
        "previous": "previous",
        "ensemble": "previous",
        "real_time": "previous",
    }
    assert [way for way, one in asked.items() if one.temporal_ensemble is not None] == ["ensemble"]
    assert [way for way, one in asked.items() if one.real_time_chunking != "off"] == ["real_time"]
    assert delay.DelayConfig(delays=(0,), ways=("previous",)).arms() == [("previous", 0)]


def test_it_runs_what_is_missing_and_writes_all_files(small_cache, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FAKES)
    import fake_point_world

    fake, asked = FakePocket(), []

    def load(checkpoint, config):
        asked.append((config.inference_delay, config.while_waiting, config.real_time_chunking))
        return fake.load_policy(checkpoint, config)

    make_benchmark = partial(fake_point_world.make, None, False, "pocket")
    config = small(tmp_path / "study", small_cache.path, ways=("hold", "previous", "real_time"))
    delay.run(config, train=fake.train, load=load, make_benchmark=make_benchmark)
    assert asked == [
        (0, "hold", "off"),
        (0, "previous", "exponential"),
        (3, "hold", "off"),
        (3, "previous", "off"),
        (3, "previous", "exponential"),
    ]
    rows = read(config.out / "results.csv")
    assert len(rows) == 5 * 3 * 2, "arms, tasks, init states"
    steps = {
        way: [int(r["num_steps"]) for r in rows if r["way"] == way and r["inference_delay"] == "3"]
        for way in config.ways
    }
    assert sum(steps["hold"]) > sum(steps["previous"])
    summary = {(row["way"], row["inference_delay"]): row for row in read(config.out / "summary.csv")}
    assert len(summary) == 6 and summary["previous", "0"]["success"] == summary["hold", "0"]["success"]
    assert is_a_picture(config.out / "figure.png")
    paragraph = (config.out / "findings.md").read_text()
    assert "1 training seed, 6 episodes a point" in paragraph and "nan" not in paragraph and "inf" not in paragraph

    # More episodes go on from those that are there; the policy is not trained again.
    more = small(config.out, small_cache.path, ways=("hold", "previous", "real_time"))
    more = replace(more, settings=replace(more.settings, episodes=3))
    delay.run(more, train=None, load=load, make_benchmark=make_benchmark)
    after = read(config.out / "results.csv")
    assert len(after) == 5 * 3 * 3 and all(row in after for row in rows)
    with pytest.raises(DataError, match="other settings: max_guidance was 5.0, now 2.0"):
        delay.run(replace(more, max_guidance=2.0), train=None, load=load, make_benchmark=make_benchmark)


def row(way: str, at: int, init_state: int, won: bool, **changes):
    usual = {
        "outcome": "success" if won else "failure",
        "num_steps": 50 + init_state,
        "seam_jump": 0.1 * (init_state + 1),
    }
    rest = {"smoothness": 0.2, "action_saturation": 0.01, "policy_ms": None}
    return {
        "way": way,
        "inference_delay": at,
        "seed": 0,
        "task_id": 0,
        "init_state": init_state,
        **usual,
        **rest,
        **changes,
    }


def test_the_tables_by_hand():
    records = [row("hold", 0, k, True) for k in range(8)]
    records += [row("previous", 2, k, k < 2) for k in range(8)]
    records += [row("real_time", 2, k, k != 0) for k in range(7)] + [row("real_time", 2, 7, False, outcome="error")]
    groups = grouped(records)
    assert list(groups) == [("hold", 0), ("previous", 0), ("previous", 2), ("real_time", 2)]
    assert groups["previous", 0] == groups["hold", 0]
    naive = summarise(groups["previous", 2])
    assert naive["success"] == pytest.approx((0.25, *wilson(2, 8)))
    assert naive["steps_to_success"].mean == 50.5, "of the successes"
    assert naive["seam_jump"].mean == pytest.approx(0.45)
    assert "policy_ms" not in naive
    (pair,) = compare(groups)
    assert (pair["way"], pair["inference_delay"], pair["episodes"]) == ("real_time", 2, 7), (
        "without the one that crashed"
    )
    assert (pair["only_way"], pair["only_previous"]) == (5, 1)
    assert pair["difference"] == pytest.approx(4 / 7)
    assert pair["mcnemar_p"] == pair["holm_p"] == pytest.approx(mcnemar_exact(5, 1))
    summary = {group: summarise(rows) for group, rows in groups.items()}
    told = findings(groups, summary, [{**pair, "holm_p": 0.001}])
    assert "Delay 2: success previous chunk 25 %" in told
    assert "real-time chunking at delay 2 (+57 points, p = 0.001)" in told
    assert "no way is told apart" in findings(groups, summary, [pair])


@pytest.mark.parametrize("delays", [(0, 9), (-1,), ()])
def test_delays_that_chunks_do_not_bridge_are_refused(delays):
    with pytest.raises(
        ValueError, match="can go on with the previous chunk for 0 to 8 steps" if delays else "at least one"
    ):
        delay.DelayConfig(delays=delays)


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.timeout(1800)  # two minutes on two quiet cores
def test_it_runs_for_real(tmp_path):
    """Demonstrations, cache, two ranks, simulator, guided sampling."""
    settings = ["--num-steps", "2", "--episodes", "1", "--demos", "2", "--delays", "0", "2"]
    delay.main(["--out", str(tmp_path / "study"), *settings])
    rows = read(tmp_path / "study" / "results.csv")
    assert len(rows) == 7 * 4 and not any(row["outcome"] == "error" for row in rows)
