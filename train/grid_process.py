"""A grid's runs as processes: started, listened to, and told to stop when the grid is."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Self

import psutil
from accelerate.utils.other import get_free_port

from ..data.episodes import DataError

ERROR_LINE = re.compile(r"(?:\[rank\d+\]: )?(?:vlatune train: (.+)|([\w.]*(?:Error|Exception)(?:: .*)?))")
"""A line that says why a run failed: its own sentence, or a traceback's last line."""


class Stop:
    """Ctrl-C, SIGTERM and SIGUSR1 while a grid runs. The first one is passed on to the run, which saves and ends; the next one kills it."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """What came."""
        self.process: subprocess.Popen[bytes] | None = None
        self.num_ranks = 1

    def __enter__(self) -> Self:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self.before = {number: signal.signal(number, self._hear) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def watch(self, process: "subprocess.Popen[bytes]", num_ranks: int) -> None:
        """From now on this is the process to stop: the run itself, or with several ranks their launcher."""
        self.process, self.num_ranks = process, num_ranks
        if self.signal is not None:  # it came while the process was started
            self._pass_on()

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        is_second, self.signal = self.signal is not None, number
        if self.process is None or self.process.poll() is not None:
            return
        if is_second:
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self._pass_on()

    def _pass_on(self) -> None:
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            run = psutil.Process(self.process.pid)
            # The launcher would end at once and leave its ranks behind. They lie two processes below it, and it ends after them.
            ranks = [run] if self.num_ranks == 1 else [rank for node in run.children() for rank in node.children()]
            for rank in ranks:
                rank.terminate()
            if not ranks:  # the launcher has not come to start any
                os.killpg(self.process.pid, signal.SIGTERM)


def run_member(command: Sequence[str], log: Path, stop: Stop, *, num_ranks: int) -> str:
    """Run the command to its end, with its output added to `log`; returns why it ended early, if it did. Raises DataError where a run of
    an earlier grid still writes there."""
    with log.open("ab") as output:
        try:
            # The lock is the open file's: it lasts as long as any of the run's processes, whatever becomes of this one.
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{log.with_suffix('')} is still being trained, by a grid that was killed or another one; wait until it ends, or end it"
            ) from None
        start = output.tell()
        # In a group of its own, so that Ctrl-C reaches it through `stop` alone. Two grids on one machine need two ports.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"MASTER_PORT": str(get_free_port()), **os.environ},
            start_new_session=True,
        )
        stop.watch(process, num_ranks)
        code = process.wait()
    return why_it_ended(log.read_bytes()[start:].decode(errors="replace"), code)


def why_it_ended(output: str, code: int) -> str:
    """The last error that was printed; without one, how the process ended."""
    found = [match for line in re.split(r"[\r\n]+", output) if (match := ERROR_LINE.fullmatch(line.strip()))]
    if found:
        return found[-1][1] or found[-1][2]
    return f"ended early by {signal.Signals(-code).name}" if code < 0 else f"ended early with exit code {code}"
