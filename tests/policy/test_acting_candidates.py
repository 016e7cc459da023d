"""Acting with several candidates: one is what acting is without them, several are compared with what was planned before."""

import json

import numpy as np
import pytest
import torch
from small_policies import make_policy, raw_observations

from vlatune.data.batch import RawObservation
from vlatune.data.language import Language
from vlatune.policy.acting import ActingPolicy, load_policy
from vlatune.policy.checkpoints.folder import write_policy
from vlatune.policy.checkpoints.layout import COMPLETE
from vlatune.policy.objectives.consistency import most_consistent

INSTRUCTION = "pick up the red cube"
EXECUTED = 3


def acting(num_candidates: int) -> ActingPolicy:
    language = Language.build([INSTRUCTION], encoder="none")
    return ActingPolicy(
        make_policy(), language, weights_hash="", device=torch.device("cpu"), num_candidates=num_candidates
    )


def observations(number: int = 3) -> list[RawObservation]:
    return raw_observations(*[INSTRUCTION] * number)


def noise_of(policy: ActingPolicy, number: int = 3) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((number, *policy.noise_shape), dtype=np.float32)


def each_candidate(noise_BKHA: np.ndarray) -> torch.Tensor:
    """(B, K, H, A) raw actions: what each noise gives without any other."""
    one = acting(1)
    chunks = [one.act(observations(), noise_BKHA[:, k]) for k in range(noise_BKHA.shape[1])]
    return torch.from_numpy(np.stack(chunks, axis=1))


def test_one_candidate_is_acting_as_before_bit_for_bit():
    one = acting(1)
    assert one.noise_shape == (4, 7)
    assert one.sampling == {"objective": "flow", "num_sampling_steps": 2}
    noise = noise_of(one)
    with torch.no_grad():
        direct = make_policy().eval().sample(one._prepared(observations()), torch.from_numpy(noise))
    assert np.array_equal(one.act(observations(), noise), direct.numpy())
    previous = np.ones((3, 4, 7), np.float32)
    assert np.array_equal(one.act(observations(), noise, previous=previous, num_executed_steps=9), direct.numpy())


def test_the_candidate_that_goes_on_with_the_previous_chunk_is_taken():
    several = acting(5)
    assert several.noise_shape == (5, 4, 7)
    assert several.sampling == {"objective": "flow", "num_sampling_steps": 2, "num_candidates": 5}
    noise = noise_of(several)
    chunks_BKHA = each_candidate(noise)
    previous = np.zeros((3, 4, 7), np.float32)
    winners = [4, 2, 1]
    for row, winner in enumerate(winners):
        previous[row, EXECUTED:] = chunks_BKHA[row, winner, : 4 - EXECUTED]
    taken = several.act(observations(), noise, previous=previous, num_executed_steps=EXECUTED)
    expected = np.stack([chunks_BKHA[row, winner].numpy() for row, winner in enumerate(winners)])
    np.testing.assert_allclose(taken, expected, atol=1e-5)


def test_chunks_are_compared_normalised():
    """Where dimensions differ in scale, raw units would choose another candidate."""
    several = acting(16)
    scale_D = torch.tensor([1e-2, 1.0, 1e2, 1.0, 1e-2, 1e2, 1.0])
    normaliser = several.policy.action_normaliser
    normaliser._scale = tuple(scale_D.tolist())
    normaliser._fill(torch.device("cpu"))
    noise, previous = noise_of(several), np.ones((3, 4, 7), np.float32)
    taken = several.act(observations(), noise, previous=previous, num_executed_steps=EXECUTED)
    chunks_BKHA = each_candidate(noise)  # of the unscaled policy: the same chunks, normalised
    plain = make_policy().action_normaliser
    normalised_BKHA = plain(chunks_BKHA)
    by_normalised = most_consistent(normalised_BKHA, normaliser(torch.from_numpy(previous)), EXECUTED)
    by_raw = most_consistent(normaliser.inverse(normalised_BKHA), torch.from_numpy(previous), EXECUTED)
    np.testing.assert_allclose(taken, normaliser.inverse(by_normalised).numpy(), atol=1e-3)
    assert not np.allclose(taken, by_raw.numpy(), atol=1e-3)


