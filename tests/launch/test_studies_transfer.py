"""Freeze and align with fakes: what their runs are, how they are judged, what is pretrained, shared and refused; once for real."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_studies import FAKES, FakePocket, is_a_picture, read

from vlatune.data.cache import Cache
from vlatune.data.episodes import DataError
from vlatune.data.language import Language
from vlatune.eval.episode_log import EpisodeLog
from vlatune.launch import study
from vlatune.launch.studies import align, freeze, objective, pocket
from vlatune.launch.studies.pocket_run import PocketRun
from vlatune.launch.studies.transfer import Start, TransferSettings, statistics_apart
from vlatune.train.recipes import load_recipe

SMALL = TransferSettings(num_steps=100, episodes=4, pretraining_steps=200, num_workers=2)
SKILLS = {"run": 0.0, "statistics": 0.0, "expert": 0.5, "lora": 0.9, "full": 1.0}
"""`run` is the pretraining's."""
START = Start(pretrained=Path("there/checkpoints/step_000200"), cache=Path("holdout"))


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.syspath_prepend(FAKES)
    return FakePocket


def with_holdout(folder: Path, cache: Cache) -> Path:
    """A study's folder whose held-out demonstrations are prepared."""
    (folder / "holdout").mkdir(parents=True)
    (folder / "holdout" / "cache").symlink_to(cache.path)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# What is trained.


def test_a_run_from_a_pretrained_policy_is_the_recipe_but_for_what_is_studied(tmp_path):
    recipe = load_recipe("pocket")
    run = freeze.FreezeConfig(out=tmp_path).run_from(START, "x", trained="lora", seed=2)
    expected = replace(
        recipe,
        out=tmp_path / "runs" / "x",
        cache=START.cache,
        pretrained=(str(START.pretrained),),
        trained="lora",
        seed=2,
        num_steps=300,
        checkpoint_every=300,
        optimizer=replace(recipe.optimizer, learning_rate=1e-3, num_warmup_steps=30),
    )
    assert run.train_config == expected
    assert run.judged == tmp_path / "runs" / "x" / "checkpoints" / "step_000300"


def test_the_arm_statistics_moves_no_weight(tmp_path):
    run = freeze.FreezeConfig(out=tmp_path).run_from(START, "statistics", trained="statistics")
    config = run.train_config
    assert (config.num_steps, config.trained, config.optimizer.learning_rate) == (1, "full", 0.0)
    assert config.optimizer.final_learning_rate == 0.0
    assert run.judged.name == "step_000001"


@pytest.mark.parametrize("name", ["l1", "mse", "rs_imle"])
def test_aligned_is_the_objectives_own_switch(tmp_path, name):
    runs = align.AlignConfig(out=tmp_path, objectives=(name,), seeds=(0,)).runs(START)
    objectives = [run.train_config.policy.objective for run in runs]
    assert [each.output for each in objectives] == ["aligned", "action"]
    assert replace(objectives[0], output="action") == objectives[1], "and they differ in nothing else"


def test_runs_are_planned_by_whole_seeds(tmp_path):
    names = [run.out.name for run in freeze.FreezeConfig(out=tmp_path).runs(START)]
    assert names[:6] == ["none", "statistics", "expert_seed0", "lora_seed0", "full_seed0", "expert_seed1"]
    assert len(names) == 2 + 9
    runs = align.AlignConfig(out=tmp_path, trained="expert").runs(START)
    assert [run.out.name for run in runs[:5]] == [
        "flow_action_expert_seed0",
        "l1_aligned_expert_seed0",
        "l1_action_expert_seed0",
        "rs_imle_aligned_expert_seed0",
        "rs_imle_action_expert_seed0",
    ]
    assert len(runs) == 15 and {run.num_steps for run in runs} == {150}, "shorter than freeze's"


# With fakes.


