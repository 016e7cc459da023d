"""Simulator workers: an episode depends on its key alone, and no worker's end loses or doubles one."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import fake_point_world
import numpy as np
import pytest
from fake_policy import FakePolicy

from vlatune.data.raw_observation import RawObservation
from vlatune.eval.actors import make_decide, wrong_instruction
from vlatune.eval.benchmarks.benchmark import NoExpert, Task
from vlatune.eval.policy_server import PolicyServer, Question, noise_for
from vlatune.eval.sweep_plan import SweepPlan, Wanted, make_plan
from vlatune.eval.workers import SimulatorError, WorkerPool


def plan(**changes) -> SweepPlan:
    settings = {
        "selection_episodes": 6,
        "report_episodes": 6,
        "actors": ("policy", "wrong_instruction"),
    }
    return make_plan(fake_point_world.make(), Wanted(**{**settings, **changes}))


def specs(actor="policy", policy=None, **changes):
    policy = policy or FakePolicy(0.6, "w")
    asks = actor not in ("zero", "scripted")
    return plan(**changes).specs(
        "selection",
        actor,
        policy=policy if asks else None,
        checkpoint=None,
        num_executed_steps=8 if asks else 1,
        videos=Path("unused"),
    )


def lasting(result) -> tuple:
    """What of a result does not depend on the clock."""
    outcome = result.outcome
    return (outcome.success, outcome.num_steps, outcome.smoothness, outcome.saturation, len(outcome.decision_ms))


def run_all(episodes, *, server, num_workers=2, trouble=None, timeout_s=60.0):
    make_benchmark = partial(fake_point_world.make, trouble)
    with WorkerPool(make_benchmark, num_workers=num_workers, timeout_s=timeout_s) as pool:
        return {result.spec.key: result for result in pool.run(episodes, server)}


@pytest.fixture(scope="module")
def undisturbed():
    results = run_all(specs(), server=PolicyServer(FakePolicy(0.6, "w"), 2))
    assert len(results) == 18
    outcomes = {key: lasting(result) for key, result in results.items()}
    assert {outcome[0] for outcome in outcomes.values()} == {True, False}, "the comparison needs both outcomes"
    return outcomes


def test_every_forward_has_the_same_batch_size_and_only_the_policys_cameras():
    policy = FakePolicy(0.6, "w")
    run_all(specs(), server=PolicyServer(policy, 5))
    assert set(policy.batch_sizes) == {5}
    assert policy.cameras_seen == {"agentview"}


def test_an_episode_depends_on_its_key_alone(undisturbed):
    shuffled = specs()
    np.random.default_rng(3).shuffle(shuffled)
    results = run_all(shuffled, server=PolicyServer(FakePolicy(0.6, "w"), 4), num_workers=3)
    assert {key: lasting(result) for key, result in results.items()} == undisturbed


def test_a_worker_that_dies_idle_keeps_no_other_from_being_ended():
    with WorkerPool(fake_point_world.make, num_workers=2) as pool:
        list(pool.run(specs(), PolicyServer(FakePolicy(0.6, "w"), 2)))
        processes = [worker.process for worker in pool._workers]
        processes[0].kill()
        processes[0].join()
    assert not any(process.is_alive() for process in processes)


def test_several_policies_in_turn_on_one_pool(undisturbed):
    with WorkerPool(fake_point_world.make, num_workers=2) as pool:
        other = list(pool.run(specs(policy=FakePolicy(1.0, "good")), PolicyServer(FakePolicy(1.0, "good"), 2)))
        processes = [worker.process.pid for worker in pool._workers]
        again = {r.spec.key: lasting(r) for r in pool.run(specs(), PolicyServer(FakePolicy(0.6, "w"), 2))}
        assert [worker.process.pid for worker in pool._workers] == processes, "workers are kept"
        assert all(process.process.is_alive() for process in pool._workers)
        kept = [worker.process for worker in pool._workers]
    assert not any(process.is_alive() for process in kept)
    assert len(other) == 18 and all(result.outcome.success for result in other)
    assert again == undisturbed


def test_times_of_the_policy_are_measured():
    results = run_all(
        specs(policy=FakePolicy(0.6, "w"))[:4], server=PolicyServer(FakePolicy(0.6, "w", delay_s=0.02), 2)
    )
    for result in results.values():
        assert len(result.policy_ms) == len(result.outcome.decision_ms)
        assert min(result.policy_ms) >= 20
        assert np.sum(result.outcome.decision_ms) >= np.sum(result.policy_ms)


def test_an_episode_whose_worker_is_killed_is_run_again(tmp_path, undisturbed):
    for name in ("0_0", "1_3", "2_5"):
        (tmp_path / f"{name}.once").touch()
    results = run_all(specs(), server=PolicyServer(FakePolicy(0.6, "w"), 2), trouble=tmp_path)
    assert not list(tmp_path.iterdir()), "every trouble has struck"
    assert {key: lasting(result) for key, result in results.items()} == undisturbed


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("exit", r"lost 2 times; the worker ended with exit code 3"),
        ("raise", r"lost 2 times; the worker RuntimeError: the physics"),
        ("hang", r"lost 2 times; the worker gave no sign of life for 4 s"),
    ],
)
def test_an_episode_lost_twice_is_an_error_and_the_others_are_run(tmp_path, undisturbed, kind, reason):
    (tmp_path / f"1_2.{kind}").touch()
    results = run_all(specs(), server=PolicyServer(FakePolicy(0.6, "w"), 2), trouble=tmp_path, timeout_s=4.0)
    ((lost, result),) = [(key, result) for key, result in results.items() if result.outcome is None]
    assert (lost.task_id, lost.init_state) == (1, 2)
    assert re.match(reason, result.error)
    kept = {key: lasting(result) for key, result in results.items() if key != lost}
    assert kept == {key: outcome for key, outcome in undisturbed.items() if key != lost}


def test_actions_that_are_not_finite_are_an_error():
    policy = FakePolicy(float("nan"), "w")
    (result,) = run_all(specs(policy=policy)[:1], server=PolicyServer(policy, 1), num_workers=1).values()
    assert "actions at decision 0 are not finite" in result.error


def test_no_renderer_stops_at_once():
    make_benchmark = partial(fake_point_world.make, broken=True)
    with (
        WorkerPool(make_benchmark, num_workers=1) as pool,
        pytest.raises(SimulatorError, match="no simulator could be started: .*Unable to load OSMesa"),
    ):
        list(pool.run(specs()[:2], PolicyServer(FakePolicy(0.6, "w"), 1)))


def test_a_simulator_that_always_dies_stops_the_sweep(tmp_path):
    for spec in specs():
        (tmp_path / f"{spec.key.task_id}_{spec.key.init_state}.exit").touch()
    with (
        WorkerPool(partial(fake_point_world.make, tmp_path), num_workers=2) as pool,
        pytest.raises(SimulatorError, match="10 simulator workers were lost without one finished episode"),
    ):
        list(pool.run(specs(), PolicyServer(FakePolicy(0.6, "w"), 1)))


def test_actors_without_a_policy():
    scripted = run_all(specs("scripted", tasks=(0, 1)), server=None, num_workers=1)
    assert len(scripted) == 12 and all(result.outcome.success for result in scripted.values())
    zero = run_all(specs("zero", tasks=(0, 1)), server=None, num_workers=1)
    assert not any(result.outcome.success for result in zero.values())
    assert all(result.outcome.smoothness == 0 for result in zero.values())


def decide_with(actor: str, asked: list[RawObservation]):
    (spec, *_) = specs(actor, tasks=(0, 1))
    environment = fake_point_world.make().make_environment(spec.task, spec.protocol)
    observation = environment.reset(0, 0)
    raw = RawObservation(
        images={camera: image[None] for camera, image in observation.images.items()},
        state_TS=observation.state_S[None],
        instruction=spec.task.language,
    )

    def ask(decision, raw):
        asked.append(raw)
        return np.zeros((10, 7), np.float32)

    decide = make_decide(
        spec.key, environment, cameras=("agentview",), ask=ask, make_expert=fake_point_world.FakeExpert
    )
    return decide(0, raw, observation)


def test_what_the_policy_is_shown():
    asked: list[RawObservation] = []
    for actor in ("policy", "blind", "wrong_instruction"):
        decide_with(actor, asked)
    policy, blind, wrong = asked
    assert policy.images["agentview"].any() and policy.instruction == "reach the red dot"
    assert not blind.images["agentview"].any() and blind.instruction == "reach the red dot"
    assert wrong.images["agentview"].any() and wrong.instruction == "reach the green dot"
    assert set(policy.images) == {"agentview"}
    np.testing.assert_array_equal(blind.state_TS, policy.state_TS)


def test_an_expert_that_is_not_there():
    with pytest.raises(NoExpert, match="no expert for blue"):
        fake_point_world.make().make_expert(plan().tasks[2][0])


def task(task_id: int, language: str) -> Task:
    return Task(
        benchmark="b", suite="s", task_id=task_id, name=str(task_id), language=language, bddl_file="", num_init_states=2
    )


def test_the_wrong_instruction_differs_in_object_and_target():
    tasks = [
        task(0, "put the red cube on the plate"),
        task(1, "put the red cube on the stand"),
        task(2, "put the blue cube on the plate"),
        task(3, "put the blue cube on the stand"),
    ]
    assert [wrong_instruction(one, tasks) for one in tasks] == [tasks[k].language for k in (3, 2, 1, 0)]


def test_the_wrong_instruction_of_equals_is_the_next_tasks():
    tasks = [task(k, f"push object{k}") for k in range(4)]
    assert [wrong_instruction(one, tasks) for one in tasks] == [tasks[k].language for k in (1, 2, 3, 0)]


def test_the_wrong_instruction_needs_another():
    with pytest.raises(ValueError, match="no other instruction than 'push it'"):
        wrong_instruction(task(0, "push it"), [task(0, "push it"), task(1, "Push it")])


def test_noise_is_the_keys_and_the_decisions():
    first, second = (spec.key for spec in specs()[:2])
    noise_HA = noise_for(first, 0, (10, 7))
    assert noise_HA.shape == (10, 7) and noise_HA.dtype == np.float32
    np.testing.assert_array_equal(noise_HA, noise_for(first, 0, (10, 7)))
    assert not np.array_equal(noise_HA, noise_for(first, 1, (10, 7)))
    assert not np.array_equal(noise_HA, noise_for(second, 0, (10, 7)))
    many = np.concatenate([noise_for(first, k, (50, 7)) for k in range(50)])
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03


def test_noise_is_the_same_however_the_policy_is_computed():
    key = specs()[0].key
    plain, steps = '{"num_sampling_steps": 10, "objective": "flow"}', '{"num_sampling_steps": 5, "objective": "flow"}'
    narrow = '{"compiled": true, "num_sampling_steps": 10, "objective": "flow", "precision": "bfloat16"}'
    keys = [replace(key, sampling=sampling) for sampling in (plain, narrow, steps)]
    noises = [noise_for(one, 3, (4, 7)) for one in keys]
    assert np.array_equal(noises[0], noises[1]) and not np.array_equal(noises[0], noises[2])
    assert len({one.digest() for one in keys}) == 3 and keys[0].noise_root() == keys[0].digest()


def test_a_row_does_not_depend_on_its_place_in_the_batch():
    environment = fake_point_world.make().make_environment(plan().tasks[0][0], None)
    questions = []
    for spec in specs()[:3]:
        observation = environment.reset(spec.key.init_state, 0)
        raw = RawObservation(
            images={"agentview": observation.images["agentview"][None]},
            state_TS=observation.state_S[None],
            instruction="reach the red dot",
        )
        questions.append(Question(key=spec.key, decision=0, raw=raw))
    server = PolicyServer(FakePolicy(0.6, "w"), 3)
    together = server.answer(questions)
    np.testing.assert_array_equal(server.answer(questions[::-1])[::-1], together)
    for k, question in enumerate(questions):
        np.testing.assert_array_equal(server.answer([question])[0], together[k])


def test_noise_of_candidates_is_the_keys():
    key = specs()[0].key
    noise_KHA = noise_for(key, 0, (3, 10, 7))
    assert noise_KHA.shape == (3, 10, 7)
    np.testing.assert_array_equal(noise_KHA[0], noise_for(key, 0, (10, 7)))
    assert not np.array_equal(noise_KHA[0], noise_KHA[1])


def test_a_decision_with_candidates_is_told_the_last_answer():
    class Recording(FakePolicy):
        answers: list[np.ndarray] = []  # noqa: RUF012

        def act(self, *arguments, **settings):
            assert settings["num_executed_steps"] == 8
            self.answers.append(super().act(*arguments, **settings))
            return self.answers[-1]

    policy = Recording(0.3, "w", num_candidates=3)
    results = run_all(specs(policy=policy), server=PolicyServer(policy, 1), num_workers=1)
    began = 0
    for call, previous_BHA in enumerate(policy.previous_seen):
        if np.isnan(previous_BHA).all():
            began += 1
        else:
            np.testing.assert_array_equal(previous_BHA, policy.answers[call - 1])
    assert began == len(results) == 18
    assert len(policy.previous_seen) > 2 * began, "most decisions are not an episode's first"


def test_an_episode_with_candidates_depends_on_its_key_alone():
    def outcomes(num_workers, batch_size, order):
        policy = FakePolicy(0.5, "w", num_candidates=2)
        episodes = [specs(policy=policy)[k] for k in order]
        results = run_all(episodes, server=PolicyServer(policy, batch_size), num_workers=num_workers)
        return {key: lasting(result) for key, result in results.items()}

    assert outcomes(1, 1, range(9)) == outcomes(2, 4, reversed(range(9)))


def test_a_policy_without_candidates_is_asked_as_ever():
    policy = FakePolicy(0.6, "w")
    run_all(specs(policy=policy)[:2], server=PolicyServer(policy, 1))
    assert policy.previous_seen == []
