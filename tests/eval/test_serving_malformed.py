"""1,000 malformed messages: every one gets an answer, the server lives on, and nothing is left of them."""

import gc
import threading
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import msgpack
import numpy as np
import pytest
from running_server import H, SummingPolicy, observation, reader, running_server, until
from websockets.exceptions import ConnectionClosed

from vlatune.eval.serving.limits import Limits
from vlatune.eval.serving.messages import DTYPES, MAX_ENTRIES, Refused, pack, unpack

NUM_MESSAGES = 1000


def array(data=b"\0" * 4, dtype="<f4", shape=(1,)) -> dict:
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}


def number(data=1.0, dtype="<f4") -> dict:
    return {b"__npgeneric__": True, b"data": data, b"dtype": dtype}


ARRAYS = [
    array(dtype="|O"),
    array(dtype="O"),
    array(dtype="|V4"),
    array(dtype="<U1"),
    array(dtype="S4"),
    array(dtype="f4,f4"),
    array(dtype="<c8"),
    array(dtype="<M8[s]"),
    array(dtype=7),
    array(dtype=None),
    array(dtype="x" * 50_000),
    array(shape=(-1,)),
    array(shape=(2**62, 2**62)),
    array(shape=(2**63 - 1,)),
    array(shape=(0, 2**60)),
    array(shape=(1,) * 60),
    array(shape=(True,)),
    array(shape=(1.0,)),
    array(shape="1"),
    array(shape={}),
    array(shape=(2,)),
    array(data="text"),
    array(data=None),
    array(data=b""),
    array(data=[0, 0]),
    {b"__ndarray__": True},
    number(dtype="|O"),
    number(data="1"),
    number(data=300, dtype="|u1"),
    number(data=-1, dtype="<u8"),
    number(data=float("nan"), dtype="<i4"),
    {b"__npgeneric__": True},
]
VALUES = [
    None,
    True,
    -3,
    2.5,
    float("nan"),
    2**63,
    "",
    " \n",
    "x" * 2000,
    b"bytes",
    [],
    [1.0] * 8,
    {},
    {"a": {"b": [1, {}]}},
    msgpack.ExtType(5, b"ext"),
    msgpack.Timestamp(1),
    np.zeros(8, np.float64).reshape(2, 4),
    np.full(8, np.nan),
    np.full(8, np.inf, np.float32),
    np.full(8, 1e300),
    np.zeros(8, bool),
    np.zeros((16, 16), np.uint8),
    np.zeros((16, 16, 4), np.uint8),
    np.zeros((16, 16, 3), np.float32),
    np.zeros((0, 16, 3), np.uint8),
    np.zeros((1, 3000, 3), np.uint8),
    np.zeros((2, 16, 16, 3), np.uint8),
    np.zeros(0, np.float32),
    np.float32(1),
]
KEYS = [
    "observation/agentview",
    "observation/state",
    "prompt",
    "previous_actions",
    "num_executed_steps",
    "inference_delay",
    "there",
    "images",
    "misspelt",
]
NESTED = [
    b"\x91" * 3000 + b"\xc0",  # lists in lists
    b"\x81\xa1a" * 3000 + b"\xc0",  # maps in maps
    b"\xdd\xff\xff\xff\xff" * 500,  # each says that four thousand million entries follow
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",  # bytes, as many
    b"\xdb\xff\xff\xff\xff",  # text, as many
    b"\xc9\xff\xff\xff\xff\x01",
    b"\xc1",  # a code that msgpack never uses
    b"\xa2\xff\xfe",  # text that is no UTF-8
    b"\x82\xa1a\x01\xa1a\x02",
    b"\x81\xc0\xc0",  # a map with the key None
    b"\x81\x90\xc0",  # with a list as its key
    b"",
    b"\xc0\xc0",
]


def malformed(random: np.random.Generator) -> Iterator[bytes | str]:
    """Without end; each once changed from something that was well formed."""
    good = pack(observation())
    fixed = [*NESTED, *("text", "", "x" * 60_000, "\0")]
    fixed += [msgpack.packb(each) for each in (None, 1, "x", [], [1] * 2000, {1: 2}, {b"a": 1}, *ARRAYS)]
    fixed += [encoded({**observation(), key: value}) for key in KEYS for value in VALUES if not fine(key, value)]
    fixed += [encoded({**observation(), "observation/state": value}) for value in ARRAYS]
    fixed += [encoded({k: v for k, v in observation().items() if k != key}) for key in observation()]
    fixed += [encoded({**observation(), "agentview": np.zeros((16, 16, 3), np.uint8)})]
    yield from fixed
    while True:
        kind = random.integers(3)
        if kind == 0:
            yield random.bytes(int(random.integers(1, 2000)))
        elif kind == 1:
            yield good[: random.integers(len(good))]
        else:
            at = random.integers(38)  # in the map's head, before the first picture's bytes
            yield good[:at] + random.bytes(4) + good[at + 4 :]


def encoded(message: dict) -> bytes:
    """As openpi's client packs it, whatever the values are."""
    return msgpack.packb(message, default=as_map)


def as_map(value) -> dict:
    return array(value.tobytes(), value.dtype.str, value.shape) if value.ndim else number(value.item(), value.dtype.str)


def fine(key: str, value: object) -> bool:
    """Not malformed after all."""
    return (key == "images" and isinstance(value, dict) and not value) or (
        key == "prompt" and isinstance(value, str) and 0 < len(value.strip()) <= 1000
    )


