"""What a server says while it runs: a line for each client that comes or goes, and how fast it answers."""

import contextlib
import logging
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tqdm import tqdm

log = logging.getLogger(__name__)

RECENT = 200
"""Answers whose median is shown."""


@dataclass(kw_only=True)
class Client:
    """One connection, for its line in the log."""

    address: str
    num_answered: int = 0
    num_refused: int = 0


class Status:
    """On a terminal also a line that is written anew: clients, requests and the median of the last answers' milliseconds."""

    def __init__(self) -> None:
        self.num_clients = self.num_answered = 0
        self._recent_ms: deque[float] = deque(maxlen=RECENT)
        self._is_read = True
        self._bar = tqdm(
            desc="serve",
            unit="request",
            bar_format="{desc}: {n_fmt} answered, {rate_fmt}{postfix}",
            mininterval=1,
            disable=not sys.stdout.isatty(),
            file=sys.stdout,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._unless_unread():
            self._bar.close()

    def say(self, line: str) -> None:
        """Above the line that changes."""
        with self._unless_unread():
            tqdm.write(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stdout)
            sys.stdout.flush()

    def connected(self, client: Client) -> None:
        self.num_clients += 1
        self.say(f"{client.address} connected; {self._clients()}")

    def left(self, client: Client, why: str) -> None:
        """`why`: empty where it said good-bye."""
        self.num_clients -= 1
        self.say(
            f"{client.address} left{f' ({why})' if why else ''} after {client.num_answered} answers and {client.num_refused} refusals; {self._clients()}, median "
            f"{self._median()}"
        )

    def answered(self, client: Client, total_ms: float) -> None:
        client.num_answered += 1
        self.num_answered += 1
        self._recent_ms.append(total_ms)
        with self._unless_unread():
            if self._bar.update() and not self._bar.disable:
                self._bar.set_postfix_str(f"{self._clients()}, median {self._median()}")

    def refused(self, client: Client) -> None:
        client.num_refused += 1

    @contextlib.contextmanager
    def _unless_unread(self) -> Iterator[None]:
        """Whoever reads the lines may go, as with `| head`; the clients are served all the same. Said once, on stderr."""
        try:
            yield
        except OSError as error:
            if self._is_read:
                log.warning("nobody reads the server's lines any more (%s); it goes on without them", error)
            self._is_read = False

    def _clients(self) -> str:
        return f"{self.num_clients} client" + ("" if self.num_clients == 1 else "s")

    def _median(self) -> str:
        return f"{statistics.median(self._recent_ms):.1f} ms" if self._recent_ms else "unknown"
