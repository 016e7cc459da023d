"""LeRobot's processor files: read as they lie on the hub, never taken for the identity, written so that they read back."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlatune.data.episodes import DataError
from vlatune.data.normalise import FieldStatistics, Normaliser, Statistics
from vlatune.policy.checkpoints.lerobot_processors import read_normalisation, write_processors

CONFIG = {
    "input_features": {
        "observation.images.front": {"type": "VISUAL", "shape": [3, 16, 16]},
        "observation.state": {"type": "STATE", "shape": [3]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [2]}},
    "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "QUANTILES"},
}
STATE = {"mean": [1.0, 2.0, 3.0], "std": [0.5, 1.0, 2.0]}
ACTIONS = {"q01": [-1.0, 0.0], "q99": [1.0, 4.0]}


def tensors(**features):
    return {
        f"{feature}.{column}": torch.tensor(values)
        for feature, columns in features.items()
        for column, values in columns.items()
    }


STORED = tensors(**{"observation.state": STATE, "action": ACTIONS})


def put(folder, *, stored=STORED, actions=None, norm_map=None, index=5, **step_config):
    """As LeRobot saves them, with the step at `index`; files of other indices lie about."""
    step = {"eps": 1e-8, "norm_map": norm_map or CONFIG["normalization_mapping"], **step_config}
    for pipeline, name, tensors_of_step in (
        ("policy_preprocessor", "normalizer_processor", stored),
        ("policy_postprocessor", "unnormalizer_processor", stored if actions is None else actions),
    ):
        file = f"{pipeline}_step_{index}_{name}.safetensors"
        save_file(tensors_of_step, folder / file)
        save_file(
            {key: value + 9 for key, value in tensors_of_step.items()}, folder / f"{pipeline}_step_0_{name}.safetensors"
        )
        tokenise = {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": "some/tokenizer"}}
        steps = [{"class": "a.b.Mine"}, tokenise, {"registry_name": name, "config": step, "state_file": file}]
        (folder / f"{pipeline}.json").write_text(json.dumps({"name": pipeline, "steps": steps}))


def edit(file, change):
    content = json.loads(file.read_text())
    change(content["steps"])
    file.write_text(json.dumps(content))


def test_the_step_names_its_file(tmp_path):
    put(tmp_path, stored={**STORED, "observation.state.count": torch.tensor([12.0])})
    found = read_normalisation(tmp_path, CONFIG)
    assert (found.state_mode, found.action_mode) == ("mean_std", "quantile")
    assert found.statistics.state.mean == (1.0, 2.0, 3.0)
    assert found.statistics.state.q01 is None
    assert (found.statistics.state.count, found.statistics.actions.count) == (12, 0)
    assert found.statistics.actions.q99 == (1.0, 4.0)
    assert found.near_constant == 1e-8
    assert found.tokenizer_name == "some/tokenizer"


def test_actions_are_the_postprocessors(tmp_path):
    put(tmp_path, actions=tensors(action={"q01": [-3.0, -3.0], "q99": [3.0, 3.0]}))
    assert read_normalisation(tmp_path, CONFIG).statistics.actions.q99 == (3.0, 3.0)


def test_the_steps_modes_stand_above_the_configs(tmp_path):
    put(tmp_path, norm_map={"STATE": "IDENTITY", "ACTION": "IDENTITY"}, stored={"other": torch.ones(1)})
    found = read_normalisation(tmp_path, CONFIG)
    assert (found.state_mode, found.action_mode) == ("identity", "identity")
    for pipeline in ("policy_preprocessor", "policy_postprocessor"):
        edit(tmp_path / f"{pipeline}.json", lambda steps: steps[-1]["config"].pop("norm_map"))
    with pytest.raises(DataError, match=r"has no observation\.state\.mean"):
        read_normalisation(tmp_path, CONFIG)


def test_smolvla_bases_statistics_fit_no_feature(tmp_path):
    """LeRobot loads these and silently normalises nothing."""
    columns = {"mean": [0.0], "std": [1.0]}
    put(
        tmp_path,
        stored=tensors(**{f"{robot}.buffer.action": columns for robot in ("so100", "so100-red", "so100-blue")}),
    )
    sentence = (
        r"policy_preprocessor_step_5_normalizer_processor\.safetensors has no observation\.state\.mean to normalise with .*"
        r"it has 6 others: so100-blue\.buffer\.action\.mean, .* add --statistics FILE"
    )
    with pytest.raises(DataError, match=sentence):
        read_normalisation(tmp_path, CONFIG)
    own = Statistics.compute(np.zeros((2, 3)), np.zeros((2, 2)))
    found = read_normalisation(tmp_path, CONFIG, statistics=own)
    assert found.statistics == own
    assert (found.state_mode, found.action_mode) == ("mean_std", "quantile")
    assert found.near_constant == 1e-4
    assert found.tokenizer_name == "some/tokenizer"


def test_statistics_of_another_mode_do_not_do(tmp_path):
    put(tmp_path, norm_map={"STATE": "MEAN_STD", "ACTION": "MIN_MAX"})
    with pytest.raises(DataError, match=r"has no action\.min to normalise with \(min_max\); it has 4 others"):
        read_normalisation(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("norm_map", "sentence"),
    [
        (
            {"STATE": "QUANTILE10", "ACTION": "IDENTITY"},
            "normalises STATE with 'QUANTILE10', which .* it has MEAN_STD, ",
        ),
        ({"STATE": "MEAN_STD"}, "does not say how ACTION is normalised"),
    ],
)
def test_modes_that_are_not_ours(tmp_path, norm_map, sentence):
    put(tmp_path, norm_map=norm_map)
    with pytest.raises(DataError, match=sentence):
        read_normalisation(tmp_path, CONFIG)


def test_a_step_may_leave_the_state_as_it_is(tmp_path):
    put(tmp_path, normalize_observation_keys=["observation.images.front"])
    assert read_normalisation(tmp_path, CONFIG).state_mode == "identity"


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(DataError, match=r"has no observation\.state\.mean .* it has none\. .*--statistics FILE"):
        read_normalisation(tmp_path, CONFIG)
    put(tmp_path)
    (tmp_path / "policy_preprocessor_step_5_normalizer_processor.safetensors").unlink()
    with pytest.raises(
        DataError, match="names policy_preprocessor_step_5_normalizer_processor.safetensors, which is not"
    ):
        read_normalisation(tmp_path, CONFIG)
    put(tmp_path)
    (tmp_path / "policy_postprocessor.json").unlink()
    with pytest.raises(
        DataError, match=r"policy_postprocessor\.json has no step unnormalizer_processor \(no such file\)"
    ):
        read_normalisation(tmp_path, CONFIG)
    (tmp_path / "policy_postprocessor.json").write_text("[]")
    with pytest.raises(DataError, match="is not a list of LeRobot's processor steps"):
        read_normalisation(tmp_path, CONFIG)


def test_relative_actions_are_refused(tmp_path):
    put(tmp_path)
    with pytest.raises(DataError, match="relative to the state"):
        read_normalisation(tmp_path, {**CONFIG, "use_relative_actions": True})
    relative = {"registry_name": "relative_actions_processor", "config": {"enabled": True}}
    edit(tmp_path / "policy_preprocessor.json", lambda steps: steps.insert(0, relative))
    with pytest.raises(DataError, match="relative to the state"):
        read_normalisation(tmp_path, CONFIG)


def test_a_tokenizer_that_lies_in_the_checkpoint(tmp_path):
    put(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    edit(tmp_path / "policy_preprocessor.json", lambda steps: steps[1].update(config={"tokenizer_name": "tokenizer"}))
    assert read_normalisation(tmp_path, CONFIG).tokenizer_name == str(tmp_path / "tokenizer")


def test_old_checkpoints_keep_statistics_among_the_weights(tmp_path):
    weights = tensors(
        **{
            "normalize_inputs.buffer_observation_state": STATE,
            "model.normalize_targets.buffer_action": ACTIONS,
            "unnormalize_outputs.buffer_action": ACTIONS,
            "action_in_proj": {"weight": [1.0]},
        }
    )
    found = read_normalisation(tmp_path, CONFIG, weights)
    assert found.statistics.state.std == (0.5, 1.0, 2.0)
    assert found.statistics.actions.q01 == (-1.0, 0.0)
    assert found.tokenizer_name is None
    never_given = {**weights, "normalize_inputs.buffer_observation_state.std": torch.full((3,), torch.inf)}
    with pytest.raises(DataError, match=r"observation\.state\.std is not finite; .*--statistics FILE"):
        read_normalisation(tmp_path, CONFIG, never_given)
    other_names = tensors(**{"normalize_inputs.so100_buffer_action": STATE})
    with pytest.raises(DataError, match="it has 2 others: so100_buffer_action.mean, "):
        read_normalisation(tmp_path, CONFIG, other_names)


def lerobots(mode, x_D, columns):
    """What LeRobot's normaliser computes (normalize_processor.py), in float64."""
    low, high = {"mean_std": ("mean", "std"), "quantile": ("q01", "q99"), "min_max": ("min", "max")}[mode]
    a, b = columns[low].double(), columns[high].double()
    if mode == "mean_std":
        return (x_D - a) / (b + 1e-8)
    return 2 * (x_D - a) / torch.where(b == a, 1e-8, b - a) - 1


