"""Simulator worker processes around one policy: episodes in, outcomes out, whatever happens to a worker.

Workers are spawned (simulator_process.py). The parent answers their questions as they arrive, as many at once as the server's batch holds, and
waits for nobody."""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self

import numpy as np

from .benchmarks.benchmark import EpisodeProtocol, Task
from .policy_server import PolicyServer, Question
from .rollout import EpisodeOutcome
from .shared_pictures import NewMemory, PictureReader
from .simulator_process import Ask, EpisodeSpec, Failed, MakeBenchmark, Ready, work

MAX_ATTEMPTS = 2
START_TIMEOUT_S = 300.0
"""A worker has so long to import what it needs; its episode's time runs from then on."""
MAX_LOSSES_IN_A_ROW = 10


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """What came of it: an outcome, or the reason why there is none."""

    spec: EpisodeSpec
    outcome: EpisodeOutcome | None
    error: str = ""
    video: Path | None = None
    renderer: str = ""
    queue_ms: tuple[float, ...] = ()
    policy_ms: tuple[float, ...] = ()


class SimulatorError(Exception):
    """No simulator could be started; the message says why."""


@dataclass
class _Job:
    spec: EpisodeSpec
    attempt: int
    previous_HA: np.ndarray | None = None
    """The last answer to its questions."""
    queue_ms: list[float] = field(default_factory=list)
    policy_ms: list[float] = field(default_factory=list)


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    tasks_seen: set[tuple[Task, EpisodeProtocol]] = field(default_factory=set)
    job: _Job | None = None
    heard_at: float = 0.0
    """When it last said something, or was last given something to do."""
    is_ready: bool = False
    pictures: PictureReader = field(default_factory=PictureReader)
    question: Question | None = None
    asked_at: float = 0.0

    def reason_of_death(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        return f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"


class WorkerPool:
    """A fixed number of workers, kept between calls of `run`, so that several checkpoints in turn share the environments.

    `timeout_s`: a worker silent for so long has hung. `max_environments`: how many tasks' simulators one worker keeps."""

    def __init__(
        self,
        make_benchmark: MakeBenchmark,
        *,
        num_workers: int,
        timeout_s: float = 300.0,
        max_environments: int = 10,
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; at least 1")
        self._make_benchmark = make_benchmark
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._max_environments = max_environments
        self._workers: list[_Worker] = []
        self._losses_in_a_row = 0

    def run(self, specs: Sequence[EpisodeSpec], server: PolicyServer | None) -> Iterator[EpisodeResult]:
        """Every episode's result, in the order in which they end. `server` may be None if no actor asks a policy.

        A worker that dies, hangs or raises is replaced and its episode run once more; lost twice, it becomes a result with
        `error`. Raises `SimulatorError` where no environment can be made at all."""
        pending = deque(_Job(spec, attempt=1) for spec in specs)
        try:
            while pending or any(worker.job for worker in self._workers):
                self._hand_out(pending)
                for worker in self._talking():
                    yield from self._listen(worker, pending)
                for worker in [w for w in self._workers if w.job and not w.question and self._is_late(w)]:
                    yield from self._lose(worker, f"gave no sign of life for {self._timeout_s:g} s", pending)
                self._answer(server)
        finally:
            for worker in [worker for worker in self._workers if worker.job]:
                self._dismiss(worker)

    def close(self) -> None:
        """Ends all workers; idle ones get a moment to close their simulators."""
        for worker in self._workers:
            if worker.job is None:
                with suppress(BrokenPipeError, ConnectionResetError):  # it died while it had nothing to do
                    worker.connection.send(None)
        for worker in list(self._workers):
            if worker.job is None:
                worker.process.join(5)
            self._dismiss(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hand_out(self, pending: deque[_Job]) -> None:
        """Give every idle worker an episode, of a task whose environment it has if there is one."""
        for worker in [worker for worker in self._workers if worker.job is None][: len(pending)]:
            known = (job for job in pending if (job.spec.task, job.spec.protocol) in worker.tasks_seen)
            self._give(worker, next(known, pending[0]), pending)
        while pending and len(self._workers) < self._num_workers:
            self._give(self._start_worker(), pending[0], pending)

    def _give(self, worker: _Worker, job: _Job, pending: deque[_Job]) -> None:
        pending.remove(job)
        worker.job, worker.heard_at = job, time.monotonic()
        worker.tasks_seen.add((job.spec.task, job.spec.protocol))
        with suppress(BrokenPipeError, ConnectionResetError):  # it has died: reading from it says so next
            worker.connection.send(job.spec)

    def _talking(self) -> list[_Worker]:
        """Workers with a message (or a closed pipe); waits for one unless questions are open."""
        busy = {worker.connection: worker for worker in self._workers if worker.job and not worker.question}
        asked = any(worker.question for worker in self._workers)
        ready = wait(list(busy), timeout=0 if asked else min(1.0, self._timeout_s)) if busy else []
        return [busy[connection] for connection in ready]  # type: ignore[index]

    def _listen(self, worker: _Worker, pending: deque[_Job]) -> Iterator[EpisodeResult]:
        assert worker.job is not None
        try:
            message = worker.connection.recv()
            if isinstance(message, NewMemory):  # its handle comes next, then the question
                worker.pictures.receive(message, worker.connection)
                message = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            yield from self._lose(worker, worker.reason_of_death(), pending)
            return
        worker.heard_at = time.monotonic()
        if isinstance(message, Ready):
            worker.is_ready = True
        elif isinstance(message, Ask):
            worker.question = Question(
                key=worker.job.spec.key,
                decision=message.decision,
                raw=replace(message.raw, images=worker.pictures.read(message.places)),
                previous_HA=worker.job.previous_HA,
                num_over=worker.job.spec.delay.num_over,
            )
            worker.asked_at = time.perf_counter()
        elif isinstance(message, Failed):
            if message.while_starting:
                raise SimulatorError(f"no simulator could be started: {message.reason}")
            yield from self._lose(worker, message.reason, pending)
        else:
            job, worker.job, self._losses_in_a_row = worker.job, None, 0
            yield EpisodeResult(
                spec=job.spec,
                outcome=message.outcome,
                video=message.video,
                renderer=message.renderer,
                queue_ms=tuple(job.queue_ms),
                policy_ms=tuple(job.policy_ms),
            )

    def _is_late(self, worker: _Worker) -> bool:
        limit_s = self._timeout_s if worker.is_ready else max(self._timeout_s, START_TIMEOUT_S)
        return time.monotonic() - worker.heard_at > limit_s

    def _answer(self, server: PolicyServer | None) -> None:
        """Answer the longest-waiting questions, one batch of them."""
        waiting = sorted((worker for worker in self._workers if worker.question), key=lambda worker: worker.asked_at)
        if not waiting:
            return
        if server is None:
            raise ValueError("an actor asked for a policy, but the pool was given none")
        served = waiting[: server.batch_size]
        begun = time.perf_counter()
        chunk_BHA = server.answer([worker.question for worker in served if worker.question])
        ended = time.perf_counter()
        for worker, chunk_HA in zip(served, chunk_BHA, strict=True):
            assert worker.job is not None
            worker.job.queue_ms.append(1000 * (begun - worker.asked_at))
            worker.job.policy_ms.append(1000 * (ended - begun))
            worker.job.previous_HA = chunk_HA
            worker.question, worker.heard_at = None, time.monotonic()
            with suppress(BrokenPipeError, ConnectionResetError):  # it has died: reading from it says so next
                worker.connection.send(chunk_HA)

    def _lose(self, worker: _Worker, reason: str, pending: deque[_Job]) -> Iterator[EpisodeResult]:
        job = worker.job
        assert job is not None
        self._dismiss(worker)
        self._losses_in_a_row += 1
        if self._losses_in_a_row >= MAX_LOSSES_IN_A_ROW:
            raise SimulatorError(
                f"{self._losses_in_a_row} simulator workers were lost without one finished episode; the last one {reason}"
            )
        if job.attempt < MAX_ATTEMPTS:
            pending.appendleft(_Job(job.spec, attempt=job.attempt + 1))
        else:
            yield EpisodeResult(spec=job.spec, outcome=None, error=f"lost {job.attempt} times; the worker {reason}")

    def _dismiss(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)

    def _start_worker(self) -> _Worker:
        context = multiprocessing.get_context("spawn")  # a forked simulator would share the parent's GPU context
        ours, theirs = context.Pipe()
        process = context.Process(
            target=work,
            args=(theirs, self._make_benchmark, self._max_environments),
            daemon=True,
            name="vlatune-simulator",
        )
        with _one_thread():
            process.start()
        theirs.close()
        worker = _Worker(process=process, connection=ours)
        self._workers.append(worker)
        return worker


@contextmanager
def _one_thread() -> Iterator[None]:
    """Children started within compute on one thread each: there are as many of them as cores."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
