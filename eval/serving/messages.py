"""Messages on the wire: msgpack, with arrays as openpi's client writes them. Nothing that arrives is ever executed or unpickled.

An array is a map `{b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [10, 7]}`, a numpy scalar
`{b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"}` (openpi-client's `msgpack_numpy`). Only numbers and truth values have arrays:
a dtype must be one of `DTYPES`, by its very text, so that none that holds objects, records or strings of any length can be asked for."""

import itertools
import math
import reprlib
from collections.abc import Mapping
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np


class Refused(Exception):
    """What a client sent cannot be answered; the sentence is for who wrote the client, and is sent back."""


_CODES = ("?", "b", "B", "h", "H", "i", "I", "q", "Q", "e", "f", "d")
DTYPES: Mapping[str, np.dtype] = {
    dtype.str: dtype
    for code in _CODES
    for dtype in (np.dtype(code).newbyteorder("<"), np.dtype(code).newbyteorder(">"))
}
"""As numpy writes them (`|u1`, `<f4`, …) -> the dtype."""

MAX_DIMS = 8
MAX_ENTRIES = 256
"""Of any one list or map: arrays have their bytes apart, and an observation has a few keys."""
MAX_CONTAINERS = 1000
"""Lists and maps of a frame, whatever their depth: an array is two of them. Unbounded, a frame of empty ones would grow to a gigabyte."""
MAX_TEXT = 100_000
"""Bytes of any one text: how long an instruction may be is for the server to say, in a sentence."""


def pack(message: Mapping[str, Any]) -> bytes:
    """Raises `TypeError` for what has no place in a message, an array of objects among it."""
    packed: bytes = msgpack.packb(message, default=_encoded)
    return packed


def unpack(frame: bytes) -> Any:
    """What a frame holds; arrays are views of it, read-only. Raises `Refused`, for anything else than whole msgpack
    of numbers, texts, lists, maps and arrays, and for too many of them."""
    number = itertools.count(1)

    def counted(container: Any) -> Any:
        if next(number) > MAX_CONTAINERS:
            raise Refused(
                f"the frame of {len(frame)} bytes has more than {MAX_CONTAINERS} lists and maps; send pictures and numbers as arrays, as "
                "openpi-client does"
            )
        return container

    try:
        return msgpack.unpackb(
            frame,
            object_hook=lambda value: _decoded(counted(value)),
            list_hook=counted,
            max_str_len=MAX_TEXT,
            max_array_len=MAX_ENTRIES,
            max_map_len=MAX_ENTRIES,
            max_ext_len=0,
        )
    except Refused:
        raise
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        said = str(error) or type(error).__name__
        raise Refused(f"the frame of {len(frame)} bytes is no msgpack message ({said}); send one packed map") from None


def _encoded(value: Any) -> dict[bytes, Any]:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.str in DTYPES:
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(
        f"a message cannot hold a {type(value).__name__}" + (f" of {value.dtype}" if hasattr(value, "dtype") else "")
    )


def _decoded(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        return _array(value)
    if b"__npgeneric__" in value:
        return _scalar(value)
    return value


def _array(value: Mapping[bytes, Any]) -> np.ndarray:
    data, shape, dtype = value.get(b"data"), value.get(b"shape"), _dtype(value)
    if not isinstance(data, bytes):
        raise Refused(f"an array's data is a {type(data).__name__}; send its bytes")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMS
        or not all(type(side) is int and side >= 0 for side in shape)
    ):
        raise Refused(f"an array's shape is {short(shape)}; send at most {MAX_DIMS} whole numbers of 0 or more")
    expected = math.prod(shape) * dtype.itemsize
    if expected != len(data):
        raise Refused(
            f"an array of shape {tuple(shape)} and dtype {dtype.str} has {expected} bytes, and {len(data)} came"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def _scalar(value: Mapping[bytes, Any]) -> np.generic:
    data, dtype = value.get(b"data"), _dtype(value)
    if not isinstance(data, bool | int | float):
        raise Refused(f"a number of dtype {dtype.str} came as a {type(data).__name__}; send a number")
    try:
        with np.errstate(over="ignore"):
            scalar: np.generic = dtype.type(data)
    except (OverflowError, ValueError):
        raise Refused(f"{short(data)} does not fit into dtype {dtype.str}") from None
    return scalar


def _dtype(value: Mapping[bytes, Any]) -> np.dtype:
    name = value.get(b"dtype")
    if not isinstance(name, str) or name not in DTYPES:
        raise Refused(f"an array's dtype is {short(name)}; it can be {', '.join(DTYPES)}")
    return DTYPES[name]


def short(value: Any) -> str:
    """For a sentence, whatever came."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else reprlib.repr(value)
