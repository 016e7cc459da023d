"""`vlatune act`: recorded observations in, chunks beside what was demonstrated out."""

import copy
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from small_demonstrations import write_demos
from small_lerobot import recordings, write_lerobot
from small_policies import make_policy

from vlatune.data.episodes import DataError
from vlatune.data.language import Language
from vlatune.data.robots.libero_panda import LIBERO_PANDA, LIBERO_PANDA_JOINTS_FINGERS
from vlatune.data.sources.libero_hdf5 import LiberoHdf5Source
from vlatune.eval.act import ActConfig, act, main, predict
from vlatune.eval.act_frames import choose, noise_at
from vlatune.eval.act_policies import check_fit, deviation_of
from vlatune.eval.act_rows import PREDICTIONS_NAME, errors_of, score
from vlatune.eval.act_tables import table
from vlatune.policy.acting import load_policy
from vlatune.policy.checkpoints.folder import write_policy
from vlatune.policy.checkpoints.layout import COMPLETE
from vlatune.train.validation import _action_sums

NAMES = LIBERO_PANDA.action_names
ABOUT = {
    "weights_hash": "",
    "objective": "flow",
    "num_sampling_steps": 2,
    "sampling": "{}",
    "num_candidates": 1,
    "seed": 0,
}
DEVIATION = np.linspace(0.5, 2.0, len(NAMES))


def write_checkpoint(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True)
    policy = make_policy(seed)
    write_policy(folder, policy, policy.state_dict(), Language.build(["reach the red dot"], encoder="none"), {})
    (folder / COMPLETE).touch()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two tiny policies, chunks of 4."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    for step in (3, 5):
        write_checkpoint(folder / "checkpoints" / f"step_{step:06d}", seed=step)
    return folder


@pytest.fixture
def demos(tmp_path) -> Path:
    """Two tasks: episodes of 7, 5 and 9 frames, then of 6."""
    write_demos(tmp_path / "demos" / "lift_the_cup_demo.hdf5")
    write_demos(tmp_path / "demos" / "open_the_box_demo.hdf5", (6,), seed=1)
    return tmp_path / "demos"


@pytest.fixture
def policy(run):
    return load_policy(run / "checkpoints" / "step_000005", device="cpu")


def imitator(policy, demos, *, factor=1.0, **changes):
    """A policy that knows the demonstrations by heart, `factor` as bold, and what it was asked. Demonstrations say in pictures (red: which
    demo, green: which frame) and in the state (metres: frame / 1000) where they are."""
    source = LiberoHdf5Source(demos)
    fake = copy.copy(policy)
    fake.asked = []
    for name, value in changes.items():
        setattr(fake, name, value)

    def do(raws, num_candidates, noise):
        (raw,) = raws
        fake.asked.append((raw, noise))
        frame = round(1000 * float(raw.state_TS[-1, 0]))
        picture = raw.images["agentview"][-1]
        assert picture[0, 0, 1] == frame
        demo = {"lift the cup": f"lift_the_cup_demo.hdf5/demo_{picture[0, 0, 0]}"}
        actions = source.read(demo.get(raw.instruction, "open_the_box_demo.hdf5/demo_0")).actions_NA
        chunk = np.full((fake.horizon, len(NAMES)), 99.0, np.float32)
        chunk[: len(actions) - frame] = factor * actions[frame : frame + fake.horizon]
        return chunk + 0.1 * np.arange(num_candidates, dtype=np.float32)[None, :, None, None]

    fake.candidates = do
    return fake


def errors(predictions, policies):
    return errors_of(predictions, NAMES, DEVIATION, dict.fromkeys(policies, ABOUT))


def test_who_does_what_was_demonstrated_makes_no_error_and_who_does_half_is_half_as_large(policy, demos):
    chosen = choose(LiberoHdf5Source(demos), (0, 2, 3), task="", every=2)
    policies = {"same": imitator(policy, demos), "half": imitator(policy, demos, factor=0.5)}
    predictions = predict(policies, chosen, NAMES, seed=0)
    rows = errors(predictions, policies)
    same, half = (score([row for row in rows if row.policy == name]) for name in policies)
    assert (same.error_in_deviations, same.magnitude) == (0.0, 1.0)
    assert half.magnitude == pytest.approx(0.5)
    # Straight from the definition: over what was demonstrated from every second frame on, in deviations.
    chunks = [one.episode.actions_NA[n : n + 4] for one in chosen for n in range(0, len(one.episode.actions_NA), 2)]
    expected = np.abs(0.5 * np.concatenate(chunks) / DEVIATION).mean()
    assert half.error_in_deviations == pytest.approx(expected, rel=1e-5)
    of_one = score([row for row in rows if row.policy == "half" and row.dimension == NAMES[3]])
    assert of_one.error == pytest.approx(0.5 * np.abs(np.concatenate(chunks)[:, 3]).mean(), rel=1e-5)


