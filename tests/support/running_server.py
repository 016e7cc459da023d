"""A policy server in a thread of the test's own process, and what a client sends it."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from websockets.sync.client import ClientConnection, connect

from vlatune.data.raw_observation import RawObservation
from vlatune.eval.serving.batching import Batcher
from vlatune.eval.serving.limits import Limits
from vlatune.eval.serving.messages import pack, unpack
from vlatune.eval.serving.observations import ObservationReader
from vlatune.eval.serving.server import PolicyService
from vlatune.eval.serving.status import Status

CAMERAS = ("agentview", "eye_in_hand")
H, A, S = 10, 7, 8


class SummingPolicy:
    """Deterministic, and each row a function of its own observation: pictures, state, instruction and what was planned before."""

    horizon, action_dim = H, A

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []
        self.gate = threading.Event()
        """Forwards wait until it is set."""
        self.gate.set()
        self.in_forward = threading.Event()

    def act(
        self,
        observations: Sequence[RawObservation],
        *,
        previous: np.ndarray | None = None,
        num_executed_steps: int | None = None,
        inference_delay: int = 0,
    ) -> np.ndarray:
        self.batch_sizes.append(len(observations))
        self.in_forward.set()
        assert self.gate.wait(60)
        chunks = np.zeros((len(observations), H, A), np.float32)
        for row, raw in enumerate(observations):
            if "refuse" in raw.instruction:
                raise ValueError("the policy cannot do that; ask for something else")
            if "break" in raw.instruction:
                raise RuntimeError("out of memory")
            if "nan" in raw.instruction:
                chunks[row] = np.nan
            chunks[row, :, 0] = raw.images[CAMERAS[0]].mean()
            chunks[row, :, 1] = raw.images[CAMERAS[1]][:, 0, 0].sum()
            chunks[row, :, 2] = raw.state_TS.sum()
            chunks[row, :, 3] = len(raw.instruction)
            chunks[row, :, 4] = 10 * (num_executed_steps or 0) + inference_delay
            if previous is not None and not np.isnan(previous[row]).any():
                chunks[row, :, 5] = previous[row].sum()
        return chunks


class RecordingPolicy:
    """Keeps what it was shown; moves the same way whatever it is."""

    horizon, action_dim = H, A
    chunk_HA = np.linspace(-0.4, 0.4, H * A, dtype=np.float32).reshape(H, A)

    def __init__(self) -> None:
        self.seen: list[RawObservation] = []

    def act(self, observations: Sequence[RawObservation], **_: Any) -> np.ndarray:
        self.seen += observations
        return np.stack([self.chunk_HA] * len(observations))


@dataclass(kw_only=True)
class Running:
    """Where it listens, and its inside."""

    port: int
    service: PolicyService
    batcher: Batcher
    stop: threading.Event

    def connect(self, **settings: Any) -> ClientConnection:
        return connect(f"ws://127.0.0.1:{self.port}", compression=None, max_size=None, **settings)

    @contextlib.contextmanager
    def client(self, **settings: Any) -> Iterator["Client"]:
        with self.connect(**settings) as connection:
            yield Client(connection)


class Client:
    """Asks as openpi's client does."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.metadata = unpack(bytes(connection.recv()))

    def ask(self, observation: Any) -> Any:
        """The reply, or the sentence of a refusal."""
        self.connection.send(pack(observation))
        return self.reply()

    def reply(self) -> Any:
        reply = self.connection.recv(timeout=60)
        return reply if isinstance(reply, str) else unpack(reply)


def reader(**changes: Any) -> ObservationReader:
    settings = {
        "cameras": CAMERAS,
        "num_offsets": 1,
        "state_dim": S,
        "action_shape": (H, A),
        "camera_keys": {},
        "limits": Limits(requests_per_s=1e6),
    }
    return ObservationReader(**{**settings, **changes})


def observation(seed: int = 0, px: int = 16, **changes: Any) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "observation/agentview": random.integers(0, 256, (px, px, 3), np.uint8),
        "observation/eye_in_hand": random.integers(0, 256, (px, px, 3), np.uint8),
        "observation/state": random.normal(size=S),
        "prompt": f"reach the {'very ' * (seed % 5)}red dot",
    } | changes


def until(happened: Callable[[], bool]) -> None:
    """Waits, at most a minute."""
    pause = threading.Event()
    for _ in range(6000):
        if happened():
            return
        pause.wait(0.01)
    raise AssertionError("a minute has gone by")


@contextlib.contextmanager
def running_server(
    policy: Any,
    observations: ObservationReader | None = None,
    *,
    metadata: dict[str, Any] | None = None,
    api_key: str | None = None,
    max_batch_size: int = 8,
) -> Iterator[Running]:
    """Ends as a signal would end it; the test fails if that takes more than a minute."""
    ready, found, stop, problems = threading.Event(), {}, threading.Event(), []

    async def serve() -> None:
        asked = observations or reader()
        batcher = Batcher(policy, max_batch_size=max_batch_size, max_waiting=asked.limits.waiting)
        with Status() as status:
            service = PolicyService(
                batcher=batcher, reader=asked, metadata=metadata or {"server": "test"}, api_key=api_key, status=status
            )
            try:
                async with service.listening("127.0.0.1", 0) as port:
                    found["running"] = Running(port=port, service=service, batcher=batcher, stop=stop)
                    ready.set()
                    while not stop.is_set():
                        await asyncio.sleep(0.02)
            finally:
                await batcher.close()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as problem:  # noqa: BLE001  (raised again below)
            problems.append(problem)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="server")
    thread.start()
    try:
        assert ready.wait(60)
        if problems:
            raise problems[0]
        yield found["running"]
    finally:
        stop.set()
        if isinstance(policy, SummingPolicy):
            policy.gate.set()
        thread.join(60)
        assert not thread.is_alive(), "the server has not stopped"
    assert not problems, problems
