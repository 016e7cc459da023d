"""Long because all studies share its small settings and fakes: the toy's geometry, intervals, rows that survive a kill, both toy
studies end to end, and those on pocket with fakes."""

import ast
import json
import math
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from small_studies import FAKES, FakePocket, is_a_picture, read

from vlatune.data.episodes import DataError
from vlatune.eval.statistics import wilson
from vlatune.launch import study
from vlatune.launch.studies import bimodal, chunk, objective, pocket, steps, two_ways
from vlatune.launch.studies.intervals import mean_over_seeds, rate_over_seeds
from vlatune.launch.studies.methods import METHODS
from vlatune.launch.studies.path_scores import PathScores, score
from vlatune.launch.studies.pocket_run import NUM_DRAWS, PocketRun
from vlatune.launch.studies.prose import listed, percent
from vlatune.launch.studies.tables import claim
from vlatune.launch.studies.toy_training import (
    ToySettings,
    make_expert,
    milliseconds_per_path,
    sample_paths,
    train_expert,
    training_demos,
)
from vlatune.train.recipes import load_recipe

STUDIES = Path(study.__file__).parent / "studies"
TINY_TOY = "--seeds 0 1 --shares-right 0.5 --num-demos 40 --num-steps 3 --batch-size 8 --width 16 --num-starts 4 --paths-per-start 3"
CLOCK = ("ms_per_train_step", "ms_per_path")


# The world.


def straight(x_from: float, x_to: float) -> np.ndarray:
    """(1, H, 2): straight lines from (x_from, -1) over (x_to, 0) to the goal."""
    y_H = np.linspace(-1, 1, two_ways.HORIZON + 1)[1:]
    return np.stack([np.interp(y_H, [-1, 0, 1], [x_from, x_to, 0]), y_H], axis=-1)[None]


@pytest.mark.parametrize(
    ("x_to", "clear", "right"), [(0.0, False, True), (0.3, False, True), (0.6, True, True), (-0.6, True, False)]
)
def test_what_is_clear_and_which_side(x_to, clear, right):
    start = np.array([[0.0, -1.0]])
    path = straight(0.0, x_to)
    assert two_ways.is_clear(start, path).tolist() == [clear]
    assert two_ways.reaches_goal(path).tolist() == [True]
    if x_to:
        assert two_ways.goes_right(path).tolist() == [right]


def test_a_leap_over_the_obstacle_crosses_it():
    start, path = np.array([[0.0, -1.0]]), np.tile([0.0, 1.0], (1, two_ways.HORIZON, 1))
    assert not two_ways.is_clear(start, path)[0], "no waypoint is inside, the line to the first is"
    assert two_ways.reaches_goal(path)[0]
    assert not two_ways.reaches_goal(path + 0.2)[0]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.7, 1.0])
def test_demonstrations_are_valid_and_as_many_to_the_right_as_asked(share):
    rng = np.random.default_rng(3)
    demos = two_ways.demonstrate(two_ways.draw_starts(400, rng), share_right=share, rng=rng)
    assert two_ways.is_clear(demos.starts_N2, demos.paths_NH2).all()
    assert two_ways.reaches_goal(demos.paths_NH2).all()
    assert two_ways.goes_right(demos.paths_NH2).mean() == pytest.approx(share)
    assert np.abs(demos.paths_NH2).max() < 1.2, "about the size of normalised actions"


def test_the_side_does_not_follow_from_the_start():
    rng = np.random.default_rng(0)
    demos = two_ways.demonstrate(two_ways.draw_starts(4000, rng), share_right=0.5, rng=rng)
    assert abs(np.corrcoef(demos.starts_N2[:, 0], two_ways.goes_right(demos.paths_NH2))[0, 1]) < 0.05


