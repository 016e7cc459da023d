"""Racing against the full sweep: how rarely the best is dropped, how much is saved, and a race that was killed."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, norm
from small_episodes import row

from vlatune.eval.racing import Block, Episode, Race, in_blocks
from vlatune.eval.results import header, read

LEARNING_CURVE = (0.30, 0.45, 0.58, 0.68, 0.76, 0.82, 0.87, 0.90, 0.92, 0.93, 0.94, 0.95)


def episode_list(num_tasks: int, per_task: int) -> list[Episode]:
    return [Episode("libero", "libero_spatial", t, k, 0) for t in range(num_tasks) for k in range(per_task)]


def draw(rng: np.random.Generator, rates_MT: np.ndarray, per_task: int, correlation: float) -> np.ndarray:
    """Successes of M checkpoints on T tasks and K init states, (M, T, K): an init state is as hard for all of them, as far as
    `correlation` (that of the normal variables behind the outcomes) says."""
    hardness_1TK = rng.standard_normal((1, rates_MT.shape[1], per_task))
    own_MTK = rng.standard_normal((*rates_MT.shape, per_task))
    noise_MTK = np.sqrt(correlation) * hardness_1TK + np.sqrt(1 - correlation) * own_MTK
    return norm.ppf(rates_MT)[:, :, None] > noise_MTK


def run(solved_MTK: np.ndarray, blocks: list[Block], error: float = 0.05) -> Race:
    """A whole race; checkpoint m is called `m`."""
    race = Race([str(m) for m in range(len(solved_MTK))], blocks, error=error)
    while not race.is_over:
        for name, episode in race.to_run():
            race.add(name, episode, bool(solved_MTK[int(name), episode.task_id, episode.init_state]))
    return race


def share_saved(race: Race) -> float:
    ran = sum(standing.episodes for standing in race.standings())
    return 1 - ran / (len(race.names) * sum(map(len, race.blocks)))


def test_blocks_go_round_the_tasks():
    episodes = episode_list(num_tasks=4, per_task=5)
    blocks = in_blocks(episodes, per_task=2)
    assert [len(block) for block in blocks] == [8, 8, 4]
    for block in blocks:
        assert {episode.task_id for episode in block} == {0, 1, 2, 3}
        assert len({[e.task_id for e in block].count(task) for task in range(4)}) == 1
    assert sorted(episode for block in blocks for episode in block) == sorted(episodes)
    assert in_blocks(random.Random(0).sample(episodes, len(episodes)), per_task=2) == blocks
    assert in_blocks(episodes, per_task=2, seed=1) != blocks


def wrongly_dropped(rates_MT: np.ndarray, times: int, *, per_task: int, correlation: float, seed: int = 0) -> int:
    """In how many races the checkpoint 0 is dropped."""
    rng, blocks = np.random.default_rng(seed), in_blocks(episode_list(rates_MT.shape[1], per_task))
    return sum("0" not in run(draw(rng, rates_MT, per_task, correlation), blocks).survivors for _ in range(times))


EQUAL = np.full((6, 5), 0.8)
"""Six checkpoints that are all as good: each of five has its chance to look better than the first."""
OTHER_TASKS = np.array([[0.75] * 4 + [0.95], [0.9] * 4 + [0.35], [0.9] * 4 + [0.3], [0.85] * 4 + [0.5]])
"""The first has the best mean, and is worse than every other on four tasks of five."""


@pytest.mark.parametrize(("rates_MT", "correlation"), [(EQUAL, 0.5), (OTHER_TASKS, 0.0)], ids=["equal", "other_tasks"])
def test_the_best_is_rarely_dropped(rates_MT, correlation):
    times = 200
    assert wrongly_dropped(rates_MT, times, per_task=20, correlation=correlation) <= binom.ppf(0.999, times, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.5])
@pytest.mark.parametrize(
    "rates_MT", [EQUAL, np.full((20, 10), 0.9), OTHER_TASKS], ids=["equal", "twenty", "other_tasks"]
)
def test_the_best_is_rarely_dropped_in_many_races(rates_MT, correlation):
    times = 1000
    dropped = wrongly_dropped(rates_MT, times, per_task=25, correlation=correlation, seed=1)
    print(f"dropped {dropped} of {times}")
    assert dropped <= binom.ppf(0.999, times, 0.05)


def test_the_simulation_catches_a_rule_that_forgets_how_often_it_looks():
    """McNemar's one-sided p of every rival after every block, each at 0.05: the best is lost in a quarter of the races."""
    rng, lost, times = np.random.default_rng(0), 0, 300
    for _ in range(times):
        solved_MTK = draw(rng, EQUAL, 20, 0.5)
        wins = np.cumsum((solved_MTK[1:] & ~solved_MTK[0]).sum(axis=1), axis=1)
        losses = np.cumsum((~solved_MTK[1:] & solved_MTK[0]).sum(axis=1), axis=1)
        lost += bool((binom.sf(wins - 1, wins + losses, 0.5) <= 0.05).any())
    assert lost / times > 0.2