def test_several_candidates_show_how_far_they_lie_apart(policy, demos):
    """The first is compared; of 0 and 0.1 above it the standard deviation is 0.05, and there is none of one."""
    chosen = choose(LiberoHdf5Source(demos), (0,), task="", every=2)
    one, two = (predict({"same": imitator(policy, demos)}, chosen, NAMES, seed=0, num_candidates=k) for k in (1, 2))
    spreads = [f"spread_{name}" for name in NAMES]
    assert one[spreads].isna().all(axis=None)
    np.testing.assert_allclose(two[spreads], 0.05, rtol=1e-4)
    rows = errors(two, ["same"])
    assert score(rows).error_in_deviations == 0 and score(errors(one, ["same"])).spread_in_deviations is None
    assert score(rows).spread_in_deviations == pytest.approx(float((0.05 / DEVIATION).mean()), rel=1e-4)
    assert "spread" in table(rows) and "spread" not in table(errors(one, ["same"]))


def test_error_and_magnitude_mean_what_they_mean_in_training(policy, demos):
    chosen = choose(LiberoHdf5Source(demos), (0, 1), task="", every=3)
    predictions = predict({"it": policy}, chosen, NAMES, seed=0)
    found = score(errors_of(predictions, NAMES, np.full(7, 1.25), {"it": ABOUT}))
    at = [(one, frame) for one in chosen for frame in one.frames]
    demonstrated_BHA, valid_BH, sampled_BHA = np.zeros((len(at), 4, 7), np.float32), np.zeros((len(at), 4), bool), []
    for b, (one, frame) in enumerate(at):
        actions = one.demonstrated(frame, 4)
        demonstrated_BHA[b, : len(actions)], valid_BH[b, : len(actions)] = actions, True
        raw = one.observed(frame, (0,), one.pictures_of(policy.cameras, (0,)), policy.cameras)
        sampled_BHA.append(policy.act(raw, noise_at(0, one.episode.key, frame, (4, 7))[None]))
    batch = SimpleNamespace(
        observation=None, actions_BHA=torch.from_numpy(demonstrated_BHA), valid_BH=torch.from_numpy(valid_BH)
    )
    stand_in = SimpleNamespace(
        noise_shape=(4, 7),
        sample=lambda observation, noise: torch.from_numpy(np.stack(sampled_BHA)),
        statistics=policy.policy.statistics,
        action_normaliser=policy.policy.action_normaliser,
    )
    keys = SimpleNamespace(draw=lambda *which: (None, None))
    error_A, size_A, wanted_size_A, _, count_A = _action_sums(stand_in, batch, keys).unbind()
    assert found.error_in_deviations == pytest.approx(float((error_A / count_A).mean()), rel=1e-5)
    assert found.magnitude == pytest.approx(float(size_A.sum() / wanted_size_A.sum()), rel=1e-5)


def test_a_lerobot_dataset_whose_cameras_have_other_names(run, tmp_path):
    folder = write_lerobot(tmp_path / "set", recordings(keys=("observation.images.front", "observation.images.hand")))
    config = ActConfig(checkpoint=run, demos=folder, every=3, device="cpu", out=tmp_path / "out")
    with pytest.raises(DataError, match="name one, e.g. --camera agentview"):
        act(config)
    camera = {"agentview": "observation.images.front", "eye_in_hand": "observation.images.hand"}
    found = act(replace(config, episode=(2,), camera=camera))
    assert found.predictions.groupby("frame").size().to_dict() == {0: 4, 3: 4, 6: 3}, "9 frames"
    assert set(found.predictions["key"]) == {"episode_000002"}


def test_frames_near_the_end_count_what_is_there(policy, demos):
    chosen = choose(LiberoHdf5Source(demos), (0,), task="", every=3)
    predictions = predict({"it": imitator(policy, demos)}, chosen, NAMES, seed=0)
    steps = predictions.groupby("frame")["horizon_step"].apply(list).to_dict()
    assert steps == {0: [0, 1, 2, 3], 3: [0, 1, 2, 3], 6: [0]}, "7 frames, chunks of 4"
    counts = {row.horizon_step: row.num_compared for row in errors(predictions, ["it"])}
    assert counts == {0: 3, 1: 2, 2: 2, 3: 2}
    assert not (predictions == 99).any(axis=None), "99 is what it does where nothing was demonstrated"


