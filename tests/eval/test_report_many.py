"""The report over several CSVs: which candidate stands for a run, its tables against counts by hand, and the page."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest
from small_evaluations import episodes, write_choice, write_csv

from vlatune.data.episodes import DataError
from vlatune.eval.report.candidates import grids
from vlatune.eval.report.page import main
from vlatune.eval.report.variants import read_variants
from vlatune.eval.results import EpisodeRow, read
from vlatune.eval.statistics import mcnemar_exact, mcnemar_mid_p, paired_difference, wilson

SUITES = ("libero_goal", "libero_spatial")


def solved(rows: list[EpisodeRow], outcomes: list[bool]) -> list[EpisodeRow]:
    """The rows with these outcomes, in their order."""
    return [
        replace(
            row,
            outcome="success" if won else "failure",
            success=won,
            steps_to_success=row.num_steps if won else None,
            failure_mode="" if won else "dropped",
        )
        for row, won in zip(rows, outcomes, strict=True)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A run that chose among a grid and two checkpoints, with videos and a control; a run without a choice; a bare CSV."""
    root = tmp_path_factory.mktemp("several")
    flow = root / "flow run" / "evaluation"
    grid = [
        row
        for n in (1, 10)
        for h in (4, 8)
        for row in episodes(
            "flow run",
            "step_000300-ema",
            0.4 + 0.05 * n,
            split="selection",
            num_sampling_steps=n,
            num_executed_steps=h,
            suites=SUITES,
        )
    ]
    grid += episodes("flow run", "step_000300", 0.5, split="selection", suites=SUITES)
    own = solved(episodes("flow run", "step_000300-ema", 1.0, suites=SUITES), [k % 10 < 9 for k in range(60)])
    own = [replace(row, video=f"videos/{k} {row.outcome}.mp4") if k % 3 == 0 else row for k, row in enumerate(own)]
    blind = episodes("flow run", "step_000300-ema", 0.0, suites=SUITES, actor="blind")
    write_csv(flow / "episodes.csv", grid + own + blind)
    write_choice(flow, own[0], 5)
    (flow / "videos").mkdir()
    for row in own[3:]:  # that of the first is lost
        if row.video:
            (flow / row.video).touch()
            (flow / row.video).with_suffix(".jpg").touch()
    steps = [
        episodes("l1", f"step_{n:06d}", rate, split="selection", objective="l1", num_sampling_steps=1, suites=SUITES)
        for n, rate in ((100, 0.3), (200, 0.6))
    ]
    write_csv(root / "l1" / "evaluation" / "episodes.csv", [row for rows in steps for row in rows])
    other = solved(
        episodes("rs", "step_000500", 1.0, objective="rs_imle", suites=SUITES), [k % 10 < 6 for k in range(60)]
    )
    return [root / "flow run", root / "l1", write_csv(root / "from a friend.csv", other)]


