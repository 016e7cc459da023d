"""The sweep of one run: who competes, what is still missing, the choice, and the chosen one's judgement."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.episodes import DataError
from .actors import POLICY_ACTORS
from .benchmarks.benchmark import Task
from .candidates import Candidate, best_of, candidates_of
from .choice import SelectionRows, count, line, write_choice
from .episode_log import EpisodeLog, read_rows
from .policy_server import PolicyServer, PolicyUnderTest
from .racing import Episode, Race, in_blocks
from .results import FILE_NAME, EpisodeKey, EpisodeRow
from .run_folder import Checkpoint, RunFolder, check_average
from .shards import Shard
from .simulator_process import EpisodeSpec
from .sweep_plan import Split, SweepPlan, executed_steps, video_stem
from .sweep_rows import installed_versions, row_of
from .workers import SimulatorError, WorkerPool

if TYPE_CHECKING:
    from tqdm import tqdm

    from .sweep import SweepConfig

LoadPolicy = Callable[[Checkpoint, "SweepConfig"], PolicyUnderTest]
"""(checkpoint, where and how it is to sample) -> the policy, ready to act."""

POLL_S = 10.0
"""How often a watching sweep looks for new checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Sweeping:
    """What the sweeps of all runs share."""

    config: "SweepConfig"
    plan: SweepPlan
    shard: Shard | None
    pool: WorkerPool
    num_workers: int
    load_policy: LoadPolicy


