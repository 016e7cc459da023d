"""Pictures through shared memory: what is written is read, sizes grow, and nothing is left behind."""

import multiprocessing
import os

import numpy as np

from vlatune.eval.shared_pictures import NewMemory, PictureReader, PictureWriter


def pictures(side: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {camera: rng.integers(0, 256, (2, side, side, 3), np.uint8) for camera in ("agentview", "eye_in_hand")}


def write(connection, parent: int) -> None:
    writer = PictureWriter(connection, parent)
    for seed, side in enumerate((8, 8, 32, 4)):
        connection.send(writer.write(pictures(side, seed)))
        connection.recv()


def test_pictures_arrive_and_a_larger_one_gets_a_new_memory():
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=write, args=(theirs, os.getpid()))
    process.start()
    reader, announced = PictureReader(), []
    for seed, side in enumerate((8, 8, 32, 4)):
        message = ours.recv()
        if isinstance(message, NewMemory):
            announced.append(message.num_bytes)
            reader.receive(message, ours)
            message = ours.recv()
        found, expected = reader.read(message), pictures(side, seed)
        assert list(found) == list(expected)
        assert all(np.array_equal(found[camera], expected[camera]) for camera in expected)
        assert not any(image.flags.writeable for image in found.values())
        ours.send(None)
    process.join()
    assert announced == [2 * 2 * 8 * 8 * 3, 2 * 2 * 32 * 32 * 3]


def test_no_pictures_need_no_memory():
    ours, _theirs = multiprocessing.Pipe()
    assert PictureWriter(ours, os.getpid()).write({}).pictures == {}