def test_two_policies_see_the_same_frames_with_the_same_noise(policy, demos):
    longer = imitator(policy, demos, horizon=6)
    longer.policy = SimpleNamespace(noise_shape=(6, 7))
    policies = {"A": imitator(policy, demos), "B": longer}
    chosen = choose(LiberoHdf5Source(demos), (1, 3), task="", every=2)
    predict(policies, chosen, NAMES, seed=4)
    assert len(longer.asked) == 3 + 3
    for (raw_a, noise_a), (raw_b, noise_b) in zip(policies["A"].asked, longer.asked, strict=True):
        assert (noise_a.shape, noise_b.shape) == ((1, 1, 4, 7), (1, 1, 6, 7))
        np.testing.assert_array_equal(noise_a, noise_b[:, :, :4])
        np.testing.assert_array_equal(raw_a.images["eye_in_hand"], raw_b.images["eye_in_hand"])
    drawn = {noise_at(*which, (4, 7)).tobytes() for which in ((0, "a", 0), (0, "a", 8), (0, "b", 0), (1, "a", 0))}
    assert len(drawn) == 4
    assert noise_at(0, "a", 8, (4, 7)).tobytes() in drawn


def test_observation_offsets_are_respected(policy, demos):
    fake = imitator(policy, demos, observation_offsets=(-3, 0))
    (one,) = choose(LiberoHdf5Source(demos), (2,), task="", every=2)
    predict({"it": fake}, [one], NAMES, seed=0)
    read = [
        (raw.images["eye_in_hand"][:, 0, 0, 1].tolist(), raw.there_T.tolist(), raw.state_TS.shape)
        for raw, _ in fake.asked
    ]
    assert read == [
        ([0, 0], [False, True], (2, 8)),
        ([0, 2], [False, True], (2, 8)),
        ([1, 4], [True, True], (2, 8)),
        ([3, 6], [True, True], (2, 8)),
        ([5, 8], [True, True], (2, 8)),
    ]
    assert [round(1000 * raw.state_TS[0, 0]) for raw, _ in fake.asked] == [0, 0, 1, 3, 5]
    (raw, _), *_ = fake.asked
    np.testing.assert_array_equal(raw.images["agentview"][1], one.episode.pictures("agentview")[0])