def test_a_thousand_malformed_messages():
    policy = SummingPolicy()
    kinds: Counter[str] = Counter()
    held_bytes = []
    limits = Limits(requests_per_s=1e6, message_mb=0.5, prompt_characters=1000)
    with running_server(policy, reader(limits=limits)) as server, server.client() as witness:
        before = witness.ask(observation(7))["actions"]
        threads = threading.active_count()
        tracemalloc.start()
        for _ in range(2):  # the same ones again must leave no more than they did
            with server.client() as client:
                for message in islice(malformed(np.random.default_rng(0)), NUM_MESSAGES):
                    client.connection.send(message)
                    reply = client.reply()
                    if isinstance(reply, str):
                        assert 0 < len(reply) < 1000, reply
                        assert "\n" not in reply
                        assert "the server failed" not in reply and "the policy failed" not in reply
                    else:  # a change that hit a pixel
                        assert reply["actions"].shape[0] == H
                    kinds[type(reply).__name__] += 1
                np.testing.assert_array_equal(client.ask(observation(7))["actions"], before)
            until(lambda: server.service.num_clients == 1)
            gc.collect()
            held_bytes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        for frame in (b"\0" * 600_000, pack(observation(px=500))):  # both larger than any message may be
            with server.client() as client, pytest.raises(ConnectionClosed, match="1009"):
                client.connection.send(frame)
                client.connection.recv(timeout=60)
        with server.client() as rude, pytest.raises(ConnectionClosed):
            rude.connection.socket.sendall(b"\x82\xff" + b"\xff" * 200)  # no frame of a websocket
            rude.connection.recv(timeout=60)
        np.testing.assert_array_equal(witness.ask(observation(7))["actions"], before)
        until(lambda: server.service.num_clients == 1 and threading.active_count() <= threads)
        assert server.batcher.num_waiting == 0
    print(f"{dict(kinds)} in two rounds; the second left {held_bytes[1] - held_bytes[0]} bytes more than the first")
    assert kinds["str"] > 0.99 * 2 * NUM_MESSAGES
    assert held_bytes[1] - held_bytes[0] < 100_000
    assert not any(thread.name.startswith(("policy", "server")) for thread in threading.enumerate())


@pytest.mark.parametrize("frame", [*NESTED, *map(msgpack.packb, ARRAYS)])
def test_each_is_refused_in_a_sentence(frame):
    with pytest.raises(
        Refused, match="is no msgpack message|the message is|unknown key|an array|does not fit|a number of dtype"
    ):
        reader().read(unpack(frame))


def full(kind: bytes, entry: bytes) -> bytes:
    """A list or map of as many entries as one may have."""
    return kind + MAX_ENTRIES.to_bytes(2, "big") + entry * MAX_ENTRIES


KEYED = b"".join(b"\xa4%04d\xcb" % key + b"\x3f" * 8 for key in range(MAX_ENTRIES - 1))
WIDE_AND_DEEP = (b"\xde" + MAX_ENTRIES.to_bytes(2, "big") + KEYED + b"\xa4last") * 1000


@pytest.mark.parametrize(
    "frame",
    [
        full(b"\xdc", full(b"\xdc", full(b"\xdc", b"\x80")))[: 2**24],
        full(b"\xdc", full(b"\xdc", full(b"\xdc", b"\x90")))[: 2**24],
        full(b"\xdc", full(b"\xdc", full(b"\xdc", b"\xc0")))[: 2**24],
        WIDE_AND_DEEP + b"\xc0",
        WIDE_AND_DEEP + full(b"\xdc", full(b"\xdc", b"\x80")),
    ],
    ids=["maps", "lists", "nothings", "as many as may be", "too many in those"],
)
def test_a_frame_that_would_grow_is_refused_early(frame):
    tracemalloc.start()
    begun_s = time.process_time()
    try:
        with pytest.raises(Refused, match="has more than 1000 lists and maps|has an unknown key"):
            reader().read(unpack(frame))
        held_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"{len(frame)} bytes: {time.process_time() - begun_s:.3f} s, {held_bytes} bytes")
    assert held_bytes < 100e6


def test_as_many_lists_and_maps_as_a_frame_may_have():
    message: list = [[{}] * 110] * 9  # 1 + 9 + 990
    assert unpack(msgpack.packb(message)) == message
    with pytest.raises(Refused, match="has more than 1000 lists and maps; send pictures and numbers as arrays"):
        unpack(msgpack.packb([*message, []]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_and_numbers_come_back_as_they_were(dtype):
    sent = np.arange(6).astype(dtype).reshape(2, 3)
    there = unpack(pack({"array": sent, "empty": sent[:0], "number": sent[1, 2]}))
    for name, value in (("array", sent), ("empty", sent[:0])):
        assert there[name].dtype == value.dtype
        np.testing.assert_array_equal(there[name], value)
    assert there["number"] == sent[1, 2]


def test_a_number_too_large_for_its_dtype_is_infinite_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unpack(msgpack.packb(number(2**63, "<f2"))) == np.inf


@pytest.mark.parametrize("value", [np.array([object()]), np.array(["text"]), np.zeros(2, complex), object()])
def test_nothing_else_is_sent(value):
    with pytest.raises(TypeError, match="a message cannot hold a"):
        pack({"value": value})