@pytest.fixture(scope="module")
def out(folders, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "comparison"
    main([*map(str, folders), "--out", str(folder)])
    return folder


def test_the_tables_are_the_rows_counted_by_hand(folders, out):
    table = pd.read_csv(out / "variants.csv").set_index("variant")
    assert list(table.index) == ["flow run", "l1", "rs"], "in the order in which they were given"
    flow = table.loc["flow run"]
    assert (flow["checkpoint"], flow["half"], flow["basis"], flow["num_candidates"]) == (
        "step_000300-ema",
        "report",
        "held_out",
        5,
    )
    assert (flow["episodes"], flow["successes"], flow["step"], flow["objective"]) == (60, 54, 300, "flow")
    assert (flow["low"], flow["high"]) == pytest.approx(wilson(54, 60))
    assert flow["success_rate_libero_goal"] == 0.9 and flow["episodes_libero_goal"] == 30
    rows = read(folders[0])
    own = rows[(rows["split"] == "report") & (rows["actor"] == "policy")]
    asked_ms = own["policy_ms_mean"] * own["num_decisions"].astype(float)
    assert flow["policy_ms"] == pytest.approx(asked_ms.sum() / own["num_decisions"].sum())
    assert flow["episode_s"] == pytest.approx(own["wall_s"].sum())
    assert flow["episodes_per_h"] == pytest.approx(3600 / own.loc[own["video"] == "", "wall_s"].mean())
    assert flow["median_steps_to_success"] == own["steps_to_success"].median()
    l1 = table.loc["l1"]
    assert (l1["checkpoint"], l1["half"], l1["basis"], l1["num_candidates"]) == (
        "step_000200",
        "selection",
        "selected_on",
        2,
    )
    rs = table.loc["rs"]
    assert rs["basis"] == "held_out" and pd.isna(rs["num_candidates"]), "a report half says nothing of the candidates"

    compared = pd.read_csv(out / "comparisons.csv")
    assert list(compared[["first", "second"]].iloc[0]) == ["flow run", "rs"] and len(compared) == 1
    only_flow, only_rs = 18, 0  # of every ten episodes 9 and the same 6
    pair = compared.iloc[0]
    assert (pair["pairs"], pair["only_first"], pair["only_second"]) == (60, only_flow, only_rs)
    assert (pair["low"], pair["high"]) == pytest.approx(paired_difference(only_flow, only_rs, 60))
    assert pair["p_exact"] == pair["p_holm"] == pytest.approx(mcnemar_exact(only_flow, only_rs))
    assert pair["p_mid"] == pytest.approx(mcnemar_mid_p(only_flow, only_rs))

    candidates = pd.read_csv(out / "candidates.csv")
    overall = candidates[candidates["suite"].isna()]
    assert len(overall) == 5 + 2 + 1 and overall["episodes"].eq(60).all()
    assert "step_000300-ema, N 1, H 4" in set(overall["candidate"])


def test_a_grid_is_of_one_checkpoint_with_all_else_equal(folders):
    variant = read_variants(folders)[0]
    (grid,) = grids(variant.selection, variant.candidate["weights_hash"])
    rows = read(folders[0])
    rows = rows[(rows["split"] == "selection") & (rows["checkpoint"] == "step_000300-ema")]
    for cell in grid.cells.to_dict("records"):
        own = rows[
            (rows["num_sampling_steps"] == cell["num_sampling_steps"])
            & (rows["num_executed_steps"] == cell["num_executed_steps"])
        ]
        assert (cell["episodes"], cell["successes"]) == (60, (own["outcome"] == "success").sum())
    assert len(grid.cells) == 4 and grid.checkpoint == "step_000300-ema"
    ensembled = variant.selection.assign(
        sampling=variant.selection["sampling"].str.replace("{", '{"temporal_ensemble": 0.01, ')
    )
    both = grids(pd.concat([variant.selection, ensembled]), None)
    assert [each.settings for each in both] == ["objective flow", "objective flow, temporal ensemble 0.01"]
    assert grids(read_variants(folders)[1].selection, None) == [], "checkpoints alone are no grid"


def test_table_md_is_ready_for_a_paper(out):
    text = (out / "table.md").read_text()
    assert "| 90.0 (79.9–95.3) " in text and "| l1* " in text and "\\* chosen on these very episodes" in text
    assert "no common episode" in text and "< 0.0001" in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [len(lines) for lines in tables] == [2 + 3, 2 + 1]
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1, "every line has every column"


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href", "poster") and value]


def test_the_page_stands_on_its_own(out):
    page = (out / "index.html").read_text()
    links = Links()
    links.feed(page)
    inline = [link for link in links.sources if link.startswith("data:image/svg+xml")]
    assert len(inline) == 7, "success, latency, time, solved over time, a heat map, training, failures"
    files = set(links.sources) - set(inline)
    assert all((out / unquote(link)).is_file() for link in files), "relative, and nothing that is not there"
    assert not re.search(r"https?://", page)
    assert "Success of flow run, step_000300-ema over denoising steps" in page
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "chosen on these very episodes: its rate is biased upwards" in text
    assert "flow run and l1 share no episode" in text
    assert "1 video that the CSVs name is not there" in text
    shown = [unquote(link) for link in links.sources if link.endswith(".mp4")]
    kinds = ["failure" in link for link in shown]
    assert kinds == sorted(kinds, reverse=True) and kinds[0], "failures first"
    assert "dropped 2 recorded" in text and "success 17 recorded, 11 of them not shown" in text
    before = (out / "index.html").read_bytes()
    assert b"NaN" not in before and b"nan" not in re.sub(rb"base64,[A-Za-z0-9+/=]*", b"", before)


def test_shards_of_a_run_are_one_run_and_namesakes_are_two(tmp_path):
    rows = episodes("demo", "step_000100", 0.5)
    error = replace(rows[0], outcome="error", success=None, error="lost")
    first = write_csv(tmp_path / "a.csv", [error, *rows[1:20]])
    second = write_csv(tmp_path / "b.csv", [rows[0], *rows[15:]])
    (joined,) = read_variants([first, second])
    assert joined.name == "demo" and len(joined.judged) == 30 and (joined.judged["outcome"] != "error").all()
    namesake = write_csv(tmp_path / "c.csv", [replace(row, weights_hash="other") for row in rows])
    assert [variant.name for variant in read_variants([first, namesake])] == [f"demo ({first})", f"demo ({namesake})"]


def test_without_a_choice_the_best_that_ran_all_episodes_stands_for_the_run(tmp_path):
    def selection(checkpoint: str, outcomes: list[bool], **changes) -> list[EpisodeRow]:
        rows = episodes("demo", checkpoint, 1.0, split="selection", num_tasks=1, num_episodes=len(outcomes), **changes)
        return solved(rows, outcomes)

    raced = selection("step_000300", [True] * 3)  # dropped early: three of three say little
    good, equal = selection("step_000100", [True] * 8 + [False] * 2), selection("step_000200", [False] * 2 + [True] * 8)
    cheaper = selection("step_000200", [True] * 8 + [False] * 2, num_sampling_steps=5)
    csv = write_csv(tmp_path / "episodes.csv", raced + cheaper + good + equal)
    (variant,) = read_variants([csv])
    assert (variant.candidate["checkpoint"], variant.candidate["num_sampling_steps"]) == ("step_000200", 5)
    assert (variant.basis, variant.num_candidates) == ("selected_on", 4)
    report = episodes("demo", "step_000100", 0.5)
    (variant,) = read_variants([write_csv(csv, raced + cheaper + good + equal + report)])
    assert (variant.candidate["checkpoint"], variant.half, variant.basis) == ("step_000100", "report", "held_out")
    (variant,) = read_variants([write_csv(csv, good)])
    assert variant.basis == "single"


def test_nothing_succeeds(tmp_path, monkeypatch, capsys):
    csvs = [write_csv(tmp_path / f"{name}.csv", episodes(name, "step_000100", 0.0)) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    main([*map(str, csvs)])
    assert (tmp_path / "report" / "index.html").is_file(), "where --out is not given"
    assert re.search(r"a +0\.0 % +\[ +0\.0, +11\.4\] +0/30", capsys.readouterr().out)


def test_what_cannot_be_reported(tmp_path):
    rows = episodes("demo", "step_000100", 0.5)
    first = write_csv(tmp_path / "a.csv", rows)
    turned = replace(rows[3], outcome="failure" if rows[3].success else "success")
    second = write_csv(tmp_path / "b.csv", [*rows[:3], turned])
    with pytest.raises(
        DataError,
        match=r"two rows of one episode say success and failure \(step_000100, .* init state 28.*a\.csv, .*b\.csv",
    ):
        read_variants([first, second])
    longer = [replace(row, max_steps=300) for row in rows]
    (variant,) = read_variants([write_csv(tmp_path / "c.csv", rows + longer)])
    assert set(variant.judged["max_steps"]) == {300} and variant.num_other_rows == len(rows), (
        "the latest rules, unmixed"
    )
    with pytest.raises(DataError, match=r"has no episode yet; `vlatune sweep RUN` runs them"):
        read_variants([first, write_csv(tmp_path / "d.csv", [])])
    with pytest.raises(DataError, match="no row of a policy in"):
        read_variants([write_csv(tmp_path / "e.csv", [replace(row, actor="zero", weights_hash="") for row in rows])])
    lost = [replace(row, outcome="error", success=None, error="lost") for row in rows]
    with pytest.raises(DataError, match="every episode of step_000100 ended in an error"):
        read_variants([write_csv(tmp_path / "f.csv", lost)])
    with pytest.raises(DataError, match="no candidate ended an episode of every task"):
        read_variants([write_csv(tmp_path / "g.csv", [replace(row, split="selection") for row in lost])])
    chosen = write_csv(tmp_path / "h" / "episodes.csv", rows)
    write_choice(chosen.parent, replace(rows[0], weights_hash="gone"), 1)
    with pytest.raises(DataError, match=r"chosen\.json names step_000100, and no row is of its weights"):
        read_variants([chosen])
    with pytest.raises(ValueError, match=r"--out .*a\.csv is a file; name a folder"):
        main([str(first), "--out", str(first)])
