"""`vlatune profile`: its rows, its refusals, and what it takes from the simulator."""

import io
import json
import math
from dataclasses import asdict
from pathlib import Path

import fake_point_world
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from small_policies import make_policy

from vlatune.data.episodes import DataError
from vlatune.data.language import Language
from vlatune.eval import profile_simulator
from vlatune.eval.profile_policy import ProfileConfig, main, profile
from vlatune.eval.profile_rows import COLUMNS, read
from vlatune.eval.profile_simulator import SimulatorCost, episode_seconds, in_simulator
from vlatune.eval.rollout import roll_out
from vlatune.policy.acting import load_policy
from vlatune.policy.checkpoints.folder import write_policy
from vlatune.policy.checkpoints.layout import COMPLETE

QUICK = {"repeats": 2, "warm_up": 1, "simulator_steps": 4}


def write_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    policy = make_policy()
    write_policy(folder, policy, policy.state_dict(), Language.build(["reach the red dot"], encoder="none"), {})
    (folder / COMPLETE).touch()
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    """An untrained and a trained tiny policy: chunks of 4, trained for 2 sampling steps."""
    for step in (0, 5):
        write_checkpoint(tmp_path / "demo" / "checkpoints" / f"step_{step:06d}")
    return tmp_path / "demo"


@pytest.fixture
def no_renderer(monkeypatch):
    """The fake simulator draws without OpenGL."""
    monkeypatch.setattr(profile_simulator, "choose_renderer", lambda: "none")


def test_a_row_for_every_setting_reads_back_as_it_was(run, no_renderer):
    config = ProfileConfig(
        checkpoint=run, batch_sizes=(3, 1), num_sampling_steps=(1, 4), num_executed_steps=(2, 4), **QUICK
    )
    found = profile(config, make_benchmark=fake_point_world.make)
    frame = read(run)
    pd.testing.assert_frame_equal(frame, pd.DataFrame([asdict(row) for row in found.rows]).astype(frame.dtypes))
    assert [(row.batch_size, row.num_sampling_steps, row.num_executed_steps) for row in found.rows] == [
        (b, n, h) for b in (1, 3) for n in (1, 4) for h in (2, 4)
    ]
    assert (frame["num_expert_calls"] == frame["num_sampling_steps"]).all()
    assert (frame["run"].unique(), frame["checkpoint"].unique()) == (["demo"], ["step_000005"])
    assert json.loads(frame["sampling"][2]) == {"objective": "flow", "num_sampling_steps": 4}
    for row in found.rows:
        assert row.observations_per_s == pytest.approx(1e3 * row.batch_size / row.decision_ms, rel=1e-3)
        assert row.actions_per_s == pytest.approx(row.num_executed_steps * row.observations_per_s, rel=1e-3)
        assert row.decision_ms <= row.decision_ms_p95 <= row.decision_ms_p99
        parts = row.prepare_ms + row.transfer_ms + row.prefix_ms + row.expert_ms + row.rest_ms
        assert parts == pytest.approx(row.apart_ms, rel=1e-3), "with two repeats mean and median are one"
        assert (row.physics_ms, row.render_ms, row.reset_s) == (1.0, 2.0, 0.005)
    alone = frame[frame["batch_size"] == 1]
    assert (alone["episode_physics_s"] == 0.15).all() and (alone["episode_steps"] == 150).all()
    assert alone["episode_render_s"].to_list() == [0.15, 0.074] * 2  # 75 and 37 rendered steps
    assert frame[frame["batch_size"] == 3]["episode_s"].isna().all(), "an episode is estimated for batch 1"
    expected_policy_s = [math.ceil(150 / h) * ms / 1e3 for h, ms in alone[["num_executed_steps", "decision_ms"]].values]
    assert alone["episode_policy_s"].to_list() == pytest.approx(expected_policy_s, rel=1e-2)
    image = np.asarray(Image.open(io.BytesIO((found.folder / "profile.png").read_bytes())))
    assert image.shape[1] > 800 and len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 8
    assert sorted(path.name for path in found.folder.iterdir()) == ["profile.csv", "profile.png"]
    assert "points, none: physics 1.00 ms a control step, render 2.00 ms" in found.text