def test_freeze_judges_every_arm_and_the_policy_that_all_began_with(fakes, small_cache, tmp_path):
    out = with_holdout(tmp_path / "freeze", small_cache)
    config = freeze.FreezeConfig(out=out, cache=small_cache.path, seeds=(0, 1), settings=SMALL)
    fake = fakes(skills=SKILLS)
    freeze.run(config, train=fake.train, evaluate=fake.tally)

    pretraining, *others = fake.runs
    assert (pretraining.out, pretraining.cache) == (out / "pretraining" / "run", small_cache.path)
    assert (pretraining.pretrained, pretraining.trained, pretraining.num_steps) == (None, "full", 200)
    assert {run.pretrained for run in others} == {pretraining.judged}
    assert {run.cache for run in others} == {out / "holdout" / "cache"}
    assert "none" not in fake.trained
    assert {config.suites for config in fake.swept} == {("pocket_holdout",)}
    assert fake.swept[0].runs == (pretraining.out,) and fake.swept[0].steps == (200,)
    assert not (pretraining.out / "evaluation").exists(), "its episodes are the study's, not the run's"

    rows = {(row["trained"], row["seed"]): row for row in read(out / "results.csv")}
    assert set(rows) == {("none", "0"), ("statistics", "0")} | {
        (trained, seed) for trained in ("expert", "lora", "full") for seed in "01"
    }
    assert {(row["episodes"], row["errors"], row["output"]) for row in rows.values()} == {("12", "0", "action")}
    assert rows["none", "0"]["validation_loss"] == "" and rows["full", "0"]["validation_loss"] != ""
    summary = {row["arm"]: row for row in read(out / "summary.csv")}
    assert list(summary) == ["none", "statistics", "expert", "lora", "full"]
    assert (summary["none"]["seeds"], summary["full"]["seeds"], summary["full"]["success"]) == ("1", "2", "1")
    pairs = {(row["first"], row["second"]): row for row in read(out / "pairs.csv")}
    assert len(pairs) == 10
    assert (pairs["expert", "full"]["episodes"], pairs["none", "full"]["episodes"]) == ("24", "12")
    assert int(pairs["none", "full"]["only_second"]) > 6
    assert is_a_picture(out / "figure.png")
    findings = (out / "findings.md").read_text()
    assert "LoRA" in findings and "pretrained, new statistics" in findings and "one pretrained policy" in findings
    assert "scale actions by 1.00 to 1.00" in findings, "pretraining and held-out tasks are one cache here"

    before = files_of(out)
    freeze.run(config, train=None, evaluate=None)
    assert files_of(out) == before
    freeze.run(replace(config, seeds=(2,)), train=fake.train, evaluate=fake.tally)
    assert len(read(out / "results.csv")) == 8 + 3, (
        "another seed is added to what is there; the pretrained policy is not"
    )


def test_align_goes_on_from_the_policy_of_a_freeze_study(fakes, small_cache, tmp_path):
    shared = with_holdout(tmp_path / "freeze", small_cache)
    fake = fakes(skills={"flow": 1.0, "l1_aligned_seed0": 0.9, "l1_action_seed0": 0.3, "rs_imle": 0.0})
    common = {"cache": small_cache.path, "seeds": (0,), "settings": SMALL}
    freeze.run(freeze.FreezeConfig(out=shared, **common), train=fake.train, evaluate=fake.tally)
    so_far = len(fake.trained)
    out = tmp_path / "align"
    config = align.AlignConfig(out=out, shared=shared, **common)
    align.run(config, train=fake.train, evaluate=fake.tally)
    assert fake.trained[so_far:] == [
        "flow_action_seed0",
        "l1_aligned_seed0",
        "l1_action_seed0",
        "rs_imle_aligned_seed0",
        "rs_imle_action_seed0",
    ]
    assert {run.pretrained for run in fake.runs[so_far:]} == {fake.runs[0].judged}
    assert not (out / "pretraining").exists() and not (out / "holdout").exists()
    arms = [row["arm"] for row in read(out / "summary.csv")]
    assert arms == ["flow", "rs_imle_aligned", "rs_imle_action", "l1_aligned", "l1_action"]
    assert "L1, aligned" in (out / "findings.md").read_text()
    rows = {(row["objective"], row["output"]): int(row["successes"]) for row in read(out / "results.csv")}
    assert rows["l1", "aligned"] > rows["l1", "action"]
    before = files_of(out)
    align.run(config, train=None, evaluate=None)
    assert files_of(out) == before


def test_killed_while_it_trains_a_study_goes_on(fakes, small_cache, tmp_path):
    out = with_holdout(tmp_path / "freeze", small_cache)
    config = freeze.FreezeConfig(out=out, cache=small_cache.path, seeds=(0,), settings=SMALL)
    fake = fakes(skills=SKILLS)

    def killed_at_lora(run):
        if run.trained == "lora":
            raise KeyboardInterrupt
        fake.train(run)

    with pytest.raises(KeyboardInterrupt):
        freeze.run(config, train=killed_at_lora, evaluate=fake.tally)
    kept = (out / "results.csv").read_text().splitlines()
    assert len(kept) == 1 + 3
    freeze.run(config, train=fake.train, evaluate=fake.tally)
    assert set(kept) <= set((out / "results.csv").read_text().splitlines())
    assert sorted(fake.trained) == ["expert_seed0", "full_seed0", "lora_seed0", "run", "statistics"]


