"""Decisions that come late: what is carried out meanwhile, step by step, and how a sweep names it."""

import json
from functools import partial

import fake_point_world
import fake_policy
import numpy as np
import pytest
from fake_point_world import Watched
from fake_policy import FakePolicy

from vlatune.eval.delay import InferenceDelay
from vlatune.eval.policy_server import PolicyServer
from vlatune.eval.results import read
from vlatune.eval.rollout import roll_out
from vlatune.eval.simulator_process import EpisodeSpec
from vlatune.eval.sweep import SweepConfig, sweep
from vlatune.eval.sweep_plan import Wanted, make_plan
from vlatune.eval.workers import WorkerPool

STILL = None


def carried_out(delay: InferenceDelay | None, *, executed: int, horizon: int, steps: int, gripper: float = 0.5, **more):
    """(what was carried out, the steps whose observations were decided on, the outcome, all actions): of each step the decision's index
    and that of its action, or STILL."""
    actions, decided = [], []

    def decide(decision, raw, seen):
        decided.append(int(raw.state_TS[-1, 2]))
        chunk = np.zeros((horizon, 7))
        chunk[:, 0], chunk[:, 1], chunk[:, 6] = 0.1 * (decision + 1), 0.01 * np.arange(horizon), gripper
        return chunk

    environment = Watched()
    outcome = roll_out(
        environment,
        decide,
        init_state=0,
        seed=0,
        num_executed_steps=executed,
        max_steps=steps,
        delay=delay,
        on_step=lambda step, seen, state, action: actions.append(action),
        **more,
    )
    assert [step for step in environment.rendered if step < steps] == decided, "only what is decided on is rendered"
    places = [STILL if a[0] == 0 else (round(10 * a[0]) - 1, round(100 * a[1])) for a in actions]
    return places, decided, outcome, np.array(actions)


def of(decision: int, *places: int) -> list[tuple[int, int]]:
    return [(decision, place) for place in places]


@pytest.mark.parametrize("delay", [None, InferenceDelay(), InferenceDelay(while_waiting="previous")])
def test_without_a_delay_chunks_follow_each_other(delay):
    places, decided, outcome, _ = carried_out(delay, executed=3, horizon=5, steps=8)
    assert places == [*of(0, 0, 1, 2), *of(1, 0, 1, 2), *of(2, 0, 1)]
    assert decided == [0, 3, 6]
    assert outcome.seam_jump == pytest.approx(np.hypot(0.1, 0.02))


def test_holding_loses_the_delay_at_every_chunk():
    places, decided, outcome, actions = carried_out(InferenceDelay(num_steps=2), executed=3, horizon=3, steps=13)
    hold = [STILL, STILL]
    assert places == [*hold, *of(0, 0, 1, 2), *hold, *of(1, 0, 1, 2), *hold, *of(2, 0)]
    assert decided == [0, 5, 10]
    assert actions[:2, 6].tolist() == [-1, -1], "as the robot's card has it: nothing has been decided yet"
    assert (actions[2:, 6] == 0.5).all(), "what it has gripped it holds on to"
    seams = [np.hypot(0.1, 0.02), 0.2, np.hypot(0.2, 0.02), 0.3]
    assert outcome.seam_jump == pytest.approx(np.mean(seams)), "the gripper and the first start left out"


@pytest.mark.parametrize(
    ("delay", "executed", "expected", "decided"),
    [
        (2, 3, [*of(0, 0, 1, 2, 3, 4), *of(1, 2, 3, 4), *of(2, 2, 3, 4)], [0, 5, 8, 11]),
        (2, 2, [*of(0, 0, 1, 2, 3), *of(1, 2, 3), *of(2, 2, 3), *of(3, 2, 3)], [0, 4, 6, 8, 10]),
        (1, 4, [*of(0, 0, 1, 2, 3, 4), *of(1, 1, 2, 3, 4)], [0, 5, 9]),
    ],
)
def test_going_on_with_the_previous_chunk_skips_what_is_over(delay, executed, expected, decided):
    late = InferenceDelay(num_steps=delay, while_waiting="previous")
    steps = delay + len(expected)
    places, asked, outcome, actions = carried_out(late, executed=executed, horizon=executed + delay, steps=steps)
    assert places == [STILL] * delay + expected
    assert asked == [step for step in decided if step < steps]
    changes = [k for k in range(delay + 1, steps) if places[k][0] != places[k - 1][0]]
    jumps = [np.linalg.norm(actions[k, :6] - actions[k - 1, :6]) for k in changes]
    assert outcome.seam_jump == pytest.approx(np.mean(jumps))