def test_scores_of_known_paths():
    rng = np.random.default_rng(1)
    starts = np.repeat(two_ways.draw_starts(10, rng), 20, axis=0)
    fresh, other = (two_ways.demonstrate(starts, share_right=0.5, rng=rng).paths_NH2 for _ in range(2))
    good = score(starts, other, fresh, 10)
    assert (good.num_paths, good.valid, good.both_ways) == (200, 1.0, 1.0)
    assert good.right == pytest.approx(0.5)
    assert abs(good.energy_distance) < 0.02
    mean = score(starts, np.broadcast_to(fresh.mean(axis=0), fresh.shape).copy(), fresh, 10)
    assert (mean.valid, mean.right, mean.both_ways) == (0.0, None, 0.0), "between the sides lies the obstacle"
    assert mean.spread == pytest.approx(0, abs=1e-6)
    assert mean.energy_distance > 0.2
    one_side = score(starts, np.abs(other[..., :1]) * [1, 0] + other * [0, 1], fresh, 10)
    assert (one_side.right, one_side.both_ways) == (1.0, 0.0)
    # A side that follows from the start is half right, half left, and not both ways from any start.
    by_start = np.where((np.arange(200) // 20 % 2 == 0)[:, None, None], one_side_paths(other), -one_side_paths(other))
    halves = score(starts, by_start * [1, 0] + other * [0, 1], fresh, 10)
    assert halves.both_ways == 0.0
    assert 0.3 < (halves.right or 0) < 0.7


def one_side_paths(paths_NH2: np.ndarray) -> np.ndarray:
    return np.abs(paths_NH2)


# Intervals.


def test_interval_of_a_mean():
    assert mean_over_seeds([1.0, 2.0, 3.0]) == pytest.approx(
        (2.0, 2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3))
    )
    assert mean_over_seeds([5.0])[1:] == (-math.inf, math.inf)


def test_interval_of_a_rate_is_never_without_width():
    assert rate_over_seeds([0, 0, 0], [100, 100, 100]) == (0.0, 0.0, pytest.approx(wilson(0, 300)[1]))
    assert rate_over_seeds([10, 90], [100, 100]) == (0.5, 0.0, 1.0), "seeds that differ widen it"
    assert rate_over_seeds([30], [100])[1:] == pytest.approx(wilson(30, 100))
    assert rate_over_seeds([1, 0], [2, 0])[0] == 0.5, "a run without a trial says nothing"
    assert math.isnan(rate_over_seeds([0], [0])[0])


def test_numbers_as_words():
    assert [percent(x) for x in (0.0, 0.001, 0.975, 0.996, 0.9999, 1.0)] == [
        "0 %",
        "0.1 %",
        "98 %",
        "99.6 %",
        "100 %",
        "100 %",
    ]
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]


# What is compared.


def test_every_objective_starts_from_the_same_expert():
    settings = ToySettings(width=16)
    experts = {name: make_expert(settings, METHODS[name].make(1), seed=5).state_dict() for name in METHODS}
    plain = experts["flow"]
    for name, weights in experts.items():
        assert plain.keys() <= weights.keys()
        assert all(weights[key].equal(plain[key]) for key in plain), name
    assert experts["shortcut"].keys() > plain.keys(), "one embedding more, for its second time input"
    other = make_expert(settings, METHODS["flow"].make(1), seed=6).state_dict()
    assert any(not other[key].equal(plain[key]) for key in plain)


def test_training_is_a_function_of_its_seed_and_lowers_the_loss():
    settings = ToySettings(num_demos=64, num_steps=60, batch_size=32, width=32)
    demos = training_demos(settings, 0.5)
    l1 = METHODS["l1"].make(1)
    first, again = (train_expert(settings, l1, demos, seed=0)[0] for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first.parameters(), again.parameters(), strict=True))

    def error(expert: torch.nn.Module) -> float:
        return float(np.abs(sample_paths(expert, l1, demos.starts_N2, 0) - demos.paths_NH2).mean())  # type: ignore[arg-type]

    assert error(first) < 0.8 * error(make_expert(settings, l1, 0))


