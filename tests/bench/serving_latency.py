"""What a policy server adds to its policy, over loopback: a decision through the server against the same decision by `act`.

    python tests/bench/serving_latency.py [--image-px 128] [--num-decisions 300] [--clients 1 2 4 8]

A tiny policy with random weights in a server process (`vlatune serve`, its own checkpoint), two cameras. Latency at batch 1: the two kinds
take turns in one run, so that a machine that grows slower does so for both, and the server's policy has the machine for itself while it is
asked. On a machine with other work the fastest tenth tells more than the median: every hop between processes
waits for a core; CPU time waits for nobody. Throughput: as many clients at once, each asking again as soon as it is answered, for some seconds each."""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from running_server import CAMERAS, Client, S
from small_policies import make_policy
from websockets.sync.client import connect

from vlatune.data.language import Language
from vlatune.data.raw_observation import RawObservation
from vlatune.policy.acting import load_policy
from vlatune.policy.checkpoints.folder import write_policy
from vlatune.policy.checkpoints.layout import COMPLETE

T = TypeVar("T")

PAUSE_S = 0.01
"""Before every decision: OpenMP's threads spin for some milliseconds after their work, on the core that the other process would need."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    image_px: int = 128
    """Sides of the two pictures that a client sends; the policy's own are 16."""
    num_decisions: int = 300
    """Of each kind, after 20 that are not counted."""
    clients: tuple[int, ...] = (1, 2, 4, 8)
    """How many ask at once."""
    seconds: float = 5.0
    """Of each number of clients."""
    max_batch_size: int = 8


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder))
        with serving(checkpoint, options.max_batch_size) as (server, port):
            latency(checkpoint, server, port, options)
            for number in options.clients:
                throughput(port, number, options)


def latency(checkpoint: Path, server: psutil.Process, port: int, options: Options) -> None:
    policy = load_policy(checkpoint, device="cpu")
    random = np.random.default_rng(0)
    own_ms, served_ms, model_ms = [], [], []
    own_cpu_s = asking_cpu_s = server_cpu_s = 0.0
    with asking(port) as client:
        for k in range(20 + options.num_decisions):
            message = observation(random, options.image_px)
            raw = RawObservation(
                images={camera: message[f"observation/{camera}"][None] for camera in CAMERAS},
                state_TS=message["observation/state"][None],
                instruction=message["prompt"],
            )
            if k == 20:
                server_cpu_s -= cpu_s(server)
            _, act_ms, act_cpu_s = timed(lambda raw=raw: policy.act([raw]))
            reply, ask_ms, ask_cpu_s = timed(lambda message=message: client.ask(message))
            if k >= 20:
                own_cpu_s += act_cpu_s
                asking_cpu_s += ask_cpu_s
                own_ms.append(act_ms)
                served_ms.append(ask_ms)
                model_ms.append(reply["server_timing"]["infer_ms"])
        server_cpu_s += cpu_s(server)
    print(f"batch 1, {options.image_px} px, {options.num_decisions} decisions each way, ms:")
    for name, share in (("median", 50), ("fastest tenth", 10), ("slowest twentieth", 95)):
        own, served = np.percentile(own_ms, share), np.percentile(served_ms, share)
        print(f"  {name:17}  act {own:6.2f}  server {served:6.2f}  {served - own:+.2f}, ratio {served / own:.2f}")
    beyond_ms = np.subtract(served_ms, model_ms)
    print(
        f"  of a decision through the server its own policy took {statistics.median(model_ms):.2f} (median); packing, sockets, checks and queue "
        f"{statistics.median(beyond_ms):.2f}, in the fastest tenth {np.percentile(beyond_ms, 10):.2f}"
    )
    own, asking_, serving_ = (1000 * each / options.num_decisions for each in (own_cpu_s, asking_cpu_s, server_cpu_s))
    print(
        f"  CPU time of a decision: act {own:.2f}; client {asking_:.2f} and server {serving_:.2f}: {asking_ + serving_ - own:+.2f}"
    )


def timed(call: Callable[[], T]) -> tuple[T, float, float]:
    """What it gives, milliseconds, and this process's CPU seconds."""
    time.sleep(PAUSE_S)
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    found = call()
    return found, 1000 * (time.perf_counter() - begun_s), time.process_time() - begun_cpu_s


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def throughput(port: int, number: int, options: Options) -> None:
    """Pictures are made beforehand: what is measured is the server, and clients that pack and send."""
    random = np.random.default_rng(1)
    messages = [observation(random, options.image_px) for _ in range(number)]
    ends_s = time.perf_counter() + options.seconds
    round_trips_ms: list[float] = []
    batch_sizes: list[int] = []

    def ask(message: dict) -> None:
        with asking(port) as client:
            while time.perf_counter() < ends_s:
                begun_s = time.perf_counter()
                reply = client.ask(message)
                round_trips_ms.append(1000 * (time.perf_counter() - begun_s))
                batch_sizes.append(reply["server_timing"]["batch_size"])

    threads = [threading.Thread(target=ask, args=(message,)) for message in messages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(
        f"{number} client{'s' if number > 1 else ''}: {len(round_trips_ms) / options.seconds:.0f} decisions/s, median "
        f"{statistics.median(round_trips_ms):.2f} ms, mean batch {statistics.mean(batch_sizes):.1f}"
    )


def observation(random: np.random.Generator, image_px: int) -> dict:
    pictures = {
        f"observation/{camera}": random.integers(0, 256, (image_px, image_px, 3), np.uint8) for camera in CAMERAS
    }
    return {**pictures, "observation/state": random.normal(size=S).astype(np.float32), "prompt": "reach the red dot"}


def write_checkpoint(folder: Path) -> Path:
    checkpoint = folder / "tiny" / "checkpoints" / "step_000001"
    checkpoint.mkdir(parents=True)
    policy = make_policy()
    write_policy(checkpoint, policy, policy.state_dict(), Language.build(["reach the red dot"], encoder="none"), {})
    (checkpoint / COMPLETE).touch()
    return checkpoint


@contextmanager
def serving(checkpoint: Path, max_batch_size: int) -> Iterator[tuple[psutil.Process, int]]:
    words = ["--device", "cpu", "--port", "0", "--max-batch-size", str(max_batch_size)]
    command = [sys.executable, "-m", "vlatune.launch.cli", "serve", str(checkpoint), *words]
    limits = ["--limits.requests-per-s", "1000000"]
    with subprocess.Popen([*command, *limits], stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        try:
            found = next(filter(None, (re.search(r"listens on ws://127.0.0.1:(\d+)", line) for line in process.stdout)))
            yield psutil.Process(process.pid), int(found[1])
        finally:
            process.terminate()


@contextmanager
def asking(port: int) -> Iterator[Client]:
    with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as connection:
        yield Client(connection)


if __name__ == "__main__":
    main()