@pytest.mark.parametrize("mode", ["mean_std", "quantile", "min_max"])
def test_a_constant_dimension_reads_as_lerobot_reads_it(tmp_path, mode):
    columns = {"mean": [5.0, 1.0], "std": [0.0, 2.0], "q01": [5.0, 0.0], "q99": [5.0, 3.0], "min": [5.0, -1.0]}
    columns["max"] = [5.0, 4.0]
    stored = tensors(**{"observation.state": columns, "action": columns})
    theirs = {"mean_std": "MEAN_STD", "quantile": "QUANTILES", "min_max": "MIN_MAX"}[mode]
    put(tmp_path, stored=stored, norm_map={"STATE": theirs, "ACTION": theirs})
    found = read_normalisation(tmp_path, CONFIG)
    x_D = torch.tensor([5.0, 2.5])
    ours = Normaliser(found.statistics.state, found.state_mode, found.near_constant)
    expected = lerobots(mode, x_D, {name: torch.tensor(values) for name, values in columns.items()})
    torch.testing.assert_close(ours(x_D).double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.inverse(ours(x_D)), x_D)


@pytest.mark.parametrize("mode", ["mean_std", "quantile", "min_max"])
def test_a_constant_action_comes_out_constant(tmp_path, mode):
    """Whatever the model says for it, as in LeRobot; an untrained output must not move a joint that stood still in the data."""
    columns = {"mean": [5.0, 0.0], "std": [0.0, 0.0], "q01": [5.0, 0.0], "q99": [5.0, 0.0]}
    columns |= {"min": columns["q01"], "max": columns["q99"]}
    theirs = {"mean_std": "MEAN_STD", "quantile": "QUANTILES", "min_max": "MIN_MAX"}[mode]
    put(tmp_path, stored=tensors(action=columns), norm_map={"STATE": "IDENTITY", "ACTION": theirs})
    first = read_normalisation(tmp_path, CONFIG)
    write(tmp_path, first.statistics, state_mode="identity", action_mode=mode, near_constant=first.near_constant)
    for found in (first, read_normalisation(tmp_path, CONFIG)):
        ours = Normaliser(found.statistics.actions, mode, found.near_constant)
        out_BA = ours.inverse(torch.tensor([[1.5, -2.0], [-0.7, 0.3]]))
        torch.testing.assert_close(out_BA, torch.tensor([[5.0, 0.0]] * 2), rtol=1e-4, atol=1e-6)
        demonstrated = 0.0 if mode == "mean_std" else -1.0
        torch.testing.assert_close(ours(torch.tensor([5.0, 0.0])), torch.full((2,), demonstrated), rtol=0, atol=5e-3)


