"""Buckets, bound experts taken apart, shapes filled up, and the loop in words: what an export is made of."""

from typing import get_args

import numpy as np
import pytest
import torch
from preset_policies import make_batch, make_policy

from vlatune.data.language import Language
from vlatune.data.prompt import prompt_text
from vlatune.policy.export.bound_tensors import tensors_of, with_tensors
from vlatune.policy.export.buckets import Bucket, fitting, make_buckets
from vlatune.policy.export.command import prompt_lengths
from vlatune.policy.export.description import ActionReading, Scaling
from vlatune.policy.export.onnx_policy import filled_up
from vlatune.policy.export.sampling_loop import STEPS, levels_in_numbers
from vlatune.policy.objectives import AnyObjective
from vlatune.policy.objectives.flow import Flow
from vlatune.policy.objectives.regression import Regression
from vlatune.policy.objectives.shortcut import Shortcut
from vlatune.policy.presets import PRESETS

CAMERAS = ("front", "left", "right")


def test_buckets_are_every_combination_once():
    buckets = make_buckets((8, 1, 8), (24,), ("right, front", "front,right", "left"), CAMERAS)
    assert [(bucket.batch, bucket.prompt_tokens, bucket.cameras) for bucket in buckets] == [
        (1, 24, ("front", "right")),
        (1, 24, ("left",)),
        (8, 24, ("front", "right")),
        (8, 24, ("left",)),
    ]
    assert make_buckets((1,), (8,), (), CAMERAS)[0].cameras == CAMERAS


@pytest.mark.parametrize(
    ("batch", "num_tokens", "cameras", "expected"),
    [
        (1, 10, "fl", (1, 24, "fl")),  # the smallest that will do
        (2, 10, "fl", (8, 24, "fl")),  # one call of 8 rather than two of 1
        (20, 10, "fl", (8, 24, "fl")),
        (1, 30, "fl", (1, 48, "fl")),
        (1, 10, "flr", (1, 24, "fl")),  # a camera that nothing reads
        (1, 10, "fr", (1, 24, "f")),
    ],
)
def test_the_bucket_that_fits(batch, num_tokens, cameras, expected):
    made = [
        Bucket(batch=rows, prompt_tokens=tokens, cameras=tuple(names))
        for rows in (8, 1)
        for tokens in (48, 24)
        for names in ("f", "fl")
    ]
    found = fitting(made, batch=batch, num_tokens=num_tokens, cameras=set(cameras))
    assert (found.batch, found.prompt_tokens, "".join(found.cameras)) == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_a_bound_expert_taken_apart_and_together_is_the_same(preset):
    policy = make_policy(preset).eval()
    config = policy.config
    first, second = (policy.bind(make_batch(config, 2, seed=seed).observation) for seed in (0, 1))
    named = tensors_of(second)
    assert len({id(tensor) for tensor in named.values()}) == len(named)
    x, level = torch.randn(2, *policy.noise_shape), torch.tensor([1.0, 0.3])
    together = with_tensors(first, named)
    with torch.no_grad():
        assert torch.equal(together(x, level), second(x, level))
        assert not torch.equal(first(x, level), second(x, level))


def test_a_bound_expert_that_hides_tensors_is_refused():
    bound = make_policy("pi05").bind(make_batch(PRESETS["pi05"](tiny=True), 1).observation)
    bound.hidden = {"inside": Regression()}
    with pytest.raises(TypeError, match=r"hidden\.inside is a Regression, which cannot be handed from graph to graph"):
        tensors_of(bound)


def test_prompts_have_room_for_any_state():
    language = Language.build(["push it", "pick up the red cube"], encoder="none")
    policy = make_policy("pi05")
    assert policy.config.prompt == "pi05"
    lengths = prompt_lengths(policy, language)
    random = np.random.default_rng(0)
    for text, length in lengths.items():
        states = [np.full(8, -5.0), *random.uniform(-1.5, 1.5, (200, 8))]
        found = [int(language.prompts([prompt_text("pi05", text, state)]).mask_BL.sum()) for state in states]
        assert max(found) <= length
        assert max(found) >= length - 8  # and not much room beyond


def test_rows_and_prompts_are_filled_up():
    prepared = {
        "state": np.arange(6, dtype=np.float32).reshape(2, 1, 3),
        "prompt_ids": np.ones((2, 3), np.int64),
        "prompt_mask": np.ones((2, 3), bool),
        "prompt_embedding": np.ones((2, 3, 4), np.float32),
    }
    filled = filled_up(prepared, Bucket(batch=4, prompt_tokens=5, cameras=("front",)))
    assert {name: value.shape for name, value in filled.items()} == {
        "state": (4, 1, 3),
        "prompt_ids": (4, 5),
        "prompt_mask": (4, 5),
        "prompt_embedding": (4, 5, 4),
    }
    assert np.array_equal(filled["state"][2:], np.stack([prepared["state"][1]] * 2))
    assert filled["prompt_mask"].sum(axis=1).tolist() == [3, 3, 3, 3]
    assert {name: value.dtype for name, value in filled.items()} == {
        name: value.dtype for name, value in prepared.items()
    }


def test_actions_are_read_in_raw_units():
    reading = ActionReading(slots=(2, 0), encoding="as_is", scaling=Scaling(centre=(1.0, -1.0), scale=(2.0, 10.0)))
    chunk = np.array([[[0.1, 7.0, 0.5]]], np.float32)
    np.testing.assert_allclose(reading.raw(chunk), [[[2.0, 0.0]]], atol=1e-6)


def test_the_loop_is_written_down_for_every_objective():
    kinds = get_args(AnyObjective)
    assert {kind().type if kind is not None else "" for kind in kinds} == STEPS.keys()
    assert levels_in_numbers(Flow(num_sampling_steps=2), (3, 4)) == ((1.0, 0.5), ())
    assert levels_in_numbers(Flow(solver="heun", num_sampling_steps=2), (3, 4)) == ((1.0, 0.5, 0.5), ())
    assert levels_in_numbers(Shortcut(num_sampling_steps=2), (3, 4)) == ((1.0, 0.5), (0.5, 0.5))
    assert levels_in_numbers(Regression(), (3, 4)) == ((0.0,), ())
