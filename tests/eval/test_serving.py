"""The policy server: openpi's protocol, right answers for many at once, and a clear sentence for whatever is wrong."""

import asyncio
import contextlib
import io
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from running_server import CAMERAS, A, H, Running, SummingPolicy, observation, reader, running_server, until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from vlatune.eval.serving.limits import Limits
from vlatune.eval.serving.messages import pack
from vlatune.eval.serving.serve import _stop_at_signals
from vlatune.eval.serving.status import Status


def expected(policy: SummingPolicy, message: dict) -> np.ndarray:
    request = reader().read(message)
    previous = None if request.previous_HA is None else request.previous_HA[None]
    return policy.act(
        [request.raw],
        previous=previous,
        num_executed_steps=request.num_executed_steps,
        inference_delay=request.inference_delay,
    )[0]


@pytest.fixture
def policy() -> SummingPolicy:
    return SummingPolicy()


def test_metadata_then_a_chunk_and_where_its_time_went(policy):
    metadata = {"robot": "libero_panda", "cameras": list(CAMERAS)}
    with running_server(policy, metadata=metadata) as server, server.client() as client:
        assert client.metadata == metadata
        first, second = client.ask(observation(1)), client.ask(observation(2))
    assert first["actions"].shape == (H, A)
    assert first["actions"].dtype == np.float32
    np.testing.assert_array_equal(second["actions"], expected(policy, observation(2)))
    assert set(first["server_timing"]) == {"infer_ms", "queue_ms", "batch_size"}
    assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"]
    assert second["server_timing"]["batch_size"] == 1
    assert set(second["policy_timing"]) == {"infer_ms"}


def test_a_refusal_ends_nothing(policy):
    with running_server(policy) as server, server.client() as client:
        without = observation()
        del without["observation/state"]
        assert client.ask(without) == "the observation's state is missing; send it once, as observation/state or state"
        client.connection.send("hello")
        assert client.reply().startswith("a text frame came; send observations as binary frames")
        assert client.ask(observation(prompt="refuse")) == "the policy cannot do that; ask for something else"
        assert client.ask(observation(prompt="nan")) == "the policy's actions for this observation are not finite"
        assert client.ask(observation(prompt="break")).startswith(
            "the policy failed with RuntimeError; the server's log"
        )
        np.testing.assert_array_equal(client.ask(observation(3))["actions"], expected(policy, observation(3)))


def waiting_for(server: Running, count: int) -> None:
    until(lambda: server.batcher.num_waiting == count)


def test_what_comes_meanwhile_is_answered_together(policy):
    """While one forward runs: four alike, one with other numbers, one with pictures of another size, one that is refused."""
    messages = [observation(seed) for seed in range(4)]
    messages[1] |= {"previous_actions": np.ones((H, A), np.float32)}
    messages += [observation(4, num_executed_steps=3, inference_delay=2), observation(5, px=24)]
    messages += [observation(6, prompt="refuse")]
    with running_server(policy) as server, ThreadPoolExecutor(8) as pool:
        policy.gate.clear()

        def ask(message):
            with server.client() as client:
                return client.ask(message)

        first = pool.submit(ask, observation(9))
        assert policy.in_forward.wait(60)
        answers = []
        for count, message in enumerate(messages, start=1):
            answers.append(pool.submit(ask, message))
            waiting_for(server, count)
        policy.gate.set()
        sizes = [answer.result(60) for answer in answers]
        assert first.result(60)["server_timing"]["batch_size"] == 1
    assert sizes[-1] == "the policy cannot do that; ask for something else"
    for message, answer in zip(messages[:-1], sizes[:-1], strict=True):
        np.testing.assert_array_equal(answer["actions"], expected(policy, message))
    # The first, five that go together, the same five apart for the sake of the refused one, and the two that go alone.
    assert policy.batch_sizes[:9] == [1, 5, 1, 1, 1, 1, 1, 1, 1]