def test_statistics_wider_than_their_feature(tmp_path):
    put(tmp_path)
    config = {**CONFIG, "output_features": {"action": {"type": "ACTION", "shape": [1]}}}
    with pytest.raises(
        DataError, match=r"action\.q01 has 2 numbers, and config\.json's action has 1; .*--statistics FILE"
    ):
        read_normalisation(tmp_path, config)


def statistics_of(seed):
    random = np.random.default_rng(seed)
    return Statistics.compute(random.normal(size=(50, 3)) * 3, random.normal(size=(50, 2)))


def write(folder, statistics, kind="pi05", state_mode="quantile", action_mode="mean_std", **changes):
    write_processors(
        folder,
        kind=kind,
        statistics=statistics,
        state_mode=state_mode,
        action_mode=action_mode,
        config=CONFIG,
        tokenizer_name="some/tokenizer",
        max_length=48,
        **changes,
    )


@pytest.mark.parametrize("kind", ["pi0", "pi05", "smolvla"])
def test_what_is_written_reads_back(tmp_path, kind):
    statistics = statistics_of(0)
    write(tmp_path, statistics, kind)
    found = read_normalisation(tmp_path, {})
    assert (found.state_mode, found.action_mode, found.tokenizer_name) == ("quantile", "mean_std", "some/tokenizer")
    for field in ("state", "actions"):
        ours, theirs = getattr(statistics, field), getattr(found.statistics, field)
        for column in ("mean", "std", "min", "max", "q01", "q99"):
            np.testing.assert_array_equal(np.float32(getattr(ours, column)), getattr(theirs, column))


