"""The websocket server: one metadata frame on connect, then for every observation a chunk, or one sentence as a text frame.

openpi's protocol, so that its client needs no change: binary msgpack frames, `actions`, `server_timing` and `policy_timing` in the reply,
`/healthz` on the same port, the API key in the `Authorization` header. Unlike openpi's server a refusal ends no connection."""

import asyncio
import contextlib
import http
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK
from websockets.frames import CloseCode
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response
from websockets.protocol import State

from .batching import Answer, Batcher
from .limits import RequestRate, shows_key
from .messages import Refused, pack, unpack
from .observations import ObservationReader
from .status import Client, Status

log = logging.getLogger(__name__)
library_log = logging.getLogger(f"{__name__}.websockets")
library_log.setLevel(logging.CRITICAL)  # it writes a traceback for every port scanner

PING_S, PONG_WITHIN_S = 20, 60
"""A robot whose program stands still for a while is not dropped; one that was switched off is, within 80 seconds."""

STOPPING = (CloseCode.GOING_AWAY, "the server stops")


@dataclass(kw_only=True)
class PolicyService:
    """What every connection shares."""

    batcher: Batcher
    reader: ObservationReader
    metadata: Mapping[str, Any]
    api_key: str | None
    status: Status
    num_clients: int = 0
    _num_busy: int = 0
    _stopping: bool = False

    @contextlib.asynccontextmanager
    async def listening(self, host: str, port: int) -> AsyncIterator[int]:
        """Serves until the block ends; gives the port, which the system chooses for 0. At the end each client's request
        in progress is still answered (not what it has sent behind that), and connections closed with code 1001 (going away). Raises `ValueError` where it cannot listen there."""
        try:
            server = await serve(
                self._serve_client,
                host,
                port,
                compression=None,
                max_size=self.reader.limits.message_bytes,
                max_queue=1,  # a client has one request at a time: what it sends beyond waits on its side
                origins=[None],  # no page that a browser on this machine happens to show
                process_request=self._before_upgrade,
                ping_interval=PING_S,
                ping_timeout=PONG_WITHIN_S,
                logger=library_log,
            )
        except OSError as error:
            raise ValueError(
                f"cannot listen on {host}:{port} ({error.strerror or error}); give another --port or --host"
            ) from None
        try:
            yield next(iter(server.sockets)).getsockname()[1]
        finally:
            await self._stop(server)

    async def _stop(self, server: Server) -> None:
        self._stopping = True
        server.close(close_connections=False)
        while self._num_busy:
            await asyncio.sleep(0.01)
        await asyncio.gather(*(connection.close(*STOPPING) for connection in server.connections))
        await server.wait_closed()

    def _before_upgrade(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        shown = request.headers.get_all("Authorization")
        if not shows_key(shown[0] if len(shown) == 1 else None, self.api_key):
            return connection.respond(
                http.HTTPStatus.UNAUTHORIZED, "this server wants its API key: Authorization: Api-Key KEY\n"
            )
        return None

    async def _serve_client(self, connection: ServerConnection) -> None:
        limits = self.reader.limits
        if self.num_clients >= limits.clients:
            await connection.close(
                CloseCode.TRY_AGAIN_LATER, f"{limits.clients} clients are connected, which is all it takes"
            )
            return
        host, port = connection.remote_address[:2]
        client, why = Client(address=f"{host}:{port}"), ""
        self.num_clients += 1
        try:
            self.status.connected(client)
            await connection.send(pack(self.metadata))
            await self._answer_frames(connection, client)
        except ConnectionClosedOK:
            pass
        except ConnectionClosed as closed:
            why = str(closed)
        finally:
            self.num_clients -= 1
            self.status.left(client, why)

    async def _answer_frames(self, connection: ServerConnection, client: Client) -> None:
        rate = RequestRate(per_s=self.reader.limits.requests_per_s)
        prev_total_ms: float | None = None
        while not self._stopping:
            frame = await connection.recv()
            begun_s = time.perf_counter()
            self._num_busy += 1
            try:
                rate.count()
                answer = await self._answered(frame, connection)
                reply: bytes | str = pack(_reply(answer, prev_total_ms))
            except Refused as refusal:
                reply = str(refusal)
                self.status.refused(client)
            except Exception as error:  # a defect of ours: this client is told, the others notice nothing
                log.exception("a request of %s failed", client.address)
                reply = f"the server failed with {type(error).__name__}; its log says where"
                self.status.refused(client)
            else:
                self.status.answered(client, 1000 * (time.perf_counter() - begun_s))
            finally:
                self._num_busy -= 1
            await connection.send(reply)
            prev_total_ms = 1000 * (time.perf_counter() - begun_s)
        await connection.close(*STOPPING)

    async def _answered(self, frame: bytes | str, connection: ServerConnection) -> Answer:
        if isinstance(frame, str):
            raise Refused("a text frame came; send observations as binary frames of msgpack, as openpi-client does")
        request = self.reader.read(unpack(frame))
        return await self.batcher.ask(request, is_wanted=lambda: connection.state is State.OPEN)


def _reply(answer: Answer, prev_total_ms: float | None) -> dict[str, Any]:
    timing: dict[str, float] = {
        "infer_ms": answer.infer_ms,
        "queue_ms": answer.queue_ms,
        "batch_size": answer.batch_size,
    }
    if prev_total_ms is not None:
        timing["prev_total_ms"] = prev_total_ms
    return {
        "actions": answer.actions_HA,
        "server_timing": timing,
        "policy_timing": {"infer_ms": answer.infer_ms},
    }