def test_the_command_writes_what_it_found(run, demos, capsys):
    checkpoints = [str(run / "checkpoints" / f"step_{step:06d}") for step in (5, 3)]
    main([*checkpoints, "--demos", str(demos), "--episode", "0", "2", "--every", "3", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "A: demo/step_000005" in printed and "B: demo/step_000003" in printed and "`vlatune profile`" in printed
    folder = run / "act"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["actions_0000.png", "actions_0002.png", "errors.csv", "errors.png", "predictions.csv"]
    predictions, errors_found = (pd.read_csv(folder / name) for name in ("predictions.csv", "errors.csv"))
    assert len(predictions) == 2 * ((4 + 4 + 1) + (4 + 4 + 3))
    spreads = [name for name in (*predictions, *errors_found) if name.startswith("spread")]
    assert len(spreads) == 7 + 1, "empty where one chunk was drawn"
    for rows in (predictions, errors_found):
        assert set(rows.columns[rows.isna().any()]) == set(rows.columns) & set(spreads)
    assert len(errors_found) == 2 * 7 * 4 and list(errors_found["policy"].unique()) == [
        "demo/step_000005",
        "demo/step_000003",
    ]
    source = LiberoHdf5Source(demos)
    actions = {key: source.read(key).actions_NA for key in predictions["key"].unique()}
    for _, row in predictions.iterrows():
        demonstrated = actions[row["key"]][row["frame"] + row["horizon_step"]]
        np.testing.assert_allclose([row[f"demonstrated_{name}"] for name in NAMES], demonstrated, rtol=1e-6)
    for _, row in errors_found.iterrows():
        of = predictions[
            (predictions["policy"] == row["policy"]) & (predictions["horizon_step"] == row["horizon_step"])
        ]
        difference = of[f"predicted_{row['dimension']}"] - of[f"demonstrated_{row['dimension']}"]
        assert row["error"] == pytest.approx(difference.abs().mean(), rel=1e-5)
        assert row["error_in_deviations"] == pytest.approx(row["error"] / 1.25, rel=1e-9), "the policy's statistics"
    for name in names:
        if name.endswith(".png"):
            pixels = np.asarray(Image.open(io.BytesIO((folder / name).read_bytes())).convert("RGB"))
            assert pixels.shape[1] > 800 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    # The policy itself, asked by hand, says what the file has.
    policy = load_policy(Path(checkpoints[0]), device="cpu")
    (one,) = choose(source, (2,), task="", every=3)
    raw = one.observed(3, (0,), one.pictures_of(policy.cameras, (0,)), policy.cameras)
    chunk = policy.act(raw, noise_at(0, one.episode.key, 3, (4, 7))[None])
    written = predictions.query("policy == 'demo/step_000005' and episode == 2 and frame == 3")
    np.testing.assert_allclose(written[[f"predicted_{name}" for name in NAMES]], chunk, rtol=1e-6)
    # Another episode in the same folder: no figure of the earlier ones stays.
    act(ActConfig(checkpoint=run, demos=demos, episode=(0,), task="open the box", device="cpu", num_sampling_steps=1))
    assert sorted(path.name for path in folder.glob("*.png")) == ["actions_0000.png", "errors.png"]
    again = pd.read_csv(folder / PREDICTIONS_NAME)
    assert set(again["task"]) == {"open_the_box"} and set(again["policy"]) == {"demo/step_000005"}
    assert set(pd.read_csv(folder / "errors.csv")["num_sampling_steps"]) == {1}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"every": 0}, "--every is 0; at least 1 is needed"),
        ({"seed": -1}, "--seed is -1; at least 0 is needed"),
        ({"episode": (1, 1)}, "--episode 1 1: give different numbers of 0 or more"),
        ({"episode": ()}, "--episode : give different numbers"),
        ({"episode": (0, 9)}, "--episode 9: the demonstrations are numbered 0 to 3; give some of these"),
        (
            {"episode": (1,), "task": "open_the_box"},
            "--episode 1: the demonstrations of task 'open_the_box' are numbered 0 to 0",
        ),
        ({"task": "lift_the_cap"}, "no demonstration is of this task; did you mean lift_the_cup?"),
        ({"weights": "ema"}, "has no ema.safetensors: its run kept no average"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(run, demos, tmp_path, settings, sentence):
    with pytest.raises((ValueError, DataError), match=sentence):
        act(ActConfig(checkpoint=run, demos=demos, device="cpu", out=tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_checkpoints_and_demonstrations_that_do_not_fit_are_refused(run, demos, tmp_path, policy):
    with pytest.raises(DataError, match="there is no HDF5 file under .*nothing"):
        act(ActConfig(checkpoint=run, demos=tmp_path / "nothing", device="cpu"))
    with pytest.raises(ValueError, match="is given twice; give another checkpoint"):
        ActConfig(checkpoint=run, other=run / "checkpoints" / "..", demos=demos)
    with pytest.raises(ValueError, match="step_000005 is what both .* mean; give another checkpoint"):
        act(ActConfig(checkpoint=run, other=run / "checkpoints" / "step_000005", demos=demos, device="cpu"))
    other = write_checkpoint(tmp_path / "joints" / "checkpoints" / "step_000001", seed=0)
    config = json.loads((other / "config.json").read_text())
    config["embodiment"]["robot"] = "libero_panda_joints"
    (other / "config.json").write_text(json.dumps(config))
    sentence = r"demo/step_000005 of libero_panda \(7 action dims\) and joints/step_000001 of libero_panda_joints \(7"
    with pytest.raises(ValueError, match=sentence):
        act(ActConfig(checkpoint=run, other=other, demos=demos, device="cpu"))
    with pytest.raises(ValueError, match="is of robot libero_panda .* demonstrations are of libero_panda_joints_fing"):
        check_fit("demo", policy, LIBERO_PANDA_JOINTS_FINGERS)
    blind = copy.copy(policy)
    blind.cameras = ("agentview", "left_wrist")
    with pytest.raises(
        ValueError, match="sees through agentview, left_wrist, and the demonstrations have agentview, eye"
    ):
        check_fit("demo", blind, LIBERO_PANDA)


def test_without_statistics_of_its_data_deviations_are_the_demonstrations(policy, demos):
    chosen = choose(LiberoHdf5Source(demos), (0, 1), task="", every=8)
    together = np.concatenate([one.episode.actions_NA for one in chosen])
    unknown = copy.copy(policy)
    unknown.policy = copy.copy(policy.policy)
    statistics = policy.policy.statistics
    unknown.policy.statistics = replace(statistics, actions=replace(statistics.actions, std=None))
    deviation, origin = deviation_of({"it": unknown}, chosen)
    np.testing.assert_allclose(deviation, together.std(axis=0), rtol=1e-5)
    assert "of these demonstrations" in origin
    known, origin = deviation_of({"it": unknown, "other": policy}, chosen)
    np.testing.assert_allclose(known, 1.25)
    assert "that other was trained on" in origin