def test_without_a_simulator_and_from_the_command_line(run, tmp_path, capsys):
    untrained = str(run / "checkpoints" / "step_000000")
    words = ["--no-simulator", "--repeats", "1", "--warm-up", "0", "--batch-sizes", "2", "--out", str(tmp_path / "out")]
    main([untrained, *words])
    (row,) = read(tmp_path / "out").to_dict("records")
    assert (row["checkpoint"], row["step"], row["image_px"], row["num_sampling_steps"]) == ("step_000000", 0, 256, 2)
    assert (row["benchmark"], row["renderer"], row["num_executed_steps"], row["dtype"]) == ("", "", 4, "float32")
    assert math.isnan(row["physics_ms"]) and math.isnan(row["episode_s"])
    printed = capsys.readouterr().out
    assert "pictures of noise, 256 px" in printed and "not measured: several simulators" in printed
    assert "an episode" not in printed and not (run / "profile").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"repeats": 0}, "--repeats is 0; at least 1 is needed"),
        ({"batch_sizes": (2, 2)}, "--batch-sizes 2 2: give different numbers of 1 or more"),
        ({"batch_sizes": ()}, "--batch-sizes names nothing; give 1, for instance"),
        ({"num_sampling_steps": (0,)}, "--num-sampling-steps 0: give different numbers of 1 or more"),
        ({"num_executed_steps": (9,)}, "--num-executed-steps 9: the policy's chunks have 4; 1 to 4"),
        ({"suite": "lines"}, "benchmark 'fake' has no suite 'lines'; it has points"),
        ({"task": 7}, "suite 'points' has no task 7; it has 0, 1, 2"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_sentence(run, no_renderer, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        profile(ProfileConfig(checkpoint=run, **QUICK | settings), make_benchmark=fake_point_world.make)
    assert not (run / "profile").exists()


def test_an_objective_that_knows_one_step_refuses_others(run):
    file = run / "checkpoints" / "step_000005" / "config.json"
    config = json.loads(file.read_text())
    config["policy"]["objective"] = {"type": "regression"}
    file.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="num_sampling_steps 5: the objective 'regression' always takes 1; leave it out"
    ):
        profile(ProfileConfig(checkpoint=run, num_sampling_steps=(1, 5), simulator=False, **QUICK))


def test_what_is_not_there_is_said(run, tmp_path):
    with pytest.raises(DataError, match=r"there is no run folder .*dem; did you mean .*demo\?"):
        profile(ProfileConfig(checkpoint=tmp_path / "dem"))
    with pytest.raises(DataError, match=r"step_000005 has no ema.safetensors: its run kept no average"):
        profile(ProfileConfig(checkpoint=run, weights="ema", simulator=False))
    with pytest.raises(DataError, match=r"no profile.csv at .*demo; `vlatune profile RUN` writes RUN/profile"):
        read(run)
    (run / "profile").mkdir()
    (run / "profile" / "profile.csv").write_text(",".join(COLUMNS[1:]) + "\n")
    with pytest.raises(DataError, match="has other columns than this version writes; type `vlatune profile` again"):
        read(run)


@pytest.mark.parametrize("offsets", [(0,), (-1, 0)])
@pytest.mark.parametrize(("num_steps", "executed"), [(24, 8), (23, 5), (3, 8)])
def test_an_estimated_episode_counts_what_a_rollout_does(offsets, num_steps, executed):
    environment = fake_point_world.make().make_environment(fake_point_world.make().suites()["points"][0], None)
    num_decisions = []

    def decide(decision, raw, seen):
        num_decisions.append(decision)
        return np.zeros((10, 7), np.float32)

    outcome = roll_out(
        environment,
        decide,
        init_state=0,
        seed=0,
        max_steps=num_steps,
        num_executed_steps=executed,
        observation_offsets=offsets,
    )
    seconds = episode_seconds(
        {"prefix": 6.0, "expert": 4.0},
        SimulatorCost(reset_s=0.005, physics_ms=1.0, render_ms=2.0, num_steps=1),
        num_steps=num_steps,
        num_executed_steps=executed,
        observation_offsets=offsets,
    )
    assert seconds["prefix"] + seconds["expert"] == pytest.approx(0.010 * len(num_decisions))
    assert sum(seconds[cause] for cause in ("physics", "render", "reset")) == pytest.approx(
        outcome.physics_s + outcome.render_s
    )


@pytest.mark.sim
def test_pocket_costs_physics_and_pictures(run):
    from vlatune.eval.benchmarks import load_benchmark

    policy = load_policy(run / "checkpoints" / "step_000005", device="cpu")
    benchmark = load_benchmark("pocket")
    task = benchmark.suites()["pocket"][1]
    around = in_simulator(
        policy, benchmark, task, benchmark.protocols("pocket")["pocket"], num_steps=6, num_executed_steps=4
    )
    cost = around.simulator
    assert cost is not None and cost.num_steps == 6
    # Of any machine's order, so that milliseconds are told from seconds.
    assert 0.05 < cost.physics_ms < 1_000 and 0.05 < cost.render_ms < 1_000 and 0.005 < cost.reset_s < 60
    assert len(around.observations) == 1 + 3, "the first, and every second step"
    pictures = [raw.images["agentview"] for raw in around.observations]
    assert all(picture.shape == (1, 128, 128, 3) and picture.std() > 10 for picture in pictures)
    assert (around.columns["task"], around.columns["image_px"]) == (task.name, 128)
    assert {raw.instruction for raw in around.batch(9)} == {task.language} and len(around.batch(9)) == 9
