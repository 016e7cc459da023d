"""Racing: the best of many checkpoints on one list of episodes, without running all of them on all of it.

All checkpoints run the same block of episodes; those that can no longer be the best are dropped; the others run the next block.
A race is a function of the rows alone: one that was killed is rebuilt from `episodes.csv` and goes on as if nothing had happened.

**The rule.** For every other checkpoint j there is evidence that j is better than i: an e-value on the episodes that only one of the two
solved (`sequential.log_e_first_better`), valid at the end of every block because each block holds every task equally often. Checkpoint i
is dropped once the mean of these e-values over j reaches 1/error. If i is the best, each is expected to stay below 1, so their mean
is too, whatever their dependence, and by Ville's inequality it ever reaches 1/error with probability at most `error`. (The mean of
e-values: Vovk and Wang, Annals of Statistics 49, 2021, p. 1736. It drops whatever Bonferroni's correction over the rivals would, and more.) The
evidence of a dropped rival stays as it was when that one was dropped.

**What is promised.** The checkpoint with the highest success rate, a task counting like any other, is dropped with probability at most
`error`; rates are those over the distribution that the init states were drawn from, independently of each other. Which of the survivors has the highest rate at
the end of the list is chosen as a full sweep would choose it, with a full sweep's uncertainty.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from .sequential import log_e_first_better


class Episode(NamedTuple):
    """What all checkpoints have in common when they run the same episode."""

    benchmark: str
    suite: str
    task_id: int
    init_state: int
    seed: int

    @classmethod
    def of(cls, row: Any) -> Self:
        """Of an `EpisodeRow`, an `EpisodeKey` or a row of `DataFrame.itertuples()`."""
        return cls(row.benchmark, row.suite, int(row.task_id), int(row.init_state), int(row.seed))


Block = tuple[Episode, ...]


def in_blocks(episodes: Iterable[Episode], *, per_task: int = 1, seed: int = 0) -> list[Block]:
    """The episodes in blocks of `per_task` from every task (the last block may hold fewer), each task's in an order drawn by `seed`: a
    race must not mistake the order of the init states for a difference. The order in which they are given does not matter.

    Raises `ValueError` if an episode is there twice or if a task has more episodes than another."""
    if per_task < 1:
        raise ValueError(f"per_task {per_task}: a block holds at least 1 episode of every task")
    by_task: dict[tuple[str, str, int], list[Episode]] = defaultdict(list)
    for episode in sorted(episodes):
        by_task[episode[:3]].append(episode)
    counts = {len(of_task) for of_task in by_task.values()}
    if len(counts) > 1:
        raise ValueError(
            f"tasks have {min(counts)} to {max(counts)} episodes: a race needs equally many of every task; choose as many init "
            "states of each"
        )
    if any(len(set(of_task)) < len(of_task) for of_task in by_task.values()):
        raise ValueError("an episode is in the list twice; a race runs each once")
    random = np.random.default_rng(seed)
    shuffled = [[of_task[k] for k in random.permutation(len(of_task))] for of_task in by_task.values()]
    starts = range(0, next(iter(counts), 0), per_task)
    return [tuple(e for of_task in shuffled for e in of_task[start : start + per_task]) for start in starts]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A checkpoint's place in the race, over the blocks that it has finished in it."""

    name: str
    episodes: int
    """That ended, in success or failure."""
    successes: int
    errors: int
    evidence: float
    """The mean e-value that another is better; dropped at 1/error."""
    dropped_after: int | None
    """Blocks after which it was dropped; None for a survivor."""

    @property
    def success_rate(self) -> float:
        """NaN before the first episode."""
        return self.successes / self.episodes if self.episodes else float("nan")


