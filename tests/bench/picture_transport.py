"""A decision's two pictures from a simulator's process to the policy's: through a pipe, and through shared memory.

    python tests/bench/picture_transport.py [--image-px 128 256] [--repeats 300]

Round trips with an answer of one chunk. The parent's CPU time is what counts: one process serves all simulators.
"""

import multiprocessing
import os
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import numpy as np
import tyro

from vlatune.data.raw_observation import RawObservation
from vlatune.eval.shared_pictures import NewMemory, PictureReader, PictureWriter


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much to measure."""

    image_px: tuple[int, ...] = (128, 256)
    """Sides of the two cameras' pictures."""
    repeats: int = 300
    """Round trips of each kind."""


def ask(connection: Connection, parent: int, image_px: int, repeats: int) -> None:
    """The simulator's side: all through the pipe, then all through memory."""
    random = np.random.default_rng(0)
    images = {c: random.integers(0, 256, (1, image_px, image_px, 3), np.uint8) for c in ("agentview", "eye_in_hand")}
    raw = RawObservation(images=images, state_TS=np.zeros((1, 8), np.float32), instruction="put it there")
    for _ in range(repeats):
        connection.send(raw)
        connection.recv()
    writer = PictureWriter(connection, parent)
    for _ in range(repeats):
        places = writer.write(raw.images)
        connection.send((replace(raw, images={}), places))
        connection.recv()


def measure(image_px: int, repeats: int) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=ask, args=(theirs, os.getpid(), image_px, repeats), daemon=True)
    process.start()
    reader, answer_HA = PictureReader(), np.zeros((10, 7), np.float32)
    cpu_ms = {}
    for kind in ("pipe", "shared memory"):
        first = ours.recv()  # not counted: the other side starts, or makes its memory
        if isinstance(first, NewMemory):
            reader.receive(first, ours)
            ours.recv()
        ours.send(answer_HA)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats - 1):
            message = ours.recv()
            if kind == "shared memory":
                raw, places = message
                replace(raw, images=reader.read(places))
            ours.send(answer_HA)
        count = repeats - 1
        cpu_ms[kind] = 1000 * (time.process_time() - cpu) / count
        print(
            f"{image_px} px, {kind}: {1000 * (time.perf_counter() - wall) / count:.2f} ms a round trip, of the parent's CPU {cpu_ms[kind]:.3f}"
        )
    print(f"{image_px} px: parent's CPU time, ratio {cpu_ms['pipe'] / cpu_ms['shared memory']:.1f}")
    process.join()


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    for side in options.image_px:
        measure(side, options.repeats)