def test_much_is_saved_and_the_choice_is_the_full_sweeps():
    """Twelve checkpoints of a run, 10 tasks that are not equally hard, 25 init states of each."""
    rng, blocks = np.random.default_rng(0), in_blocks(episode_list(10, 25))
    saved, same, times = [], 0, 25
    for _ in range(times):
        rates_MT = norm.cdf(1.12 * norm.ppf(LEARNING_CURVE)[:, None] + rng.normal(0, 0.5, size=10))
        solved_MTK = draw(rng, rates_MT, 25, correlation=0.5)
        race = run(solved_MTK, blocks)
        saved.append(share_saved(race))
        full = solved_MTK.mean(axis=(1, 2))
        same += race.leader == str(max(range(len(full)), key=lambda m: (full[m], m)))
    assert np.mean(saved) > 0.4
    assert same >= times - 2


def test_a_race_of_unequal_checkpoints_ends_early():
    solved_MTK = draw(np.random.default_rng(0), np.array([[0.3] * 10, [0.9] * 10, [0.5] * 10]), 50, 0.0)
    race = run(solved_MTK, in_blocks(episode_list(10, 50)))
    assert race.survivors == ("1",) and race.is_over and race.to_run() == []
    assert race.num_blocks_done < 15
    first, winner, _ = race.standings()
    assert first.dropped_after <= race.num_blocks_done and first.evidence >= 20 and winner.dropped_after is None
    assert first.episodes == 10 * first.dropped_after and 0.2 < first.success_rate < 0.4


def rows_of(results: Iterable[tuple[str, Episode, bool | None]]) -> list[str]:
    """Lines of an `episodes.csv`."""
    outcomes = {True: "success", False: "failure", None: "error"}
    return [
        row(weights_hash=name, **episode._asdict(), outcome=outcomes[success], success=success).to_line()
        for name, episode, success in results
    ]


def rebuilt(file: Path, names: Sequence[str], blocks: Sequence[Block]) -> Race:
    """A race from the rows of an `episodes.csv`, as a sweep that goes on rebuilds it."""
    race, episodes = Race(names, blocks), {episode for block in blocks for episode in block}
    for each in read(file).itertuples():
        if each.weights_hash in names and Episode.of(each) in episodes:
            race.add(each.weights_hash, Episode.of(each), each.outcome == "success")
    return race


