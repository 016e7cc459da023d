"""What one client may ask of a server, and who may ask at all."""

import hmac
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ...data.episodes import DataError
from .messages import Refused

API_KEY_VARIABLE = "VLATUNE_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What keeps one client, or a mistaken one, from taking the server from all others."""

    clients: int = 32
    """Connections at once; one more is closed with code 1013 (try again later)."""
    waiting: int = 64
    """Requests that wait for the policy at once; one more is refused. Every client has one at a time: only where more clients than these are
    let in does it come to that."""
    requests_per_s: float = 200.0
    """Of one connection, on average over a second; more are refused."""
    message_mb: float = 16.0
    """Of one frame; a larger one ends its connection with code 1009 (message too big)."""
    picture_px: int = 2048
    """The longer side of a picture."""
    prompt_characters: int = 1000
    """Of an instruction."""

    def __post_init__(self) -> None:
        for name in ("clients", "waiting", "requests_per_s", "message_mb", "picture_px", "prompt_characters"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--limits.{name.replace('_', '-')} is {getattr(self, name)}; it must be more than 0")

    @property
    def message_bytes(self) -> int:
        return round(self.message_mb * 2**20)


@dataclass(kw_only=True)
class RequestRate:
    """At most so many requests a second of one connection: a second's worth at once, then as they come in again."""

    per_s: float
    clock: Callable[[], float] = time.monotonic
    _left: float = field(init=False)
    _counted_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._left, self._counted_s = max(1.0, self.per_s), self.clock()

    def count(self) -> None:
        """Raises `Refused` for a request too many."""
        now_s = self.clock()
        self._left = min(max(1.0, self.per_s), self._left + self.per_s * (now_s - self._counted_s))
        self._counted_s = now_s
        if self._left < 1:
            raise Refused(
                f"more than {self.per_s:g} requests a second came over this connection; ask less often, or start the server with a larger "
                "--limits.requests-per-s"
            )
        self._left -= 1


def read_api_key(file: Path | None) -> str | None:
    """The key that clients must show: what the file holds, or the environment's `VLATUNE_API_KEY`; None where there is neither.

    Never an argument of the command: every user of the machine can read those. Raises `DataError` where the file is not there, and
    `ValueError` for a blank key or one that no header can carry."""
    if file is None:
        key, origin = os.environ.get(API_KEY_VARIABLE), f"the environment's {API_KEY_VARIABLE}"
        if key is None:
            return None
    else:
        origin = f"--api-key-file {file}"
        try:
            key = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{origin} cannot be read ({error}); write a key there, or leave it out") from None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError(
            f"{origin} holds no key; write some letters and digits there, for instance of: openssl rand -hex 32"
        )
    return key


def shows_key(authorization: str | None, key: str | None) -> bool:
    """Whether this `Authorization` header, as openpi's client sends it, shows the key; compared in constant time."""
    if key is None:
        return True
    return authorization is not None and hmac.compare_digest(
        authorization.encode(errors="surrogateescape"), f"Api-Key {key}".encode()
    )