def test_pocket_runs_are_the_recipe_but_for_what_is_studied(tmp_path):
    recipe = load_recipe("pocket")
    run = PocketRun(out=tmp_path, cache=tmp_path, num_steps=recipe.num_steps)
    expected = replace(recipe, out=tmp_path, cache=tmp_path, checkpoint_every=recipe.num_steps)
    assert run.train_config == expected, "flow's study run is the quickstart's"
    other = replace(run, objective="rs_imle", horizon=50, seed=2, num_steps=7).train_config
    assert other.policy == replace(recipe.policy, objective=METHODS["rs_imle"].make(NUM_DRAWS), horizon=50)
    assert (other.seed, other.num_steps, other.optimizer) == (2, 7, recipe.optimizer)
    assert METHODS["diffusion"].make(NUM_DRAWS).prediction == "sample"  # type: ignore[union-attr]


# The toy studies.


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """Both toy studies, finished, under one folder."""
    folder = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        for module in (bimodal, steps):
            patch.setattr(module, "milliseconds_per_path", partial(milliseconds_per_path, num_calls=1))
        bimodal.main([*TINY_TOY.split(), "--out", str(folder / "bimodal")])
        steps.main(["--out", str(folder / "steps"), "--bimodal", str(folder / "bimodal"), "--seeds", "0", "1"])
    return folder


def test_bimodal_has_a_row_for_every_objective_and_seed(toy):
    rows = read(toy / "bimodal" / "results.csv")
    names = {"demonstrations", *METHODS}
    assert {(row["objective"], row["seed"]) for row in rows} == {(name, seed) for name in names for seed in "01"}
    assert len(rows) == 2 * len(names)
    assert all(row["valid"] == "1" for row in rows if row["objective"] == "demonstrations")
    summary = read(toy / "bimodal" / "summary.csv")
    assert [row["objective"] for row in summary] == ["demonstrations", *METHODS]
    for row in summary:
        assert float(row["valid_low"]) <= float(row["valid"]) <= float(row["valid_high"])


def test_steps_has_a_row_for_every_number_of_steps_that_a_sampler_takes(toy):
    rows = read(toy / "steps" / "results.csv")
    by_sampler = {
        name: sorted({int(r["num_sampling_steps"]) for r in rows if r["sampler"] == name}) for name in steps.SAMPLERS
    }
    assert by_sampler["flow_euler"] == [1, 2, 4, 5, 8, 10, 20, 32, 40]
    assert by_sampler["diffusion_ddim"] == [1, 2, 4, 5, 8, 10, 20, 40]
    assert by_sampler["shortcut"] == [1, 2, 4, 8, 32]
    assert by_sampler["rs_imle"] == [1]
    calls = {(r["sampler"], r["num_sampling_steps"]): int(r["expert_calls"]) for r in rows}
    assert [calls[f"flow_{solver}", "10"] for solver in ("euler", "midpoint", "heun")] == [10, 20, 19]
    # The same experts, noise and starts as in the bimodal study: flow acts in ten Euler steps there.
    there = {r["seed"]: r for r in read(toy / "bimodal" / "results.csv") if r["objective"] == "flow"}
    for row in rows:
        if (row["sampler"], row["num_sampling_steps"]) == ("flow_euler", "10"):
            assert row["energy_distance"] == there[row["seed"]]["energy_distance"]


@pytest.mark.parametrize("name", ["bimodal", "steps"])
def test_findings_and_figure_come_with_the_tables(toy, name):
    assert is_a_picture(toy / name / "figure.png")
    paragraph = (toy / name / "findings.md").read_text()
    assert paragraph.count("\n") == 1 and paragraph.endswith(".\n")
    assert "2 training seeds, 12 paths from each" in paragraph
    assert "nan" not in paragraph and "inf" not in paragraph


@pytest.mark.parametrize("name", ["bimodal", "steps"])
def test_a_finished_study_computes_nothing_again(toy, name, monkeypatch):
    before = {path.name: path.read_bytes() for path in (toy / name).iterdir() if path.is_file()}
    for module in (bimodal, steps):
        monkeypatch.setattr(module, "sample_paths", None)
    arguments = {"bimodal": TINY_TOY.split(), "steps": ["--bimodal", str(toy / "bimodal"), "--seeds", "0", "1"]}[name]
    {"bimodal": bimodal, "steps": steps}[name].main([*arguments, "--out", str(toy / name)])
    assert {path.name: path.read_bytes() for path in (toy / name).iterdir() if path.is_file()} == before


