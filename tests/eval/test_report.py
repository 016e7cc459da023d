"""The report: its numbers are those of the rows, and its page stands on its own."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import fake_point_world
import fake_policy
import pandas as pd
import pytest
from small_evaluations import episodes, write_csv

from vlatune.data.episodes import DataError
from vlatune.eval.episode_log import EpisodeLog
from vlatune.eval.report.page import main
from vlatune.eval.report.run_page import write_run_report
from vlatune.eval.report.tables import Evaluation, by_actor, ranges, read_evaluation, time_split
from vlatune.eval.results import EpisodeRow, read
from vlatune.eval.sweep import SweepConfig, sweep


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A swept run, and its report."""
    path = fake_policy.write_run(tmp_path_factory.mktemp("runs") / "demo run", {0: 0.0, 100: 0.4, 200: 0.75})
    config = SweepConfig(
        runs=(path,),
        selection_episodes=4,
        report_episodes=6,
        controls=True,
        videos=1,
        num_workers=2,
        baselines=("zero",),
    )
    sweep(config, make_benchmark=fake_point_world.make, load_policy=fake_policy.load_policy)
    write_run_report(path)
    return path


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open_tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href", "poster") and value]
        if tag not in ("meta", "img", "br", "link"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag


def text_of(page: Path) -> str:
    body = re.sub(r"<style>.*?</style>", "", page.read_text(), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_the_page_stands_on_its_own(run):
    from urllib.parse import unquote

    page = run / "evaluation" / "report" / "index.html"
    links = Links()
    links.feed(page.read_text())
    assert not links.open_tags, "well-formed"
    inline = [link for link in links.sources if link.startswith("data:image/svg+xml")]
    assert len(inline) == 5, "success, loss, controls, time, solved over time; no heat map, as there is no grid"
    files = set(links.sources) - set(inline)
    assert all(link.startswith("../") for link in files), "relative, nothing from a network"
    assert all((page.parent / unquote(link)).is_file() for link in files)
    videos = {unquote(link).removeprefix("../") for link in files if link.endswith(".mp4")}
    frame = read(run)
    assert videos == set(frame["video"]) - {""} and len(videos) >= 2 * 3 + 5 * 3, (
        "and failures, where the first was none"
    )


def test_the_headline_is_the_chosen_checkpoint_on_the_report_half(run):
    frame = read(run)
    own = frame[(frame["split"] == "report") & (frame["actor"] == "policy")]
    successes = int(own["success"].sum())
    text = text_of(run / "evaluation" / "report" / "index.html")
    assert f"{100 * successes / 18:.1f} % success of step_000200 {successes} of 18 episodes" in text
    assert "best of 2 checkpoints on init states 0–3 and judged here on init states 10–15" in text
    assert "training made the difference" in text and "the policy heeds the instruction" in text
    assert "short" in text and "0.1.4" in text, "protocol and versions"


def test_the_summary_agrees_with_the_rows(run):
    summary = pd.read_csv(run / "evaluation" / "summary.csv")
    frame = read(run)
    overall = summary[summary["task_id"].isna()]
    assert overall["episodes"].sum() == len(frame) == summary[summary["task_id"].notna()]["episodes"].sum()
    assert overall["successes"].sum() == frame["success"].sum()
    assert set(summary[summary["actor"] == "policy"].groupby("step")["chosen"].first().items()) == {
        (100, False),
        (200, True),
    }
    assert (summary["low"] <= summary["success_rate"]).all() and (summary["success_rate"] <= summary["high"]).all()
    one = summary[(summary["actor"] == "policy") & (summary["split"] == "report") & (summary["task_id"] == 1)].iloc[0]
    rows = frame[(frame["actor"] == "policy") & (frame["split"] == "report") & (frame["task_id"] == 1)]
    assert (one["episodes"], one["successes"]) == (6, rows["success"].sum())
    assert one["mean_steps_to_success"] == pytest.approx(rows["steps_to_success"].mean())


def test_equal_rows_give_an_equal_page(run):
    page = run / "evaluation" / "report" / "index.html"
    before = page.read_bytes()
    write_run_report(run / "evaluation")
    assert page.read_bytes() == before


def test_the_command_prints_the_table(run, capsys):
    main([str(run)])
    printed = capsys.readouterr().out
    assert "step_000200" in printed and "<- chosen" in printed
    assert re.search(r"untrained \(step 0\) .*p < 0\.0001 against the policy|untrained \(step 0\) .*p = ", printed)
    assert "reach the blue dot" in printed and "index.html" in printed


def rows_like(run: Path, folder: Path, keep) -> None:
    """A copy of the run's evaluation with the rows that `keep` returns (changed or not)."""
    with EpisodeLog(run / "evaluation") as source, EpisodeLog(folder) as log:
        for row in source.rows.values():
            kept = keep(row)
            if kept is not None:
                log.append(kept)


def test_an_unfinished_sweep_has_a_report_too(run, tmp_path):
    rows_like(run, tmp_path / "half" / "evaluation", lambda row: row if row.split == "selection" else None)
    printed = write_run_report(tmp_path / "half")
    assert "has not chosen a checkpoint yet" in printed
    text = text_of(tmp_path / "half" / "evaluation" / "report" / "index.html")
    assert "No checkpoint has been chosen yet" in text and "No metrics.csv lies beside" in text


def test_a_blind_policy_that_does_as_well_is_called_out(run, tmp_path):
    def well(row: EpisodeRow) -> EpisodeRow:
        if row.actor == "blind":
            return replace(row, outcome="success", success=True, failure_mode="", steps_to_success=row.num_steps)
        if row.actor == "untrained":
            return replace(row, outcome="error", success=None, error="lost <twice>", failure_mode="")
        return row

    rows_like(run, tmp_path / "evaluation", well)
    chosen = (run / "evaluation" / "chosen.json").read_text()
    (tmp_path / "evaluation" / "chosen.json").write_text(chosen)
    write_run_report(tmp_path)
    page = tmp_path / "evaluation" / "report" / "index.html"
    assert "it is not shown that the policy sees" in text_of(page)
    assert "18 episodes ended in an error" in text_of(page)
    assert "lost &lt;twice&gt;" in page.read_text(), "text from outside is escaped"


def test_rows_of_another_protocol_are_left_out_and_other_settings_are_candidates(run, tmp_path):
    rows_like(run, tmp_path / "evaluation", lambda row: row)
    with EpisodeLog(run / "evaluation") as source, EpisodeLog(tmp_path / "evaluation") as log:
        for row in source.rows.values():
            if row.actor == "policy":
                failed = replace(row, outcome="failure", success=False, steps_to_success=None)
                log.append(replace(failed, num_executed_steps=2))
                log.append(replace(failed, protocol="long"))
    (tmp_path / "evaluation" / "chosen.json").write_text((run / "evaluation" / "chosen.json").read_text())
    evaluation, original = read_evaluation(tmp_path), read_evaluation(run)
    assert evaluation.num_other_rows == 2 * 12 + 18
    pd.testing.assert_frame_equal(by_actor(evaluation), by_actor(original))
    write_run_report(tmp_path)
    page = tmp_path / "evaluation" / "report" / "index.html"
    assert "Success of step_000200 over denoising steps and executed actions" in page.read_text(), "a heat map"
    text = text_of(page)
    assert "step_000200, H 8 ← chosen" in text and "step_000200, H 2 0 %" in text
    assert "42 rows of episodes.csv were run under another protocol or seed" in text


def test_a_control_is_paired_with_the_policy():
    def ended(actor: str, solved: list[bool]) -> list[EpisodeRow]:
        rows = episodes("demo", "step_000100", 1.0, num_tasks=1, num_episodes=len(solved), actor=actor)
        return [replace(row, outcome="success" if won else "failure") for row, won in zip(rows, solved, strict=True)]

    policy = ended("policy", [True] * 12 + [False] * 4 + [True])
    blind = ended("blind", [False] * 12 + [True] * 3 + [False])
    rows = pd.DataFrame([vars(row) for row in policy + blind])
    settings = {name: getattr(policy[0], name) for name in ("sampling", "num_executed_steps")}
    chosen = {"weights_hash": policy[0].weights_hash, "settings": settings}
    table = by_actor(Evaluation(folder=Path(), rows=rows, num_other_rows=0, chosen=chosen, metrics=None))
    found = table.set_index("actor").loc["blind"]
    assert (found["pairs"], found["only_policy"], found["only_other"]) == (16, 12, 3)
    assert round(found["p_value"], 3) == 0.035


def test_a_converted_checkpoint_has_no_step(tmp_path):
    rows = episodes("demo", "step_000001", 0.5, split="selection")
    converted = [replace(row, step=None, checkpoint="pi05_libero") for row in rows]
    write_csv(tmp_path / "demo" / "evaluation" / "episodes.csv", converted)
    assert "pi05_libero" in write_run_report(tmp_path / "demo")


def test_the_time_of_an_episode_is_split_without_recorded_ones(run):
    frame = read(run)
    seconds = time_split(frame)
    asked = frame[(frame["video"] == "") & (frame["actor"] != "zero")]
    assert sum(seconds.values()) >= asked["wall_s"].mean() * 0.999
    assert seconds["physics"] == pytest.approx(asked["sim_s"].mean())
    assert list(seconds) == ["policy", "waiting for it", "physics", "rendering", "other"]


def test_ranges():
    assert ranges([3, 0, 1, 2]) == "0–3" and ranges([0, 1, 4, 7, 8]) == "0–1, 4, 7–8" and ranges([]) == ""


def test_no_sweep_to_report(tmp_path):
    run = fake_policy.write_run(tmp_path / "demo", {100: 1.0})
    with pytest.raises(DataError, match=r"no episodes\.csv at .*demo; `vlatune sweep RUN`"):
        write_run_report(run)
    EpisodeLog(run / "evaluation").close()
    with pytest.raises(DataError, match=r"has no episode yet; `vlatune sweep .*demo` runs them"):
        write_run_report(run)
    with pytest.raises(DataError, match=r"there is no run folder .*demmo; did you mean .*demo\?"):
        main([str(tmp_path / "demmo")])
    with pytest.raises(ValueError, match="no run was given"):
        main([])


def test_chosen_json_names_the_settings(run):
    chosen = json.loads((run / "evaluation" / "chosen.json").read_text())
    assert chosen["settings"]["num_executed_steps"] == 8 and chosen["settings"]["protocol"] == "short"


def test_an_earlier_choice_does_not_count(run, tmp_path):
    """A checkpoint that an earlier sweep chose has rows on the report half too."""
    rows_like(run, tmp_path / "evaluation", lambda row: row)
    with EpisodeLog(run / "evaluation") as source, EpisodeLog(tmp_path / "evaluation") as log:
        for row in source.rows.values():
            if row.actor == "policy" and row.split == "report":
                log.append(replace(row, step=100, checkpoint="step_000100", weights_hash="demo run-100"))
    (tmp_path / "evaluation" / "chosen.json").write_text((run / "evaluation" / "chosen.json").read_text())
    pd.testing.assert_frame_equal(by_actor(read_evaluation(tmp_path)), by_actor(read_evaluation(run)))