def test_an_episodes_first_decision_takes_the_first_candidate():
    several = acting(4)
    noise = noise_of(several)
    chunks_BKHA = each_candidate(noise).numpy()
    first = several.act(observations(), noise, num_executed_steps=EXECUTED)
    np.testing.assert_allclose(first, chunks_BKHA[:, 0], atol=1e-5)
    previous = chunks_BKHA[:, 2].copy()
    previous[:, EXECUTED:] = chunks_BKHA[:, 3, : 4 - EXECUTED]
    previous[1] = np.nan  # this one has just begun, beside others
    mixed = several.act(observations(), noise, previous=previous, num_executed_steps=EXECUTED)
    np.testing.assert_allclose(mixed, np.stack([chunks_BKHA[row, k] for row, k in enumerate((3, 0, 3))]), atol=1e-5)


def test_a_prefix_is_encoded_once(monkeypatch):
    several = acting(6)
    backbone, calls = type(several.policy.backbone), []
    forward = backbone.forward

    def counted(self, observation, *arguments):
        calls.append(observation.state_BTS.shape[0])
        return forward(self, observation, *arguments)

    monkeypatch.setattr(backbone, "forward", counted)
    several.act(observations(), noise_of(several), num_executed_steps=EXECUTED)
    assert calls == [3], "one call, with a row for each observation and none for candidates"


def test_one_observation_needs_no_batch():
    several = acting(3)
    noise, (seen, *_) = noise_of(several, 1), observations()
    previous = np.zeros((4, 7), np.float32)
    chunk = several.act(seen, noise, previous=previous, num_executed_steps=EXECUTED)
    assert chunk.shape == (4, 7)
    batch = several.act([seen], noise, previous=previous[None], num_executed_steps=EXECUTED)
    assert np.array_equal(chunk, batch[0])
    assert several.act(seen, num_executed_steps=EXECUTED).shape == (4, 7), "draws its noise"


def test_acting_keeps_nothing():
    several = acting(3)
    noise, previous = noise_of(several), np.ones((3, 4, 7), np.float32)
    first = several.act(observations(), noise, previous=previous, num_executed_steps=EXECUTED)
    several.act(observations(), noise, num_executed_steps=1)
    assert np.array_equal(several.act(observations(), noise, previous=previous, num_executed_steps=EXECUTED), first)


def test_what_cannot_be_compared_is_refused():
    several = acting(3)
    with pytest.raises(ValueError, match=r"with 3 candidates num_executed_steps must say .*: 1 to 3"):
        several.act(observations(), noise_of(several))
    with pytest.raises(ValueError, match="4 executed steps of a chunk of 4: .* execute from 1 to 3"):
        several.act(observations(), noise_of(several), num_executed_steps=4)
    with pytest.raises(ValueError, match=r"the previous chunks are \(3, 9, 7\), these will be \(3, 4, 7\)"):
        several.act(observations(), noise_of(several), previous=np.zeros((3, 9, 7), np.float32), num_executed_steps=1)
    with pytest.raises(ValueError, match="num_candidates is 0; it must be at least 1"):
        acting(0)


def test_a_checkpoint_is_loaded_with_candidates(tmp_path):
    policy = make_policy()
    write_policy(tmp_path, policy, policy.state_dict(), Language.build([INSTRUCTION], encoder="none"), {})
    (tmp_path / COMPLETE).write_text("")
    several = load_policy(tmp_path, device="cpu", num_candidates=2)
    assert json.dumps(dict(several.sampling), sort_keys=True).startswith('{"num_candidates": 2')
    expected = acting(2).act(observations(), noise_of(several), num_executed_steps=1)
    assert np.array_equal(several.act(observations(), noise_of(several), num_executed_steps=1), expected)