def test_eight_clients_at_once_get_right_answers(policy):
    with running_server(policy, max_batch_size=4) as server:

        def ask(k):
            with server.client() as client:
                return [client.ask(observation(100 * k + i)) for i in range(25)]

        policy.gate.clear()
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, k) for k in range(8)]
            until(lambda: sum(policy.batch_sizes) + server.batcher.num_waiting == 8)
            policy.gate.set()
            answers = [each.result() for each in asked]
    assert max(policy.batch_sizes) == 4
    for k, of_client in enumerate(answers):
        for i, answer in enumerate(of_client):
            np.testing.assert_array_equal(answer["actions"], expected(policy, observation(100 * k + i)))


def test_nothing_is_computed_for_a_client_that_has_gone(policy):
    with running_server(policy) as server:
        policy.gate.clear()
        with server.client() as client, server.client() as gone:
            client.connection.send(pack(observation(1)))
            assert policy.in_forward.wait(60)
            gone.connection.send(pack(observation(2)))
            waiting_for(server, 1)
            gone.connection.close()  # comes back when the server has said good-bye, too
            policy.gate.set()
            client.reply()
            client.ask(observation(3))
    assert sum(policy.batch_sizes) == 2


def test_stopping_answers_each_clients_request_in_progress(policy):
    """And not the one that it has sent behind it."""
    with running_server(policy) as server, server.client() as client, server.client() as idle:
        policy.gate.clear()
        client.connection.send(pack(observation(1)))
        assert policy.in_forward.wait(60)
        client.connection.send(pack(observation(2)))
        server.stop.set()
        with pytest.raises(OSError):
            while True:
                urllib.request.urlopen(f"http://127.0.0.1:{server.port}/healthz").read()
        policy.gate.set()
        np.testing.assert_array_equal(client.reply()["actions"], expected(SummingPolicy(), observation(1)))
        for each in (client, idle):
            with pytest.raises(ConnectionClosed, match="1001"):
                each.connection.recv(timeout=60)
    assert policy.batch_sizes == [1]