STEPS = {
    "pi0": "rename_observations to_batch pi0_new_line tokenizer device relative_actions normalizer",
    "pi05": "rename_observations to_batch relative_actions normalizer pi05_prepare_state_tokenizer tokenizer device",
    "smolvla": "rename_observations to_batch smolvla_new_line tokenizer device normalizer",
}


@pytest.mark.parametrize("kind", STEPS)
def test_steps_stand_in_lerobots_order(tmp_path, kind):
    write(tmp_path, statistics_of(0), kind)
    names = {
        pipeline: [step["registry_name"] for step in json.loads((tmp_path / f"{pipeline}.json").read_text())["steps"]]
        for pipeline in ("policy_preprocessor", "policy_postprocessor")
    }
    short = " ".join(name.removesuffix("_step").removesuffix("_processor") for name in names["policy_preprocessor"])
    assert short == STEPS[kind]
    absolute = [] if kind == "smolvla" else ["absolute_actions_processor"]
    assert names["policy_postprocessor"] == ["unnormalizer_processor", *absolute, "device_processor"]
    index = names["policy_preprocessor"].index("normalizer_processor")
    assert (tmp_path / f"policy_preprocessor_step_{index}_normalizer_processor.safetensors").is_file()
    assert (tmp_path / "policy_postprocessor_step_0_unnormalizer_processor.safetensors").is_file()


@pytest.mark.parametrize("mode", ["mean_std", "quantile", "min_max"])
def test_lerobot_computes_what_was_trained_with(tmp_path, mode):
    """Also where a dimension hardly varies: ours is centred only, and LeRobot's formula would divide by next to nothing."""
    rows = np.random.default_rng(1).normal(size=(50, 3))
    rows[:, 1] = 0.5 + 1e-6 * rows[:, 1]
    rows[:, 2] = 0.25
    statistics = Statistics.compute(rows, rows[:, :2])
    write(tmp_path, statistics, state_mode=mode)
    stored = load_file(tmp_path / "policy_preprocessor_step_3_normalizer_processor.safetensors")
    columns = {
        name.rpartition(".")[2]: tensor for name, tensor in stored.items() if name.startswith("observation.state")
    }
    x_D = torch.from_numpy(rows[0]).float()
    expected = Normaliser(statistics.state, mode)(x_D).double()
    torch.testing.assert_close(lerobots(mode, x_D, columns), expected, rtol=1e-5, atol=1e-6)


def test_an_unknown_kind(tmp_path):
    with pytest.raises(ValueError, match="kind is 'act'; it can be pi0, pi05 or smolvla"):
        write(tmp_path, statistics_of(0), "act")


def test_columns_that_are_not_known_are_not_written(tmp_path):
    known = FieldStatistics(mean=(0.0,), std=(1.0,), count=0)
    write(tmp_path, Statistics(state=known, actions=known), state_mode="mean_std")
    stored = load_file(tmp_path / "policy_preprocessor_step_3_normalizer_processor.safetensors")
    assert set(stored) == {f"{name}.{column}" for name in ("observation.state", "action") for column in ("mean", "std")}