def test_a_late_plan_is_ensembled_with_those_that_reach_its_steps():
    late = InferenceDelay(num_steps=1, while_waiting="previous")
    actions = carried_out(late, executed=2, horizon=5, steps=7, temporal_ensemble=0.0)[3]
    # Chunk 1 is for steps 2 to 6 of the plan and there at 3; chunk 2 for 4 to 8, there at 5.
    assert actions[1:, 0] == pytest.approx([0.1, 0.1, 0.1, 0.15, 0.15, 0.25])
    assert actions[1:, 1] == pytest.approx([0, 0.01, 0.02, (0.03 + 0.01) / 2, (0.04 + 0.02) / 2, (0.03 + 0.01) / 2])


def test_earlier_observations_are_rendered_for_late_decisions_too():
    environment = Watched()
    roll_out(
        environment,
        lambda decision, raw, seen: np.zeros((5, 7)),
        init_state=0,
        seed=0,
        num_executed_steps=3,
        max_steps=9,
        delay=InferenceDelay(num_steps=2, while_waiting="previous"),
        observation_offsets=(-1, 0),
    )
    assert environment.rendered == [0, 4, 5, 7, 8]


def test_a_chunk_that_does_not_reach_over_the_delay_is_refused():
    late = InferenceDelay(num_steps=2, while_waiting="previous")
    with pytest.raises(ValueError, match="decided on 4 actions, and 5 are to be executed"):
        carried_out(late, executed=3, horizon=4, steps=9)


@pytest.mark.parametrize(
    ("num_steps", "executed", "message"),
    [
        (
            4,
            3,
            "--inference-delay 4: with 3 executed steps the next decision is due before .*; type 3 or less, or --while",
        ),
        (3, 6, "--inference-delay 3: the policy's chunks have 8 steps, and 6 are executed .* needs 9: type 2 or less"),
    ],
)
def test_what_chunks_do_not_bridge_is_refused(num_steps, executed, message):
    with pytest.raises(ValueError, match=message):
        InferenceDelay(num_steps=num_steps, while_waiting="previous").check(executed, 8)
    InferenceDelay(num_steps=num_steps).check(executed, 8)


# In a sweep.


def specs_of(policy: FakePolicy, delay: InferenceDelay, executed: int = 4) -> list[EpisodeSpec]:
    plan = make_plan(fake_point_world.make(), Wanted(selection_episodes=2, report_episodes=1, delay=delay))
    return plan.specs(
        "selection", "policy", policy=policy, checkpoint=None, num_executed_steps=executed, videos=fake_policy.Path()
    )


def test_a_delay_is_another_setting_and_none_is_not():
    policy = FakePolicy(1.0, "w")
    delays = [InferenceDelay(num_steps=n, while_waiting=way) for n in (0, 1, 2) for way in ("hold", "previous")]
    settings = {delay: {spec.key.sampling for spec in specs_of(policy, delay)} for delay in delays}
    plain = json.dumps(policy.sampling, sort_keys=True)
    assert settings[delays[0]] == settings[delays[1]] == {plain}, "as rows of before have it"
    assert [len(names) for names in settings.values()] == [1] * 6
    assert len(set.union(*settings.values())) == 5
    assert json.loads(settings[delays[5]].pop()) == {
        **policy.sampling,
        "inference_delay": 2,
        "while_waiting": "previous",
    }