class RunSweep:
    """One run's. `folder` is where the whole evaluation lies; `log` has the rows of this sweep, or of its shard."""

    def __init__(self, sweeping: Sweeping, run: RunFolder, folder: Path, log: EpisodeLog) -> None:
        self._config, self._plan, self._shard = sweeping.config, sweeping.plan, sweeping.shard
        self._pool, self._num_workers, self._load_policy = sweeping.pool, sweeping.num_workers, sweeping.load_policy
        self._run, self._folder, self._log = run, folder, log
        merged = folder / FILE_NAME
        rows = read_rows(merged) if self._shard and merged.exists() else []
        self._merged: dict[EpisodeKey, EpisodeRow] = {row.key: row for row in rows}
        """Rows of all shards, as far as they have been joined."""
        self._versions = installed_versions()
        self._served: tuple[Checkpoint, PolicyServer] | None = None

    def run(self) -> None:
        self._check_candidates()
        with self._progress() as bar:
            if self._plan.has_selection:
                chosen, table = self._select(bar)
                if chosen is None:
                    print(table)
                    return
            else:
                (chosen,), table = self._candidates(), ""
            judged = {actor: self._judged(actor, chosen, bar) for actor in self._config.actors}
        lines = [line(actor, rows) for actor, rows in judged.items()]
        print("\n".join((table, f"{self._run.name}: {chosen.label} and its controls on the report half", *lines)))
        if self._shard and any(len(rows) < self._plan.num_episodes("report") for rows in judged.values()):
            print(
                f"this is part {self._shard.index} of {self._shard.count}: join all with vlatune merge {self._folder}"
            )

    def _candidates(self, *, waiting: bool = False) -> list[Candidate]:
        """Those that are there now; `waiting` for more, there may be none. Raises `ValueError` where nothing chooses between several."""
        checkpoints = [
            replace(checkpoint, averaged=weights == "ema")
            for checkpoint in self._run.checkpoints(self._config.steps, waiting=waiting)
            for weights in sorted(set(self._config.weights), reverse=True)
        ]
        for checkpoint in checkpoints:
            check_average(checkpoint)
        found = candidates_of(checkpoints, self._config.num_sampling_steps, self._config.num_executed_steps)
        if not self._plan.has_selection and len(found) > 1:
            raise ValueError(
                f"--selection-episodes 0: {self._run.path} has {len(found)} candidates ({found[0].label} to {found[-1].label}), and without a "
                "selection there is one; name its step, as in --steps last, or leave the option out"
            )
        return found

    def _check_candidates(self) -> None:
        """Raises `ValueError` for settings that the first checkpoint's policy does not know; the others' are of the same run."""
        candidates = self._candidates(waiting=self._config.watch)
        for candidate in candidates:
            if candidate.checkpoint == candidates[0].checkpoint:
                self._executed_steps(candidate, self._serve(candidate).policy)

    # --- the selection half ------------------------------------------------------------------------------------------

    def _select(self, bar: "tqdm") -> tuple[Candidate | None, str]:
        """The chosen candidate and a table; none while other shards' results are lacking."""
        heading = f"\n{self._run.name}: candidates on the selection half (success, 95 % Wilson interval)"
        chosen: Candidate | None
        dropped: set[Candidate] = set()
        rule = "highest success rate over tasks on the selection half; the later step of equals"
        if self._config.race and len(self._candidates()) > 1:
            chosen, selection, dropped = self._race(bar)
            rule += f"; a race dropped those that could not be the best (error {self._config.race_error:g})"
        else:
            selection = self._all(bar)
            if any(len(rows) < self._plan.num_episodes("selection") for rows in selection.values()):
                assert self._shard is not None, "an unsharded sweep runs every episode"
                last = (
                    f"part {self._shard.index} of {self._shard.count} of the selection half is done; when all parts are, type vlatune merge "
                    f"{self._folder}, then the same commands again for the report half"
                )
                return None, "\n".join((heading, *(line(c.label, rows) for c, rows in selection.items()), last))
            chosen = best_of(selection)
        if chosen is None or not count(selection[chosen])[1]:
            reason = next(row.error for rows in selection.values() for row in rows if row.error)
            raise SimulatorError(f"no candidate of {self._run.path} finished an episode of every task: {reason}")
        write_choice(self._folder / "chosen.json", self._run.name, chosen, selection, rule)
        marks = {c: "  <- chosen" if c == chosen else "  dropped" if c in dropped else "" for c in selection}
        return chosen, "\n".join((heading, *(line(c.label, rows, marks[c]) for c, rows in selection.items())))

    def _all(self, bar: "tqdm") -> SelectionRows:
        """Every candidate on every episode; watching, also those that training has yet to write."""
        rows: dict[Candidate, list[EpisodeRow]] = {}
        while True:
            # Asked first: a checkpoint that is written meanwhile is then looked for once more.
            awaited = self._run.awaited_step(self._config.steps) if self._config.watch else None
            candidates = self._candidates(waiting=awaited is not None)
            for candidate in candidates:
                if candidate not in rows:
                    if self._config.watch:  # the total did not know of it
                        _expect(bar, self._plan.num_episodes("selection"))
                    rows[candidate] = self._episodes("selection", "policy", candidate, bar)
            if awaited is None:
                return {candidate: rows[candidate] for candidate in candidates}
            bar.set_description(f"{self._run.name}: waiting for step {awaited}")
            time.sleep(POLL_S)

    def _race(self, bar: "tqdm") -> tuple[Candidate, SelectionRows, set[Candidate]]:
        """The leader, everybody's rows, and who was dropped."""
        candidates = {candidate.label: candidate for candidate in self._candidates()}
        specs = {name: self._specs("selection", "policy", candidate) for name, candidate in candidates.items()}
        of_episode = {name: {Episode.of(spec.key): spec for spec in of_name} for name, of_name in specs.items()}
        # A block keeps all workers busy, and its policies are loaded once for it.
        per_task = -(-self._num_workers // len(self._plan.tasks))
        blocks = in_blocks(next(iter(of_episode.values())), per_task=per_task, seed=self._config.seed)
        race = Race(list(candidates), blocks, error=self._config.race_error)
        rows: dict[str, list[EpisodeRow]] = {name: [] for name in candidates}

        def take(name: str, row: EpisodeRow) -> None:
            rows[name].append(row)
            race.add(name, Episode.of(row), row.success)

        for name, of_name in specs.items():
            for spec in of_name:
                if spec.key in self._log.rows:
                    take(name, self._log.rows[spec.key])
                    _expect(bar, -1)
        while wanted := race.to_run():
            names = [name for name, _ in wanted]
            served = [name for name in names if self._served and candidates[name].checkpoint == self._served[0]]
            name = (served or names)[0]
            missing = [of_episode[name][episode] for wanted_of, episode in wanted if wanted_of == name]
            bar.set_description(f"{name} (race: {len(race.survivors)} of {len(candidates)} left)")
            for row in self._run_specs(missing, "selection", candidates[name], bar):
                take(name, row)
        _expect(bar, sum(map(len, rows.values())) - len(candidates) * self._plan.num_episodes("selection"))
        dropped = {candidates[name] for name in set(candidates) - set(race.survivors)}
        return candidates[race.leader], {candidates[name]: of_name for name, of_name in rows.items()}, dropped

    # --- both halves -------------------------------------------------------------------------------------------------

    def _judged(self, actor: str, chosen: Candidate, bar: "tqdm") -> list[EpisodeRow]:
        candidate: Candidate | None = chosen if actor in POLICY_ACTORS else None
        if actor == "untrained":
            candidate = replace(chosen, checkpoint=self._run.untrained())
        rows = self._episodes("report", actor, candidate, bar)
        self._record_failures(actor, candidate, bar)
        return rows

    def _record_failures(self, actor: str, candidate: Candidate | None, bar: "tqdm") -> None:
        """What went wrong is what people look for: of each task as many failures as `videos` says are recorded. Run once more, an episode
        is the same."""
        recorded: Counter[Task] = Counter()
        specs = {}
        for spec in self._specs("report", actor, candidate):
            row = self._log.rows.get(spec.key)
            if row is not None and row.outcome == "failure" and recorded[spec.task] < self._plan.num_videos:
                recorded[spec.task] += 1
                if not row.video:
                    checkpoint = candidate.checkpoint if candidate else None
                    stem = video_stem(spec.key, spec.task, checkpoint, self._log.path.parent / "videos")
                    specs[spec.key] = replace(spec, video=stem)
        _expect(bar, len(specs))
        bar.set_description(f"{actor}: recording failures")
        videos = {}
        for result in self._pool.run(list(specs.values()), self._serve(candidate) if candidate else None):
            bar.update()
            if result.video is None:
                continue
            if result.outcome is not None and result.outcome.success:
                bar.write(f"{result.video.name}: not the failure that its row says; the device does not repeat itself")
                result.video.unlink()
                continue
            videos[result.spec.key] = result.video.relative_to(self._log.path.parent).as_posix()
        if videos:
            self._log.add_videos(videos)

    def _episodes(self, split: Split, actor: str, candidate: Candidate | None, bar: "tqdm") -> list[EpisodeRow]:
        """The rows of one actor on one half: those that are there, and the rest (of this shard's part) run now."""
        specs = self._specs(split, actor, candidate)
        own = self._shard.part(specs) if self._shard else specs
        again = {spec.key for spec in own if spec.key in self._merged and self._merged[spec.key].outcome == "error"}
        there = {key: row for key, row in self._merged.items() if key not in again} | self._log.rows
        rows = [there[spec.key] for spec in specs if spec.key in there]
        self._check_same(rows, split, candidate)
        missing = [spec for spec in own if spec.key not in there]
        _expect(bar, len(missing) - len(specs))
        bar.set_description(f"{candidate.label if candidate else ''} {actor} ({split})".strip())
        return rows + list(self._run_specs(missing, split, candidate, bar))

    def _check_same(self, rows: Sequence[EpisodeRow], split: Split, candidate: Candidate | None) -> None:
        """Raises `DataError` if rows that are there would be taken for what they are not."""
        batch_size = self._serve(candidate).batch_size if candidate else None
        for row in rows:
            if row.split != split:
                raise DataError(
                    f"{self._folder} has init state {row.init_state} of {row.suite} task {row.task_id} as an episode of the {row.split} half, and "
                    f"with --selection-episodes {self._config.selection_episodes} it belongs to the {split} half; give another --out"
                )
            if candidate is not None and row.batch_size != batch_size:
                raise DataError(
                    f"{self._folder} has episodes of {candidate.label} with forwards of {row.batch_size} observations, and these would have "
                    f"{batch_size}, whose last bits differ; give --batch-size {row.batch_size}, or another --out"
                )

    def _specs(self, split: Split, actor: str, candidate: Candidate | None) -> list[EpisodeSpec]:
        server = self._serve(candidate) if candidate else None
        return self._plan.specs(
            split,
            actor,
            policy=server.policy if server else None,
            checkpoint=candidate.checkpoint if candidate else None,
            num_executed_steps=self._executed_steps(candidate, server.policy) if candidate and server else 1,
            videos=self._log.path.parent / "videos",
        )

    def _run_specs(
        self, specs: Sequence[EpisodeSpec], split: Split, candidate: Candidate | None, bar: "tqdm"
    ) -> Iterator[EpisodeRow]:
        server = self._serve(candidate) if candidate else None
        successes = ended = 0
        for result in self._pool.run(specs, server):
            row = row_of(
                result,
                folder=self._log.path.parent,
                run=self._run.name,
                checkpoint=candidate.checkpoint if candidate else None,
                split=split,
                server=server,
                versions=self._versions,
            )
            self._log.append(row)
            successes, ended = successes + (row.outcome == "success"), ended + (row.outcome != "error")
            bar.set_postfix_str(f"success {successes}/{ended}", refresh=False)
            bar.update()
            yield row

    def _serve(self, candidate: Candidate) -> PolicyServer:
        """The candidate's policy; the weights loaded last are kept."""
        if self._served is None or self._served[0] != candidate.checkpoint:
            self._served = None  # free the memory first
            policy = self._load_policy(candidate.checkpoint, self._config)
            on_cpu = str(policy.device) == "cpu"
            batch_size = self._config.batch_size or (1 if on_cpu else min(self._num_workers, 32))
            self._served = candidate.checkpoint, PolicyServer(policy, batch_size)
        server = self._served[1]
        if candidate.num_sampling_steps is None:
            return server
        return PolicyServer(server.policy.with_sampling_steps(candidate.num_sampling_steps), server.batch_size)

    def _executed_steps(self, candidate: Candidate, policy: PolicyUnderTest) -> int:
        """How many of a chunk's actions are executed; raises `ValueError` where chunks drawn together could then not be compared, a delay
        not be bridged, or a chunk not go on with the last."""
        steps = executed_steps(policy, candidate.num_executed_steps)
        self._plan.delay.check(steps, policy.horizon)
        if policy.num_candidates > 1 and steps == policy.horizon:
            raise ValueError(
                f"--num-candidates {policy.num_candidates}: candidates are compared on the steps of the last chunk that are left, and all "
                f"{steps} are executed; type --num-executed-steps with a number below {steps}"
            )
        if self._config.real_time_chunking != "off" and steps == policy.horizon:
            raise ValueError(
                f"--real-time-chunking {self._config.real_time_chunking}: a chunk goes on with the steps of the last one that are left, and all "
                f"{steps} are executed; type --num-executed-steps with a number below {steps}"
            )
        return steps

    @contextmanager
    def _progress(self) -> Iterator["tqdm"]:
        from tqdm import tqdm

        candidates = [] if self._config.watch else self._candidates()
        total = len(candidates) * self._plan.num_episodes("selection")
        total += len(self._config.actors) * self._plan.num_episodes("report")
        with tqdm(total=total, unit="episode", smoothing=0.05, dynamic_ncols=True, file=sys.stdout) as bar:
            yield bar


def _expect(bar: "tqdm", more: int) -> None:
    """So many episodes more are to be run, or, being there or not needed, less: the remaining time is that of those still to run."""
    bar.total = (bar.total or 0) + more