def test_a_given_policy_is_not_pretrained_again(fakes, small_cache, tmp_path):
    fake = fakes(skills=SKILLS)
    given = PocketRun(out=tmp_path / "given" / "run", cache=small_cache.path, num_steps=7)
    fake.train(given)
    out = with_holdout(tmp_path / "freeze", small_cache)
    config = freeze.FreezeConfig(out=out, pretrained=given.judged, trained=("full",), seeds=(0,), settings=SMALL)
    freeze.run(config, train=fake.train, evaluate=fake.evaluate)
    assert fake.trained == ["run", "statistics", "full_seed0"]
    assert not (out / "pretraining").exists()
    (given.judged / "model.safetensors").write_text("others")
    with pytest.raises(DataError, match=r"results of other settings: pretrained_weights was .* Type --out"):
        freeze.run(config, train=None, evaluate=None)


def test_held_out_tasks_are_in_the_pretrained_policys_tokens(fakes, small_cache, tmp_path):
    fake = fakes(skills=SKILLS)
    given = PocketRun(out=tmp_path / "given", cache=small_cache.path, num_steps=7)
    fake.train(given)
    out = with_holdout(tmp_path / "freeze", small_cache)
    config = freeze.FreezeConfig(out=out, pretrained=given.judged, trained=("full",), seeds=(0,), settings=SMALL)
    freeze.run(config, train=fake.train, evaluate=fake.tally)
    Language.build(["other words"], encoder="none").save(given.judged / "language")
    with pytest.raises(DataError, match=r"holdout has results of other settings: tokenizer was"):
        freeze.run(config, train=None, evaluate=None)


def test_how_far_statistics_are_apart(small_cache, tmp_path):
    moved = json.loads((small_cache.path / "statistics.json").read_text())
    scale = (moved["actions"]["q99"][0] - moved["actions"]["q01"][0]) / 2
    for name in ("q01", "q99"):
        moved["actions"][name][0] += 0.25 * scale
    (tmp_path / "normalisation.json").write_text(json.dumps(moved))
    sentence = statistics_apart(Start(pretrained=tmp_path, cache=small_cache.path))
    assert "scale actions by 1.00 to 1.00 and move their centre by up to 0.25 of a scale, and states" in sentence


def test_other_episodes_of_a_run_do_not_count(fakes, small_cache, tmp_path):
    fake = fakes()
    run = PocketRun(out=tmp_path / "flow", cache=small_cache.path, num_steps=100)
    fake.train(run)
    judged = pocket.Judging(episodes=2, executed=(8,))
    config = objective.ObjectiveConfig(out=tmp_path, cache=small_cache.path)
    pocket.compare_runs(
        tmp_path,
        [replace(run, out=tmp_path / "runs" / "flow_seed0")],
        judged,
        arm_of=objective.arm_of,
        question="?",
        train=fake.train,
        evaluate=fake.tally,
    )
    there = tmp_path / "runs" / "flow_seed0"
    assert len(pocket.judged_episodes(there, "pocket", 8)) == 6
    fake.tally(replace(fake.swept[0], suites=("another",)))
    fake.tally(replace(fake.swept[0], num_executed_steps=(3,)))
    with EpisodeLog(there / "evaluation") as log:
        for asked in ('"num_candidates": 3', '"precision": "bfloat16"', '"temporal_ensemble": 0.01'):
            settings = f'{{"num_sampling_steps": 10, "objective": "flow", {asked}}}'
            log.append(replace(next(iter(log.rows.values())), sampling=settings))
    assert len(pocket.judged_episodes(there, "pocket", 8)) == 6
    assert config.settings.episodes == 15


def test_results_of_earlier_studies_are_still_read():
    """A file with these columns is refused by any other."""
    columns = (
        "objective,horizon,num_executed_steps,seed,run,successes,episodes,errors,success_rate,low,high,steps_to_success"
    )
    columns += ",smoothness,policy_ms,validation_loss,samples_per_s"
    assert ",".join(pocket.PocketRow.__dataclass_fields__) == columns
    assert pocket.KEY == ("objective", "horizon", "num_executed_steps", "seed")


# What is refused.