def test_killed_between_rows_a_study_goes_on_to_the_same_end(toy, tmp_path, monkeypatch):
    out = tmp_path / "bimodal"
    measure, done = bimodal.measure, []

    def killed_after_five(*arguments):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(bimodal, "measure", killed_after_five)
    with pytest.raises(KeyboardInterrupt):
        bimodal.main([*TINY_TOY.split(), "--out", str(out)])
    kept = read(out / "results.csv")
    assert len(kept) == 5
    assert not (out / "summary.csv").exists()
    monkeypatch.setattr(bimodal, "measure", measure)
    bimodal.main([*TINY_TOY.split(), "--out", str(out)])
    resumed = read(out / "results.csv")
    assert [row for row in resumed if row in kept] == kept, "what was there is as it was, its times too"
    straight_through = read(toy / "bimodal" / "results.csv")
    for row in [*resumed, *straight_through]:
        for column in CLOCK:
            row[column] = ""
    assert resumed == straight_through
    for name in ("summary.csv", "findings.md", "figure.png"):
        assert (out / name).read_bytes() == (toy / "bimodal" / name).read_bytes(), name


def test_other_settings_are_refused_and_more_seeds_are_not(toy, tmp_path):
    with pytest.raises(DataError, match=r"other settings: num_steps was 3, now 4\. Type --out"):
        bimodal.main([*TINY_TOY.split(), "--num-steps", "4", "--out", str(toy / "bimodal")])
    claim(tmp_path, {"num_steps": 3})
    claim(tmp_path, {"num_steps": 3})
    assert json.loads((tmp_path / "settings.json").read_text()) == {"num_steps": 3}
    few = [*TINY_TOY.split(), "--objectives", "l1", "--out", str(tmp_path / "b")]
    bimodal.main([*few, "--seeds", "0"])
    first = read(tmp_path / "b" / "results.csv")
    bimodal.main([*few, "--seeds", "1"])
    assert [row for row in read(tmp_path / "b" / "results.csv") if row["seed"] == "0"] == first


@pytest.mark.parametrize(
    ("run", "arguments", "sentence"),
    [
        (bimodal.main, ["--objectives", "flw"], "did you mean 'flow'"),
        (bimodal.main, ["--shares-right", "50"], "shares lie between 0 and 1"),
        (bimodal.main, ["--batch-size", "3000"], "must not be more than num_demos, 2000"),
        (bimodal.main, ["--paths-per-start", "1"], "give at least 1 and 2"),
        (steps.main, ["--samplers", "euler"], "--samplers euler: there are flow_euler"),
        (objective.main, ["--objectives", "rs_imel"], "did you mean 'rs_imle'"),
        (chunk.main, ["--num-executed-steps", "8"], "must be from 1 to 4"),
        (study.main, ["bimodel"], "did you mean 'bimodal'"),
        (study.main, ["warmth"], "there is no study 'warmth'"),
    ],
)
def test_bad_input_is_one_sentence(run, arguments, sentence, capsys):
    with pytest.raises((ValueError, SystemExit)) as refused:
        run(arguments)
    words = f"{refused.value} {capsys.readouterr().err}".replace("│", " ")
    assert sentence in " ".join(words.split())


def test_steps_says_what_to_train_first(toy, tmp_path):
    with pytest.raises(DataError, match="type: vlatune study bimodal --out"):
        steps.main(["--bimodal", str(tmp_path), "--out", str(tmp_path / "steps")])
    with pytest.raises(
        DataError, match=r"type: vlatune study bimodal --out .* --seeds 7 --shares-right 0\.5 --objectives flow"
    ):
        steps.main(["--bimodal", str(toy / "bimodal"), "--out", str(tmp_path / "steps"), "--seeds", "7"])


def test_study_lists_all_of_them(capsys):
    study.main([])
    listing = capsys.readouterr().out
    assert all(f"\n  {name} " in listing for name in study.STUDIES)


