"""How fast `vlatune prepare` goes and how much memory it holds, on a synthetic suite of LIBERO-Spatial's size.

    python tests/bench/prepare_speed.py [--share 0.1] [--out FOLDER]

LIBERO-Spatial has 10 tasks of 50 demonstrations of about 125 frames, two cameras of 128 x 128, in gzip-compressed HDF5. The pictures
here are smooth gradients with some noise: they compress about as rendered scenes do. `--share` makes a part of it. Prepared twice at
each size: as many episodes, and then a few very long ones. Each preparation is a process of its own, so that its peak memory is its own.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import tyro
from tqdm import tqdm

CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
SIDE_PX = 128


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to prepare."""

    share: float = 0.1
    """Of LIBERO-Spatial's 500 demonstrations."""
    image_px: int = 224
    """Side of the prepared images."""
    out: Path | None = None
    """Keep the suites and the caches here; a temporary folder if not given."""


def write_suite(folder: Path, lengths: list[int]) -> int:
    """Ten tasks' files; returns their size in bytes."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE_PX, :SIDE_PX].astype(np.float32)
    for task in tqdm(range(10), desc="write", unit="file"):
        path = folder / "libero_spatial" / f"pick_up_bowl_{task}_and_place_it_on_the_plate_demo.hdf5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            data = file.create_group("data")
            data.attrs["problem_info"] = "{}"
            for demo, length in enumerate(lengths):
                group = data.create_group(f"demo_{demo}")
                group["actions"] = random.uniform(-1, 1, (length, 7))
                for name, size in (("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2), ("joint_states", 7)):
                    group[f"obs/{name}"] = random.normal(size=(length, size))
                for camera in CAMERAS:
                    shape = (length, SIDE_PX, SIDE_PX, 3)
                    pictures = group.create_dataset(
                        f"obs/{camera}", shape, np.uint8, chunks=(1, *shape[1:]), compression="gzip", compression_opts=4
                    )
                    for frame in range(length):
                        wave = np.sin(rows / (20 + demo % 7) + frame / 15) + np.cos(columns / (25 + task))
                        grey = 64 * (wave + 2) + random.integers(0, 3, wave.shape)
                        pictures[frame] = np.repeat(grey[..., None], 3, axis=-1).clip(0, 255).astype(np.uint8)
    return sum(file.stat().st_size for file in folder.rglob("*.hdf5"))


def prepared(demos: Path, out: Path, image_px: int) -> dict[str, float]:
    """Frames, seconds and peak resident mebibytes of one `vlatune prepare` in its own process."""
    code = (
        "import json, resource, sys, time\n"
        "from pathlib import Path\n"
        "from vlatune.data.prepare import PrepareConfig, prepare\n"
        "from vlatune.data.cache import Cache\n"
        f"start = time.perf_counter()\n"
        f"path = prepare(PrepareConfig(demos=Path({str(demos)!r}), out=Path({str(out)!r}), image_px={image_px}, encoder='none'))\n"
        "seconds = time.perf_counter() - start\n"
        "peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "print(json.dumps({'frames': Cache.open(path).num_frames, 'seconds': seconds, 'peak_mib': peak_mib}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(options: Options, folder: Path) -> None:
    num_demos = max(1, round(50 * options.share))
    cases = {
        f"10 x {max(1, num_demos // 4)} episodes of 125": [125] * max(1, num_demos // 4),
        f"10 x {num_demos} episodes of 125": [125] * num_demos,
        f"10 episodes of {125 * num_demos}": [125 * num_demos],
    }
    print("| suite | HDF5, MB | frames | frames/s | peak memory, MiB |\n|---|---|---|---|---|")
    for name, lengths in cases.items():
        start = time.perf_counter()
        size = write_suite(folder / name, lengths)
        print(f"written in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        result = prepared(folder / name, folder / f"{name} cache", options.image_px)
        speed = result["frames"] / result["seconds"]
        print(
            f"| {name} | {size / 1e6:.0f} | {result['frames']:.0f} | {speed:.0f} | {result['peak_mib']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    if chosen.out is None:
        with tempfile.TemporaryDirectory() as temporary:
            measure(chosen, Path(temporary))
    else:
        measure(chosen, chosen.out)