def test_a_killed_race_goes_on_from_its_rows(tmp_path):
    """Killed at random moments, with rows in any order, of other checkpoints and of other init states: what it asks for next, and how it
    ends, is as if it had never stopped."""
    blocks = in_blocks(episode_list(3, 20), per_task=2)
    solved_MTK = draw(np.random.default_rng(3), np.array([[0.4] * 3, [0.6] * 3, [0.9] * 3, [0.85] * 3]), 20, 0.3)
    undisturbed = run(solved_MTK, blocks)
    file, order, names = tmp_path / "episodes.csv", random.Random(0), undisturbed.names
    other = [("elsewhere", blocks[0][0], True), ("1", Episode("libero", "libero_spatial", 0, 49, 0), True)]
    lines, restarts = rows_of(other), 0
    while True:
        order.shuffle(lines)
        file.write_text(header() + "".join(lines))
        race = rebuilt(file, names, blocks)
        if race.is_over:
            break
        wanted = race.to_run()
        done = order.sample(wanted, k=order.randint(1, len(wanted)))
        lines += rows_of((name, e, bool(solved_MTK[int(name), e.task_id, e.init_state])) for name, e in done)
        restarts += 1
    assert restarts > 10
    assert race.standings() == undisturbed.standings() and race.leader == undisturbed.leader
    assert len(lines) - len(other) == sum(standing.episodes for standing in race.standings()), "none was run in vain"


def test_a_finished_sweep_can_be_raced_again():
    """Rows of dropped checkpoints and of blocks ahead change nothing."""
    blocks = in_blocks(episode_list(5, 30))
    solved_MTK = draw(np.random.default_rng(5), np.array([[0.3] * 5, [0.8] * 5, [0.75] * 5]), 30, 0.3)
    undisturbed = run(solved_MTK, blocks)
    assert "0" not in undisturbed.survivors
    race = Race(undisturbed.names, blocks)
    everything = [(name, episode) for name in race.names for block in reversed(blocks) for episode in block]
    for name, episode in everything:
        race.add(name, episode, bool(solved_MTK[int(name), episode.task_id, episode.init_state]))
    assert race.standings() == undisturbed.standings()


def test_errors_are_no_reason_to_drop():
    """A checkpoint whose simulator always crashed stays, and as a rival it is no reason to drop another."""
    blocks = in_blocks(episode_list(10, 20))
    race = Race(["good", "crashed", "bad"], blocks)
    while not race.is_over:
        for name, episode in race.to_run():
            race.add(name, episode, {"good": True, "crashed": None, "bad": False}[name])
    _, crashed, bad = race.standings()
    assert race.survivors == ("good", "crashed") and race.leader == "good"
    assert (crashed.episodes, crashed.errors) == (0, 200) and crashed.evidence <= 1
    assert bad.dropped_after == 1
    alone = Race(["crashed", "bad"], blocks)
    while not alone.is_over:
        for name, episode in alone.to_run():
            alone.add(name, episode, None if name == "crashed" else False)
    assert alone.survivors == ("crashed", "bad")


def test_of_equals_the_later_leads():
    blocks = in_blocks(episode_list(2, 3))
    assert run(np.ones((3, 2, 3), dtype=bool), blocks).leader == "2"
    assert Race(["only"], blocks).is_over and Race(["only"], blocks).leader == "only"


def test_refusals():
    blocks = in_blocks(episode_list(2, 3))
    with pytest.raises(ValueError, match="tasks have 2 to 3 episodes: a race needs equally many"):
        in_blocks(episode_list(2, 3)[:-1])
    with pytest.raises(ValueError, match="in the list twice"):
        in_blocks(episode_list(1, 3) * 2)
    with pytest.raises(ValueError, match="per_task 0: a block holds at least 1"):
        in_blocks(episode_list(1, 3), per_task=0)
    with pytest.raises(ValueError, match="different names; got a, a"):
        Race(["a", "a"], blocks)
    with pytest.raises(ValueError, match="at least one block"):
        Race(["a", "b"], [])
    with pytest.raises(ValueError, match="an error rate of 5"):
        Race(["a", "b"], blocks, error=5)
    race = Race(["a", "b"], blocks)
    with pytest.raises(ValueError, match="'c' is not in the race; these are: a, b"):
        race.add("c", blocks[0][0], True)
    with pytest.raises(ValueError, match="not in the race's list"):
        race.add("a", Episode("libero", "libero_spatial", 7, 0, 0), True)
    race.add("a", blocks[0][0], True)
    with pytest.raises(ValueError, match="'a' has a second result .* one actor and sampling setting"):
        race.add("a", blocks[0][0], True)