@pytest.mark.parametrize(
    ("row_type", "summary_of"),
    [(bimodal.BimodalRow, "bimodal"), (steps.StepsRow, "steps"), (pocket.PocketRow, None)],
)
def test_every_column_is_documented(row_type, summary_of, toy):
    documented = documented_fields(PathScores) | documented_fields(row_type)
    assert {name for name in row_type.__dataclass_fields__ if name not in documented} == set()
    if summary_of:
        assert set(read(toy / summary_of / "results.csv")[0]) == documented
        columns = {
            name.removesuffix("_low").removesuffix("_high") for name in read(toy / summary_of / "summary.csv")[0]
        }
        assert columns <= documented | {"seeds"}


def documented_fields(row_type: type) -> set[str]:
    """Fields with a docstring below them."""
    tree = ast.parse(Path(sys.modules[row_type.__module__].__file__ or "").read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == row_type.__name__)
    return {
        field.target.id
        for field, after in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }


# The studies on pocket, with a world of points and policies that tremble.


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.syspath_prepend(FAKES)
    return FakePocket


def small_study(out: Path, cache: Path, *names: str, seeds: tuple[int, ...] = (0, 1)) -> objective.ObjectiveConfig:
    settings = pocket.PocketSettings(num_steps=100, episodes=4, num_workers=2)
    return objective.ObjectiveConfig(out=out, cache=cache, objectives=names, seeds=seeds, settings=settings)


def test_objective_plans_whole_seeds_in_folders_of_their_own(tmp_path):
    runs = objective.ObjectiveConfig(out=tmp_path).runs()
    assert len(runs) == 12
    assert [run.out.name for run in runs[:5]] == [
        "flow_seed0",
        "l1_seed0",
        "diffusion_seed0",
        "rs_imle_seed0",
        "flow_seed1",
    ]
    assert {run.cache for run in runs} == {tmp_path / "cache"}
    assert {run.num_steps for run in runs} == {600}


def test_chunk_plans_every_length_and_judges_it_with_what_it_can_execute(tmp_path):
    config = chunk.ChunkConfig(out=tmp_path, cache=tmp_path / "there", seeds=(3,))
    assert [(run.out.name, run.horizon, run.seed) for run in config.runs()] == [
        ("flow_chunk4_seed3", 4, 3),
        ("flow_chunk16_seed3", 16, 3),
        ("flow_chunk50_seed3", 50, 3),
    ]
    assert config.runs()[0].cache == tmp_path / "there"


def test_objectives_are_compared_on_the_same_episodes(fakes, small_cache, tmp_path):
    fake = fakes()
    config = small_study(tmp_path / "study", small_cache.path, "flow", "l1", "rs_imle")
    objective.run(config, train=fake.train, evaluate=fake.evaluate)
    rows = read(tmp_path / "study" / "results.csv")
    assert len(rows) == 6
    assert {(row["episodes"], row["errors"]) for row in rows} == {("12", "0")}  # three tasks of four
    by_name = {row["arm"]: row for row in read(tmp_path / "study" / "summary.csv")}
    assert list(by_name) == ["flow", "rs_imle", "l1"], "in the order of METHODS"
    assert by_name["flow"]["successes"] == by_name["flow"]["episodes"] == "24"
    assert float(by_name["flow"]["success_low"]) == pytest.approx(wilson(24, 24)[0], abs=1e-6)
    pairs = {(row["first"], row["second"]): row for row in read(tmp_path / "study" / "pairs.csv")}
    pair = pairs["flow", "rs_imle"]
    failed = 24 - int(by_name["rs_imle"]["successes"])
    assert failed > 12
    assert (pair["episodes"], pair["only_first"], pair["only_second"]) == ("24", str(failed), "0")
    assert float(pair["mcnemar_p"]) == pytest.approx(2 * 0.5**failed, rel=1e-4)
    assert float(pair["holm_p"]) >= float(pair["mcnemar_p"])
    assert is_a_picture(tmp_path / "study" / "figure.png")
    assert "flow succeeds in" in (tmp_path / "study" / "findings.md").read_text()

    # Started again: nothing is trained, nothing judged, nothing changed.
    before = (tmp_path / "study" / "results.csv").read_bytes()
    objective.run(config, train=None, evaluate=None)
    assert (tmp_path / "study" / "results.csv").read_bytes() == before