class Race:
    """Give it results with `add`, in any order; `to_run` says what is wanted next, `is_over` when nothing is."""

    def __init__(self, names: Sequence[str], blocks: Sequence[Block], *, error: float = 0.05) -> None:
        """`names` are the checkpoints in the order of training (of equals, the later one leads); `blocks` come from `in_blocks`.
        Raises `ValueError` for no or equal names, no block, and an error rate not between 0 and 1."""
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a race is between checkpoints of different names; got {', '.join(names) or 'none'}")
        if not blocks:
            raise ValueError("a race needs at least one block of episodes")
        if not 0 < error < 1:
            raise ValueError(f"an error rate of {error}: it lies between 0 and 1, for instance 0.05")
        self.names, self.blocks, self.error = tuple(names), tuple(blocks), error
        self.num_blocks_done = 0
        self._results: dict[str, dict[Episode, bool | None]] = {name: {} for name in names}
        self._episodes = {episode for block in blocks for episode in block}
        self._dropped_after: dict[str, int] = {}
        self._wins_MM = np.zeros((len(names), len(names)), dtype=int)  # [j, i]: j succeeded where i failed
        self._losses_MM = np.zeros_like(self._wins_MM)
        self._log_evidence_M = np.zeros(len(names))
        self._wanted = self._lacking()

    @property
    def survivors(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in self._dropped_after)

    @property
    def is_over(self) -> bool:
        """One is left, or the list is finished."""
        return len(self.survivors) == 1 or self.num_blocks_done == len(self.blocks)

    @property
    def leader(self) -> str:
        """The survivor with the highest success rate over the finished blocks, the later one of equals; the choice when it is over."""
        standings = [standing for standing in self.standings() if standing.dropped_after is None]
        return max(reversed(standings), key=lambda standing: standing.successes / max(1, standing.episodes)).name

    def to_run(self) -> list[tuple[str, Episode]]:
        """The results that the current block still lacks, checkpoint by checkpoint; nothing when the race is over."""
        return list(self._wanted)

    def add(self, name: str, episode: Episode, success: bool | None) -> None:
        """One result; None is an episode that could not be run (`error`), which is never a reason to drop: where it is i's it counts as a
        success against the others, where it is theirs as a failure. Results of the dropped, and ahead of time, are kept and wait.

        Raises `ValueError` for a checkpoint or an episode that is not in the race, and for a second result of an episode."""
        if name not in self._results:
            raise ValueError(f"{name!r} is not in the race; these are: {', '.join(self.names)}")
        if episode not in self._episodes:
            raise ValueError(f"{episode} is not in the race's list of episodes")
        if episode in self._results[name]:
            raise ValueError(f"{name!r} has a second result of {episode}; give those of one actor and sampling setting")
        self._results[name][episode] = success
        self._wanted.pop((name, episode), None)
        while not self._wanted and not self.is_over:
            self._finish_block()
            self._wanted = self._lacking()

    def standings(self) -> list[Standing]:
        """Every checkpoint, in the order of `names`."""
        places = []
        for k, name in enumerate(self.names):
            last = self._dropped_after.get(name, self.num_blocks_done)
            results = [self._results[name][episode] for block in self.blocks[:last] for episode in block]
            places.append(
                Standing(
                    name=name,
                    episodes=len(results) - results.count(None),
                    successes=results.count(True),
                    errors=results.count(None),
                    evidence=float(np.exp(min(self._log_evidence_M[k], 700.0))),
                    dropped_after=self._dropped_after.get(name),
                )
            )
        return places

    def _lacking(self) -> dict[tuple[str, Episode], None]:
        """What the current block lacks: a set that keeps its order."""
        if self.is_over:
            return {}
        block = self.blocks[self.num_blocks_done]
        return {(name, e): None for name in self.survivors for e in block if e not in self._results[name]}

    def _finish_block(self) -> None:
        """Shapes: E episodes of the block, M checkpoints, S survivors."""
        block, survivors = self.blocks[self.num_blocks_done], self.survivors
        results_ES = [[self._results[name][episode] for name in survivors] for episode in block]
        surely_ES = np.array([[result is True for result in row] for row in results_ES], dtype=int)
        possibly_ES = np.array([[result is not False for result in row] for row in results_ES], dtype=int)
        at_S = np.array([self.names.index(name) for name in survivors])
        self._wins_MM[np.ix_(at_S, at_S)] += surely_ES.T @ (1 - possibly_ES)
        self._losses_MM[np.ix_(at_S, at_S)] += (1 - surely_ES).T @ possibly_ES
        self.num_blocks_done += 1

        log_e_MM = log_e_first_better(self._wins_MM, self._losses_MM)
        np.fill_diagonal(log_e_MM, -np.inf)  # nobody is better than itself
        log_mean_M = np.logaddexp.reduce(log_e_MM, axis=0) - np.log(len(self.names) - 1)
        self._log_evidence_M[at_S] = log_mean_M[at_S]
        leader = self.leader  # keeping it can only lower the error rate, and leaves a race with somebody in it
        for k in at_S:
            if self.names[k] != leader and log_mean_M[k] >= -np.log(self.error):
                self._dropped_after[self.names[k]] = self.num_blocks_done