def test_an_actor_without_a_policy_knows_no_delay():
    late = InferenceDelay(num_steps=2)
    plan = make_plan(fake_point_world.make(), Wanted(selection_episodes=2, report_episodes=1, delay=late))
    for policy, delay in ((FakePolicy(1.0, "w"), late), (None, InferenceDelay())):
        specs = plan.specs(
            "report", "zero", policy=policy, checkpoint=None, num_executed_steps=1, videos=fake_policy.Path()
        )
        assert {spec.delay for spec in specs} == {delay}


def test_workers_wait_and_the_policy_hears_what_is_over():
    class Noting(FakePolicy):
        def act(self, observations, noise_BHA, *, previous=None, num_executed_steps=None, inference_delay=0):
            heard[way].append((bool(np.isnan(previous).any()), num_executed_steps, inference_delay))
            return super().act(observations, noise_BHA)

    outcomes, heard = {}, {"hold": [], "previous": []}
    for way, noted in heard.items():
        policy = Noting(0.5, "w")
        policy.reads_previous = True
        with WorkerPool(partial(fake_point_world.make, None), num_workers=1) as pool:
            results = list(
                pool.run(specs_of(policy, InferenceDelay(num_steps=3, while_waiting=way)), PolicyServer(policy, 1))
            )
        assert not any(result.error for result in results)
        outcomes[way] = [result.outcome for result in results]
        assert sum(is_first for is_first, *_ in noted) == len(results)
    assert {s for _, s, _ in heard["hold"]} == {4}
    assert {d for *_, d in heard["hold"]} == {0} and {d for *_, d in heard["previous"]} == {3}
    # 24 steps: three of waiting before each four, or before the first alone.
    assert max(len(outcome.decision_ms) for outcome in outcomes["hold"]) <= 4
    assert max(len(outcome.decision_ms) for outcome in outcomes["previous"]) == 6


def test_rows_of_different_delays_live_side_by_side(tmp_path):
    run_folder = fake_policy.write_run(tmp_path / "demo", {100: 1.0})

    def swept(**changes):
        config = SweepConfig(
            runs=(run_folder,),
            selection_episodes=1,
            report_episodes=1,
            num_executed_steps=(4,),
            baselines=("scripted",),
            tasks=(0, 1),
            videos=0,
            num_workers=1,
            **changes,
        )
        sweep(config, make_benchmark=fake_point_world.make, load_policy=fake_policy.load_policy)
        return read(run_folder)

    plain = swept()
    both = swept(inference_delay=4)
    assert (len(plain), len(both)) == (6, 10), "the scripted actor knows no delay and is not run again"
    assert both.iloc[:6].equals(plain)
    late = both[both["sampling"].str.contains('"inference_delay": 4')]
    assert len(late) == 4
    assert (late["num_steps"].to_numpy() > both[(both["actor"] == "policy")][:4]["num_steps"].to_numpy()).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inference_delay": -1}, "--inference-delay -1: a delay is 0 control steps or more"),
        (
            {"inference_delay": 4, "while_waiting": "previous"},
            "--inference-delay 4: the policy's chunks have 10 steps, and 8 are executed .*: type 2 or less",
        ),
        (
            {"real_time_chunking": "linear", "num_executed_steps": (10,)},
            "--real-time-chunking linear: .* all 10 are executed; type --num-executed-steps with a number below 10",
        ),
        (
            {"real_time_chunking": "ones", "temporal_ensemble": 0.1},
            "--real-time-chunking ones: .* so does --temporal-ensemble; leave one of them out",
        ),
        ({"real_time_chunking": "ones", "num_candidates": 3}, "so does --num-candidates; leave one of them out"),
    ],
)
def test_what_cannot_be_asked_for(tmp_path, changes, message):
    run_folder = fake_policy.write_run(tmp_path / "demo", {100: 1.0})
    config = SweepConfig(runs=(run_folder,), selection_episodes=1, report_episodes=1, num_workers=1, **changes)
    with pytest.raises(ValueError, match=message):
        sweep(config, make_benchmark=fake_point_world.make, load_policy=fake_policy.load_policy)