@pytest.mark.parametrize(
    ("run", "arguments", "sentence"),
    [
        (freeze.main, ["--pretrained", "a", "--cache", "b"], "leave out one of them"),
        (freeze.main, ["--seeds"], "--seeds needs at least one value"),
        (freeze.main, ["--trained"], "--trained needs at least one of expert, lora, full"),
        (align.main, ["--objectives"], "--objectives needs at least one of flow, l1, mse, rs_imle"),
        (align.main, ["--objectives", "diffusion"], "diffusion"),
        (study.main, ["freze"], "did you mean 'freeze'"),
    ],
)
def test_bad_input_is_one_sentence(run, arguments, sentence, capsys):
    with pytest.raises((ValueError, SystemExit)) as refused:
        run(arguments)
    words = f"{refused.value} {capsys.readouterr().err}".replace("│", " ")
    assert sentence in " ".join(words.split())


def test_runs_that_make_no_sense(tmp_path):
    common = {"out": tmp_path, "cache": tmp_path}
    with pytest.raises(
        ValueError, match="--output aligned: diffusion has no such switch; choose a regression or rs_imle"
    ):
        PocketRun(**common, objective="diffusion", output="aligned")
    for trained in ("none", "statistics"):
        with pytest.raises(ValueError, match=f"--trained {trained} is about a pretrained policy; add --pretrained"):
            PocketRun(**common, trained=trained)


def test_policies_that_no_run_can_begin_with(fakes, small_cache, tmp_path):
    fake = fakes()

    def begin(checkpoint: Path) -> None:
        config = freeze.FreezeConfig(out=tmp_path / "freeze", pretrained=checkpoint, settings=SMALL)
        freeze.run(config, train=None, evaluate=None)

    flow = PocketRun(out=tmp_path / "flow", cache=small_cache.path, num_steps=100)
    fake.train(flow)
    for wrong in (flow.out, flow.judged.with_name("step_000200"), flow.judged.with_name("step_000000"), tmp_path):
        with pytest.raises(DataError, match=r"is no complete checkpoint of a trained policy; give a folder like RUN/"):
            begin(wrong)
    l1 = PocketRun(out=tmp_path / "l1", cache=small_cache.path, objective="l1", num_steps=100)
    fake.train(l1)
    with pytest.raises(DataError, match="was trained with the objective regression; give a checkpoint of a run with"):
        begin(l1.judged)
    (flow.judged / "base.json").write_text("{}")
    with pytest.raises(DataError, match="objective flow and holds only a part of its weights; give"):
        begin(flow.judged)
    assert not (tmp_path / "freeze").exists(), "refused before anything is written"


# For real.


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.timeout(3600)  # three minutes on two quiet cores
def test_freeze_and_align_for_real(tmp_path):
    """Demonstrations of both suites, caches, pretraining, two ranks, simulator."""
    few = ["--num-steps", "2", "--episodes", "1", "--seeds", "0"]
    few += ["--demos", "2", "--holdout-demos", "2", "--pretraining-steps", "2"]
    out = tmp_path / "freeze"
    freeze.main(["--out", str(out), *few])
    rows = read(out / "results.csv")
    assert [row["trained"] for row in rows] == ["expert", "full", "lora", "none", "statistics"]
    assert {(row["episodes"], row["errors"]) for row in rows} == {("2", "0")}
    texts = json.loads((out / "holdout" / "cache" / "language" / "language.json").read_text())
    pretraining = json.loads((out / "pretraining" / "cache" / "language" / "language.json").read_text())
    assert texts["identity"]["tokenizer"] == pretraining["identity"]["tokenizer"]
    assert all("purple" in text["text"] for text in texts["texts"] if text["text"]), (
        "and the empty text, for condition dropout"
    )
    weights = [
        (run / "model.safetensors").read_bytes()
        for run in (
            out / "pretraining" / "run" / "checkpoints" / "step_000002",
            out / "runs" / "statistics" / "checkpoints" / "step_000001",
            out / "runs" / "full_seed0" / "checkpoints" / "step_000002",
        )
    ]
    assert weights[0] == weights[1] != weights[2], "the arm statistics has the pretrained weights"

    shared = ["--shared", str(out), *few, "--objectives", "l1"]
    align.main(["--out", str(tmp_path / "align"), *shared])
    rows = read(tmp_path / "align" / "results.csv")
    assert [(row["objective"], row["output"], row["episodes"]) for row in rows] == [
        ("l1", "action", "2"),
        ("l1", "aligned", "2"),
    ]
    before = files_of(out) | files_of(tmp_path / "align")
    freeze.main(["--out", str(out), *few])
    align.main(["--out", str(tmp_path / "align"), *shared])
    assert files_of(out) | files_of(tmp_path / "align") == before