class Unread(io.StringIO):
    """A pipe whose reader has gone, as with `| head`."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_lines_that_nobody_reads_cost_no_place(policy, monkeypatch, caplog):
    with running_server(policy, reader(limits=Limits(clients=1))) as server:
        monkeypatch.setattr(sys, "stdout", Unread())
        for _ in range(3):
            with server.client() as client:
                assert client.ask(observation())["actions"].shape == (H, A)
            until(lambda: not server.service.num_clients)
        monkeypatch.undo()
    assert [record.getMessage() for record in caplog.records] == [
        "nobody reads the server's lines any more ([Errno 32] Broken pipe); it goes on without them"
    ]


def test_health_and_the_api_key(policy):
    with running_server(policy, api_key="s3cret") as server:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/healthz") as response:
            assert (response.status, response.read()) == (200, b"OK\n")
        for headers in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": "s3cret"}):
            with pytest.raises(InvalidStatus, match="401"):
                server.connect(additional_headers=headers)
        with pytest.raises(InvalidStatus, match="401"):
            server.connect(additional_headers=[("Authorization", "Api-Key s3cret")] * 2)
        with server.client(additional_headers={"Authorization": "Api-Key s3cret"}) as client:
            assert client.ask(observation())["actions"].shape == (H, A)
        with pytest.raises(InvalidStatus, match="403"):
            server.connect(additional_headers={"Authorization": "Api-Key s3cret"}, origin="http://evil.example")


def test_limits(policy):
    limits = Limits(clients=1, waiting=1, requests_per_s=3, message_mb=0.1)
    with running_server(policy, reader(limits=limits)) as server:
        with server.client() as client:
            with pytest.raises(ConnectionClosed, match="1013.*1 clients are connected"), server.client():
                pass
            answers = [client.ask(observation(seed)) for seed in range(40)]
            refused = [answer for answer in answers if isinstance(answer, str)]
            assert refused and refused[0].startswith("more than 3 requests a second came over this connection")
            assert all(isinstance(answer, dict) for answer in answers[:3])
        with pytest.raises(ConnectionClosed, match="1009"):
            while True:  # the place is free as soon as the server knows that the last client has gone
                try:
                    with server.client() as client:
                        client.ask(observation(px=400))
                except ConnectionClosed as closed:
                    if "1013" not in str(closed):
                        raise
        until(lambda: not server.service.num_clients)
        with server.client() as client:
            assert client.ask(observation())["actions"].shape == (H, A)


def test_too_many_wait(policy):
    with running_server(policy, reader(limits=Limits(waiting=1))) as server:
        policy.gate.clear()
        with server.client() as first, server.client() as second, server.client() as third:
            first.connection.send(pack(observation(1)))
            assert policy.in_forward.wait(60)
            second.connection.send(pack(observation(2)))
            waiting_for(server, 1)
            assert third.ask(observation(3)) == "1 requests wait for the policy already; ask again later"
            policy.gate.set()
            assert all(isinstance(each.reply(), dict) for each in (first, second))


def test_a_port_that_is_taken(policy):
    with running_server(policy) as server:

        async def again() -> None:
            async with server.service.listening("127.0.0.1", server.port):
                pass

        with pytest.raises(
            ValueError, match=rf"cannot listen on 127.0.0.1:{server.port} \(.*\); give another --port or --host"
        ):
            asyncio.run(again())


def test_two_signals_at_once_stop_it_once():
    async def stopped():
        loop, trouble = asyncio.get_running_loop(), []
        loop.set_exception_handler(lambda loop, context: trouble.append(context))
        stop = loop.create_future()
        _stop_at_signals(stop, Status())
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(each)
        caught = await stop
        await asyncio.sleep(0.05)
        return caught, trouble

    caught, trouble = asyncio.run(stopped())
    assert caught in (signal.SIGINT, signal.SIGTERM) and not trouble


ENDLESS = """
import asyncio, sys, threading
from types import SimpleNamespace
from pathlib import Path
from running_server import observation, reader
from vlatune.eval.serving import serve as command

def act(*_, **__):
    print("a forward has begun", flush=True)
    threading.Event().wait()

command.made_up = lambda *_: reader().read(observation())
policy = SimpleNamespace(horizon=1, action_dim=1, robot="arm", act=act)
config = command.ServeConfig(checkpoint=Path("none"), port=0, warm_up=sys.argv[1] == "warm up")
command.metadata_of = lambda policy, reader, checkpoint: {"checkpoint": checkpoint}
asyncio.run(command.serve(policy, reader(), "none", None, config))
"""


@pytest.mark.parametrize(
    ("second", "code", "moment"), [(signal.SIGINT, 130, "warm up"), (signal.SIGTERM, 143, "serving a client")]
)
def test_a_second_signal_ends_it_in_the_middle_of_a_forward(second, code, moment):
    support = Path(__file__).parents[1] / "support"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(support)!r})\n{ENDLESS}", moment]
    with (
        contextlib.ExitStack() as stack,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
    ):
        late = threading.Timer(500, process.kill)
        late.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if moment == "serving a client":
                found = re.search(r"ws://\S+", line)
                assert found
                connection = stack.enter_context(connect(found[0], compression=None))
                connection.recv()
                connection.send(pack(observation()))
                assert " connected; 1 client" in process.stdout.readline()
                line = process.stdout.readline()
            assert line == "a forward has begun\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline().endswith(
                "SIGINT: no new clients; answering each client's request in progress; a second signal ends it at once\n"
            )
            process.send_signal(second)
            assert process.wait(60) == code
            assert f"{second.name}: ended at once; requests in progress are not answered" in process.stdout.read()
        finally:
            late.cancel()
            process.kill()
