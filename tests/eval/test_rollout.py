"""One episode: which steps are rendered, what a decision sees, and the mean of overlapping chunks."""

from functools import partial

import fake_point_world
import numpy as np
import pytest
from fake_point_world import Watched
from fake_policy import FakePolicy

from vlatune.eval.policy_server import PolicyServer
from vlatune.eval.rollout import roll_out
from vlatune.eval.sweep_plan import Wanted, make_plan
from vlatune.eval.temporal_ensemble import TemporalEnsemble
from vlatune.eval.workers import WorkerPool


def run(environment, decide, *, num_executed_steps=4, max_steps=12, **settings):
    return roll_out(
        environment,
        decide,
        init_state=0,
        seed=0,
        max_steps=max_steps,
        num_executed_steps=num_executed_steps,
        **settings,
    )


def still(_decision, _raw, _seen):
    return np.zeros((8, 7))


@pytest.mark.parametrize(
    ("offsets", "rendered"),
    [
        ((0,), [0, 4, 8, 12]),
        ((-1, 0), [0, 3, 4, 7, 8, 11, 12]),
        ((-6, -2, 0), [0, 2, 4, 6, 8, 10, 12]),
    ],
)
def test_only_what_a_decision_reads_is_rendered(offsets, rendered):
    environment = Watched()
    run(environment, still, observation_offsets=offsets)
    assert environment.rendered == rendered
    environment = Watched()
    run(environment, still, observation_offsets=offsets, render_every_step=True)
    assert environment.rendered == list(range(13))


def test_a_decision_gets_the_steps_of_its_offsets_and_knows_which_lie_before_the_start():
    seen = []
    run(
        Watched(),
        lambda decision, raw, now: seen.append(raw) or np.zeros((8, 7)),
        observation_offsets=(-6, -2, 0),
    )
    assert [raw.state_TS[:, 2].tolist() for raw in seen] == [[0, 0, 0], [0, 2, 4], [2, 6, 8]]
    for raw in seen:
        assert raw.images["agentview"][:, 0, 0, 0].tolist() == raw.state_TS[:, 2].tolist()
    assert [raw.there_T.tolist() for raw in seen] == [[False, False, True], [False, True, True], [True, True, True]]


def test_an_actor_must_decide_on_as_many_actions_as_are_executed():
    with pytest.raises(ValueError, match="decided on 8 actions, and 9 are to be executed"):
        run(Watched(), still, num_executed_steps=9)


def test_temporal_ensembling_is_the_weighted_mean_of_all_chunks_that_reach_a_step():
    """Chunks of 4, a decision at every step, by hand."""
    ensemble = TemporalEnsemble(0.5)
    chunks = [np.full((4, 1), float(k)) for k in range(6)]
    for step, chunk in enumerate(chunks):
        ensemble.add(step, chunk)
        reaching = np.arange(max(0, step - 3), step + 1)  # the oldest first
        weights = np.exp(-0.5 * np.arange(len(reaching)))
        assert ensemble.action(step) == pytest.approx((weights @ reaching) / weights.sum())
    executed = []
    run(
        Watched(),
        lambda decision, raw, now: np.full((4, 7), 0.1 * decision),
        num_executed_steps=2,
        max_steps=6,
        temporal_ensemble=0.0,
        on_step=lambda step, seen, state, action: executed.append(action[0]),
    )
    assert executed == pytest.approx([0.0, 0.0, 0.05, 0.05, 0.15, 0.15]), "steps 4 and 5: chunks 1 and 2 of three"


def test_it_is_another_sampling_setting_and_reaches_the_workers():
    policy = FakePolicy(0.3, "w")
    results = {}
    for coefficient in (None, 0.01):
        plan = make_plan(
            fake_point_world.make(), Wanted(selection_episodes=2, report_episodes=1, temporal_ensemble=coefficient)
        )
        specs = plan.specs("selection", "policy", policy=policy, checkpoint=None, num_executed_steps=1, videos=None)
        with WorkerPool(partial(fake_point_world.make, None), num_workers=1) as pool:
            results[coefficient] = {r.spec.key: r.outcome for r in pool.run(specs, PolicyServer(policy, 1))}
    (with_it, without) = (results[0.01], results[None])
    assert all('"temporal_ensemble": 0.01' in key.sampling for key in with_it)
    assert not set(with_it) & set(without)
    mean = {name: np.mean([o.smoothness for o in outcomes.values()]) for name, outcomes in results.items()}
    assert mean[0.01] < mean[None], "the mean of noisy plans shakes less"