def test_a_study_on_pocket_goes_on_where_it_was_killed(fakes, small_cache, tmp_path):
    fake = fakes()
    config = small_study(tmp_path / "study", small_cache.path, "flow", "l1")
    done = []

    def killed_in_the_third(sweep_config):
        done.append(sweep_config)
        if len(done) == 3:
            raise KeyboardInterrupt
        return fake.evaluate(sweep_config)

    with pytest.raises(KeyboardInterrupt):
        objective.run(config, train=fake.train, evaluate=killed_in_the_third)
    kept = (tmp_path / "study" / "results.csv").read_text().splitlines()
    assert len(kept) == 3
    objective.run(config, train=fake.train, evaluate=fake.evaluate)
    after = (tmp_path / "study" / "results.csv").read_text().splitlines()
    assert len(after) == 5 and set(kept) <= set(after)
    assert sorted(fake.trained) == sorted(set(fake.trained)), (
        "the run that was trained and not judged is not trained again"
    )


def test_crashed_episodes_are_run_again_at_the_next_start(fakes, small_cache, tmp_path):
    trouble = tmp_path / "trouble"
    trouble.mkdir()
    (trouble / "0_10.raise").touch()
    config = small_study(tmp_path / "study", small_cache.path, "flow", seeds=(0,))
    fake = fakes(trouble)
    objective.run(config, train=fake.train, evaluate=fake.evaluate)
    assert [(row["episodes"], row["errors"]) for row in read(tmp_path / "study" / "results.csv")] == [("11", "1")]
    (trouble / "0_10.raise").unlink()
    objective.run(config, train=fake.train, evaluate=fake.evaluate)
    assert [(row["episodes"], row["errors"]) for row in read(tmp_path / "study" / "results.csv")] == [("12", "0")]


def test_chunks_are_judged_once_for_each_number_of_executed_steps(fakes, small_cache, tmp_path):
    fake = fakes()
    config = chunk.ChunkConfig(
        out=tmp_path / "study",
        cache=small_cache.path,
        horizons=(4, 9),
        seeds=(0,),
        settings=pocket.PocketSettings(num_steps=100, episodes=2, num_workers=2),
    )
    chunk.run(config, train=fake.train, evaluate=fake.evaluate)
    rows = read(tmp_path / "study" / "results.csv")
    assert [(row["horizon"], row["num_executed_steps"]) for row in rows] == [("4", "4"), ("9", "4"), ("9", "8")]
    assert [row["arm"] for row in read(tmp_path / "study" / "summary.csv")] == [
        "flow_chunk4_executed4",
        "flow_chunk9_executed4",
        "flow_chunk9_executed8",
    ]
    assert sorted(fake.trained) == ["flow_chunk4_seed0", "flow_chunk9_seed0"]
    with pytest.raises(DataError, match="other settings: num_steps was 100, now 200"):
        chunk.run(replace(config, settings=replace(config.settings, num_steps=200)))


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.timeout(1800)  # two minutes on two quiet cores
def test_objectives_for_real(tmp_path):
    """Demonstrations, cache, two ranks, simulator."""
    settings = ["--num-steps", "2", "--episodes", "1", "--demos", "2"]
    arguments = ["--out", str(tmp_path / "study"), "--objectives", "flow", "l1", "--seeds", "0", *settings]
    objective.main(arguments)
    rows = read(tmp_path / "study" / "results.csv")
    assert [(row["objective"], row["episodes"], row["errors"]) for row in rows] == [
        ("flow", "4", "0"),
        ("l1", "4", "0"),
    ]
    before = {path.name: path.read_bytes() for path in (tmp_path / "study").iterdir() if path.is_file()}
    objective.main(arguments)
    assert {path.name: path.read_bytes() for path in (tmp_path / "study").iterdir() if path.is_file()} == before
