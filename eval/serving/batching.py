"""Requests of all clients, answered together: while the policy works, what comes in waits, and is then taken at once.

Nobody waits for company: a request that finds the policy idle is answered alone. The policy is asked in one thread of its own, from
its first forward on (what a GPU captures belongs to a thread), so that the connections go on being served meanwhile."""

import asyncio
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np

from ...data.episodes import DataError
from ...data.raw_observation import RawObservation
from .messages import Refused
from .observations import Request

log = logging.getLogger(__name__)

Found = TypeVar("Found")


class ServedPolicy(Protocol):
    """What a server asks; `policy.acting.ActingPolicy` has it."""

    @property
    def horizon(self) -> int: ...
    @property
    def action_dim(self) -> int: ...

    def act(
        self,
        observations: Sequence[RawObservation],
        *,
        previous: np.ndarray | None = None,
        num_executed_steps: int | None = None,
        inference_delay: int = 0,
    ) -> np.ndarray:
        """(B, H, A) float32. `previous` has NaN in the rows of episodes that begin."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A chunk, and where its time went."""

    actions_HA: np.ndarray
    batch_size: int
    """How many requests the same forward answered."""
    queue_ms: float
    """From the request's arrival until its forward began."""
    infer_ms: float
    """From there to its end, preparing the observations included."""


@dataclass(kw_only=True, eq=False)
class _Waiting:
    request: Request
    is_wanted: Callable[[], bool]
    answer: "asyncio.Future[Answer | str]"
    since_s: float


class Batcher:
    """The queue before one policy. Made in a running event loop."""

    def __init__(self, policy: ServedPolicy, *, max_batch_size: int, max_waiting: int) -> None:
        self.max_batch_size, self.max_waiting = max_batch_size, max_waiting
        self._policy = policy
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")
        self._loop = asyncio.get_running_loop()
        self._worker = self._loop.create_task(self._work())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def in_policys_thread(self, call: Callable[[], Found]) -> Found:
        return await self._loop.run_in_executor(self._thread, call)

    async def ask(self, request: Request, is_wanted: Callable[[], bool] = lambda: True) -> Answer:
        """`is_wanted` is asked when the request's turn has come: nothing is computed for a client that has gone. Raises
        `Refused` where the policy refuses or fails, or too many wait."""
        if len(self._waiting) >= self.max_waiting:
            raise Refused(f"{self.max_waiting} requests wait for the policy already; ask again later")
        answer: asyncio.Future[Answer | str] = self._loop.create_future()
        self._waiting.append(_Waiting(request=request, is_wanted=is_wanted, answer=answer, since_s=time.perf_counter()))
        self._arrived.set()
        found = await answer
        if isinstance(found, str):
            raise Refused(found)
        return found

    async def close(self) -> None:
        """Ends the thread once its last forward is done. Whoever still waits is told so."""
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)
        _settle(self._waiting, ["the server has stopped"] * len(self._waiting))
        self._waiting = []
        await asyncio.to_thread(self._thread.shutdown)

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            together = self._take()
            if not together:
                self._arrived.clear()
                continue
            try:
                answers = await self.in_policys_thread(partial(self._answers, together))
            except asyncio.CancelledError:
                _settle(together, ["the server has stopped"] * len(together))
                raise
            _settle(together, answers)

    def _take(self) -> list[_Waiting]:
        """Those that go together with the one that has waited longest, and are taken out; the rest keep their order."""
        wanted = [waiting for waiting in self._waiting if not waiting.answer.done() and waiting.is_wanted()]
        gone = [waiting for waiting in self._waiting if waiting not in wanted]
        _settle(gone, ["the client has gone"] * len(gone))
        together = [each for each in wanted if _goes_with(each.request) == _goes_with(wanted[0].request)]
        together = together[: self.max_batch_size]
        self._waiting = [waiting for waiting in wanted if waiting not in together]
        return together

    def _answers(self, together: Sequence[_Waiting]) -> list[Answer | str]:
        """Of one forward, or a sentence each; where one refuses, of as many as there are requests, so that no good one suffers for a
        bad one."""
        begun_s = time.perf_counter()
        try:
            chunks_BHA = decide(self._policy, [waiting.request for waiting in together])
        except (ValueError, DataError) as refusal:
            if len(together) > 1:
                return [self._answers([waiting])[0] for waiting in together]
            return [str(refusal)]
        except Exception as error:  # a defect, or a device out of memory: the server goes on, and its log says where
            log.exception("the policy failed")
            return [f"the policy failed with {type(error).__name__}; the server's log says where"] * len(together)
        infer_ms = 1000 * (time.perf_counter() - begun_s)
        return [
            Answer(
                actions_HA=chunk_HA,
                batch_size=len(together),
                queue_ms=1000 * (begun_s - waiting.since_s),
                infer_ms=infer_ms,
            )
            for waiting, chunk_HA in zip(together, chunks_BHA, strict=True)
        ]


def decide(policy: ServedPolicy, requests: Sequence[Request]) -> np.ndarray:
    """(B, H, A) float32, in one forward. Raises `ValueError` where the policy refuses an observation, or its actions are no numbers."""
    first, shape = requests[0], (policy.horizon, policy.action_dim)
    previous_BHA = None
    if any(request.previous_HA is not None for request in requests):
        begins_HA = np.full(shape, np.nan, np.float32)
        previous_BHA = np.stack([begins_HA if r.previous_HA is None else r.previous_HA for r in requests])
    chunks_BHA = policy.act(
        [request.raw for request in requests],
        previous=previous_BHA,
        num_executed_steps=first.num_executed_steps,
        inference_delay=first.inference_delay,
    )
    if chunks_BHA.shape != (len(requests), *shape):
        raise RuntimeError(f"the policy returned {chunks_BHA.shape} instead of {(len(requests), *shape)}")
    if not np.isfinite(chunks_BHA).all():
        raise ValueError("the policy's actions for this observation are not finite")
    return chunks_BHA


def _goes_with(request: Request) -> Hashable:
    """What requests of one forward have in common: pictures of a size are prepared together, the numbers hold for all rows."""
    sizes = tuple((camera, picture.shape) for camera, picture in request.raw.images.items())
    return sizes, request.num_executed_steps, request.inference_delay


def _settle(together: Sequence[_Waiting], answers: Sequence[Answer | str]) -> None:
    for waiting, answer in zip(together, answers, strict=True):
        if not waiting.answer.done():
            waiting.answer.set_result(answer)
