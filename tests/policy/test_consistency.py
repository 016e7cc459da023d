"""Consistency between decisions: the candidate that goes on with the previous chunk, and the candidates themselves."""

import pytest
import torch
from toy_problems import LearningExpert, seeded_normal

from vlatune.policy.objectives.consistency import most_consistent, sample_candidates
from vlatune.policy.objectives.flow import Flow
from vlatune.policy.objectives.regression import Regression
from vlatune.policy.objectives.rs_imle import RSIMLE


@pytest.mark.parametrize("num_executed", [1, 3, 5])
def test_the_candidate_that_goes_on_with_the_previous_chunk_is_chosen(num_executed):
    chunks, previous = seeded_normal(3, 4, 6, 2), seeded_normal(3, 6, 2, seed=1)
    winners = [2, 0, 3]
    for row, winner in enumerate(winners):
        chunks[row, winner, : 6 - num_executed] = previous[row, num_executed:] + 0.01
    chosen = most_consistent(chunks, previous, num_executed)
    assert torch.equal(chosen, torch.stack([chunks[row, winner] for row, winner in enumerate(winners)]))


def test_only_the_overlap_is_compared():
    chunks, previous = seeded_normal(2, 5, 6, 2), seeded_normal(2, 6, 2, seed=1)
    winners = most_consistent(chunks, previous, 4)
    changed, executed = chunks.clone(), previous.clone()
    changed[:, :, 2:], executed[:, :4] = 100 * seeded_normal(2, 5, 4, 2, seed=2), 7.0
    assert torch.equal(most_consistent(changed, executed, 4)[:, :2], winners[:, :2])


def test_the_distance_is_euclidean():
    """One large error against two small ones: absolute errors would choose the first."""
    chunks = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[2.0, 2.0], [0.0, 0.0]]])[None]
    assert torch.equal(most_consistent(chunks, torch.zeros(1, 2, 2), 1), chunks[:, 1])


def test_the_first_decision_takes_the_first_candidate():
    chunks, previous = seeded_normal(3, 4, 6, 2), seeded_normal(3, 6, 2, seed=1)
    assert torch.equal(most_consistent(chunks, None, 2), chunks[:, 0])
    chunks[:, 3, :4] = previous[:, 2:]
    previous[1] = torch.nan  # an environment that has just begun, beside others
    assert torch.equal(most_consistent(chunks, previous, 2), torch.stack([chunks[0, 3], chunks[1, 0], chunks[2, 3]]))


def test_chunks_without_overlap_are_refused():
    chunks = torch.zeros(1, 2, 6, 2)
    for num_executed in (0, 6, 7):
        with pytest.raises(ValueError, match=f"{num_executed} executed steps of a chunk of 6: .* execute from 1 to 5"):
            most_consistent(chunks, None, num_executed)


def test_nothing_is_read_on_the_host():
    chunks = torch.empty(2, 4, 6, 2, device="meta")
    assert most_consistent(chunks, chunks[:, 0], 2).shape == (2, 6, 2)


@pytest.mark.parametrize("objective", [Flow(num_sampling_steps=3), RSIMLE(), Regression()], ids=lambda o: o.type)
def test_candidates_are_what_each_noise_gives_alone(objective):
    torch.manual_seed(0)
    bound = LearningExpert(horizon=2, action_dim=3, condition_dim=2).bind(seeded_normal(4, 2))
    noise_BKHA = seeded_normal(4, 5, 2, 3, seed=1)
    with torch.no_grad():
        chunks_BKHA = sample_candidates(objective, bound, noise_BKHA)
        for k in range(5):
            assert torch.allclose(chunks_BKHA[:, k], objective.sample(bound, noise_BKHA[:, k]), atol=1e-6)
    assert chunks_BKHA.shape == noise_BKHA.shape
