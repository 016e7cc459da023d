"""How fast training samples are read: from a cache, and from what a cache is made of. Run from the repository's root:

    python tests/bench/loader_speed.py             two cameras of 224 pixels, then growth to 100,000 frames of 64 (3 minutes, 5 GB)
    python tests/bench/loader_speed.py --growth    without the growth

The same windows as the same tensors (compared in every round), batch by batch, from

    ours    a cache, by memory map
    HDF5    h5py, datasets kept open; stored plainly, as LIBERO's create_dataset.py does, or with gzip in chunks of 16 frames, as
            our recorder does. As recorded: 128 pixels, upside-down, turned and resized per sample. Prepared: somebody has
            written the prepared pictures into the file
    mp4     PyAV, files kept open: back to the key frame, decoded up to the wanted one, turned and resized. AV1 with every second
            frame a key frame, as LeRobot writes; states and actions in memory. All else holds what these videos decode to

Everything is in the system's page cache. Figures are CPU time of the whole process, medians of rounds; ratios are within a round."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import av
import h5py
import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from vlatune.data.batch import Batch, Observation
from vlatune.data.cache import Cache
from vlatune.data.images import ImageRule
from vlatune.data.loader import ChunkLoader, LoaderConfig
from vlatune.data.prepare import PrepareConfig, prepare

CAMERAS = ("agentview", "eye_in_hand")
TASKS = ("open_the_drawer", "push_the_red_mug_to_the_left", "put_the_bowl_on_the_plate", "turn_on_the_lamp")
EPISODE_FRAMES = 125


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    frames: int = 2000
    """Of the comparison; a multiple of 500."""
    image_px: int = 224
    """Of its prepared pictures."""
    recorded_px: int = 128
    """Of its pictures as recorded."""
    batch_sizes: tuple[int, ...] = (32, 256)
    """Samples a batch; the comparison has the first."""
    horizon: int = 10
    """Actions a chunk."""
    num_rounds: int = 5
    """Each of `num_batches` batches."""
    num_batches: int = 6
    """A round's."""
    growth: tuple[int, ...] = (1000, 10_000, 100_000)
    """Frames of the caches whose cost is compared; multiples of 500."""
    growth_px: int = 64
    """Of their pictures."""
    folder: Path | None = None
    """Where the files go for the time of the run; None: the system's temporary folder."""


def main() -> None:
    options = tyro.cli(Options)
    os.environ["SVT_LOG"] = "1"  # errors only
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        compare(Path(folder), options)
    print("\n| frames | first pass | later passes |\n|---|---|---|")
    for num_frames in options.growth:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            grow(Path(folder), num_frames, options)


def compare(folder: Path, options: Options) -> None:
    write_videos(folder / "mp4", options.frames // len(TASKS), options.recorded_px)
    rule = PrepareConfig(demos=folder, out=folder, image_px=options.image_px).image_rule
    for task in tqdm(TASKS, desc="HDF5"):
        recorded = {camera: decode_all(folder / "mp4" / f"{task}_{camera}.mp4") for camera in CAMERAS}
        prepared = {camera: rule.prepare(pictures) for camera, pictures in recorded.items()}
        for pictures, name in ((recorded, "HDF5 as recorded"), (prepared, "HDF5 prepared")):
            for storage in ("plain", "gzip"):
                file = folder / f"{name}, {storage}" / f"{task}_demo.hdf5"
                write_hdf5(file, pictures, compressed=storage == "gzip")
    cache = make_cache(folder / "HDF5 as recorded, plain", folder / "ours", options.image_px)
    loader = make_loader(cache, options.batch_sizes[0], options)
    touch(cache)
    num_steps = options.num_rounds * options.num_batches
    wanted = [loader.batch(step).sample_index_B for step in range(num_steps)]
    readers: dict[str, Callable[[int], Batch]] = {"ours": loader.batch}
    for name in ("HDF5 as recorded, plain", "HDF5 as recorded, gzip", "HDF5 prepared, plain", "HDF5 prepared, gzip"):
        dataset = HdfDataset(folder / name, cache, options.horizon, rule if "recorded" in name else None)
        readers[name] = SampleBySample(dataset, wanted).batch
    readers["mp4"] = SampleBySample(VideoDataset(folder / "mp4", cache, options.horizon, rule), wanted).batch
    for read in readers.values():
        assert_equal(read(0), loader.batch(0))  # and opens what then stays open
    rounds: list[dict[str, float]] = []
    for index in tqdm(range(options.num_rounds), desc="rounds"):
        steps = range(index * options.num_batches, (index + 1) * options.num_batches)
        ours, others = [], {}
        for name, read in list(readers.items())[1:]:
            ours.append(cpu_seconds(loader.batch, steps))  # so that what else the machine does meets both
            others[name] = cpu_seconds(read, steps)
        rounds.append({"ours": statistics.mean(ours), **others})
        for read in readers.values():
            assert_equal(read(steps[-1]), loader.batch(steps[-1]))
    num_samples = options.num_batches * loader.config.batch_size
    print(
        f"{options.frames} frames, 2 x {options.image_px} pixels ({options.recorded_px} as recorded), batch {loader.config.batch_size}, chunk {options.horizon}"
    )
    print("\n| source | on disk | samples/s and core | ours / this |\n|---|---|---|---|")
    for name in readers:
        rate = num_samples / statistics.median(each[name] for each in rounds)
        ratios = sorted(each[name] / each["ours"] for each in rounds)
        said = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f})"
        print(f"| {name} | {megabytes(folder / name):,.0f} MB | {rate:,.0f} | {said} |")
    print("\n| ours | batch | samples/s and core |\n|---|---|---|")
    for batch_size in options.batch_sizes:
        for name, settings in {
            "prompt: the instruction": {},
            "prompt: with the state, tokenised per sample": {"prompt": "pi05"},
            "two frames a camera": {"observation_offsets": (-1, 0)},
        }.items():
            print(f"| {name} | {batch_size} | {rate_of(make_loader(cache, batch_size, options, **settings)):,.0f} |")


def grow(folder: Path, num_frames: int, options: Options) -> None:
    """A row: microseconds of CPU a sample, of a first pass (each page is mapped on its first use) and of later ones."""
    random = np.random.default_rng(0)
    px, num_task_frames = options.growth_px, num_frames // len(TASKS)
    for task in TASKS:
        pictures = {c: random.integers(0, 256, (num_task_frames, px, px, 3), dtype=np.uint8) for c in CAMERAS}
        write_hdf5(folder / "demos" / f"{task}_demo.hdf5", pictures, compressed=False)
    cache = make_cache(folder / "demos", folder / "cache", px)
    loader = make_loader(cache, options.batch_sizes[0], options)
    num_steps = min(loader.steps_per_epoch, 400)
    loader.batch(loader.steps_per_epoch + num_steps)  # its permutation and what else is made once
    first = cpu_seconds(loader.batch, range(num_steps)) / num_steps
    touch(cache)
    later = statistics.median(
        cpu_seconds(loader.batch, range(num_steps)) / num_steps for _ in range(options.num_rounds)
    )
    each = [f"{1e6 * seconds / loader.config.batch_size:.1f} µs" for seconds in (first, later)]
    print(f"| {num_frames:,} | {' | '.join(each)} |")


def rate_of(loader: ChunkLoader) -> float:
    num_steps = max(4, 2048 // loader.config.batch_size)
    seconds = [cpu_seconds(loader.batch, range(k * num_steps, (k + 1) * num_steps)) for k in range(5)]
    return num_steps * loader.config.batch_size / statistics.median(seconds)


def make_loader(cache: Cache, batch_size: int, options: Options, **settings) -> ChunkLoader:
    config = LoaderConfig(batch_size=batch_size, horizon=options.horizon, cameras=CAMERAS)
    return ChunkLoader(cache, replace(config, **settings))


def make_cache(demos: Path, out: Path, image_px: int) -> Cache:
    config = PrepareConfig(demos=demos, out=out, image_px=image_px, encoder="none", validation_share=0.0)
    return Cache.open(prepare(config))


def touch(cache: Cache) -> None:
    """Map every page of the pictures."""
    for pictures in cache.images.values():
        pictures.reshape(-1)[::4096].sum()


def cpu_seconds(read: Callable[[int], Batch], steps: range) -> float:
    start = time.process_time()
    for step in steps:
        read(step)
    return time.process_time() - start


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def assert_equal(one: Batch, two: Batch) -> None:
    for camera in CAMERAS:
        assert torch.equal(one.observation.images[camera], two.observation.images[camera])
        assert torch.equal(one.observation.image_mask[camera], two.observation.image_mask[camera])
    assert torch.equal(one.observation.state_BTS, two.observation.state_BTS)
    assert torch.equal(one.observation.prompts.ids_BL, two.observation.prompts.ids_BL)
    assert torch.equal(one.actions_BHA, two.actions_BHA)
    assert torch.equal(one.valid_BH, two.valid_BH)
    assert torch.equal(one.sample_index_B, two.sample_index_B)


class SampleBySample:
    """What a dataset of single samples and a collation that stacks them do."""

    def __init__(self, dataset: "HdfDataset | VideoDataset", wanted: list[torch.Tensor]) -> None:
        """`wanted`: the frames of each batch."""
        self.dataset, self.wanted = dataset, wanted

    def batch(self, step: int) -> Batch:
        samples = [self.dataset.sample(frame) for frame in self.wanted[step].tolist()]
        pictures, states, actions, valid, texts = zip(*samples, strict=True)
        there = torch.ones(len(samples), 1, dtype=torch.bool)
        return Batch(
            observation=Observation(
                images={c: torch.from_numpy(np.stack([each[c] for each in pictures])[:, None]) for c in CAMERAS},
                image_mask=dict.fromkeys(CAMERAS, there),
                state_BTS=torch.from_numpy(np.stack(states)[:, None]),
                prompts=self.dataset.cache.language.prompts(texts),
            ),
            actions_BHA=torch.from_numpy(np.stack(actions)),
            valid_BH=torch.from_numpy(np.stack(valid)),
            sample_index_B=self.wanted[step],
        )


class Dataset:
    """Which episode a frame is of, and what becomes of a picture."""

    def __init__(self, cache: Cache, horizon: int, rule: ImageRule | None) -> None:
        self.cache, self.horizon, self.rule = cache, horizon, rule
        self.start_E = cache.episodes["start"].to_numpy()
        self.episodes = list(cache.episodes.itertuples())

    def prepared(self, picture: np.ndarray) -> np.ndarray:
        return picture if self.rule is None else self.rule.prepare(picture[None])[0]

    def window(self, actions: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        """(H, A) float32 and (H,): one episode's actions from `first` on, the last one repeated; which are not repeated."""
        found = actions[first : first + self.horizon].astype(np.float32)
        missing = self.horizon - len(found)
        valid = np.arange(self.horizon) < len(found)
        return np.concatenate([found, np.repeat(found[-1:], missing, axis=0)]), valid


class HdfDataset(Dataset):
    def __init__(self, folder: Path, cache: Cache, horizon: int, rule: ImageRule | None) -> None:
        super().__init__(cache, horizon, rule)
        files = {task: h5py.File(folder / f"{task}_demo.hdf5") for task in TASKS}
        demos = [files[episode.task]["data"][episode.source.rsplit("/", 1)[1]] for episode in self.episodes]
        self.pictures = [{camera: demo[f"obs/{camera}_rgb"] for camera in CAMERAS} for demo in demos]
        self.states = [[demo[f"obs/{name}"] for name in ("ee_pos", "ee_ori", "gripper_states")] for demo in demos]
        self.actions = [demo["actions"] for demo in demos]

    def sample(self, frame: int) -> tuple:
        episode = int(np.searchsorted(self.start_E, frame, side="right")) - 1
        row = frame - int(self.start_E[episode])
        pictures = {camera: self.prepared(dataset[row]) for camera, dataset in self.pictures[episode].items()}
        state = np.concatenate([dataset[row] for dataset in self.states[episode]]).astype(np.float32)
        return pictures, state, *self.window(self.actions[episode], row), self.episodes[episode].instruction


class VideoDataset(Dataset):
    def __init__(self, folder: Path, cache: Cache, horizon: int, rule: ImageRule | None) -> None:
        super().__init__(cache, horizon, rule)
        self.videos = {(task, c): av.open(str(folder / f"{task}_{c}.mp4")) for task in TASKS for c in CAMERAS}
        for video in self.videos.values():
            video.streams.video[0].codec_context.thread_count = 1
        first_of_task: dict[str, int] = {}
        self.first_in_video = [e.start - first_of_task.setdefault(e.task, e.start) for e in self.episodes]
        self.states, self.actions = np.array(cache.state_NS), np.array(cache.actions_NA)

    def sample(self, frame: int) -> tuple:
        index = int(np.searchsorted(self.start_E, frame, side="right")) - 1
        episode, start = self.episodes[index], int(self.start_E[index])
        place = self.first_in_video[index] + frame - start
        pictures = {camera: self.decode(self.videos[episode.task, camera], place) for camera in CAMERAS}
        window = self.window(self.actions[start : start + episode.length], frame - start)
        return pictures, self.states[frame], *window, episode.instruction

    def decode(self, video: av.container.InputContainer, place: int) -> np.ndarray:
        stream = video.streams.video[0]
        ticks = round(place / stream.average_rate / stream.time_base)
        video.seek(ticks, stream=stream)
        for picture in video.decode(stream):
            if picture.pts >= ticks:
                return self.prepared(picture.to_ndarray(format="rgb24"))
        raise ValueError(f"the video ends before frame {place}")


def write_videos(folder: Path, num_frames: int, px: int) -> None:
    """A file per task and camera: smooth, noisy scenes in which things move."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for task in tqdm(TASKS, desc="videos"):
        for camera in CAMERAS:
            with av.open(str(folder / f"{task}_{camera}.mp4"), "w") as video:
                stream = video.add_stream("libsvtav1", rate=20, options={"g": "2", "crf": "30", "preset": "12"})
                stream.width = stream.height = px
                stream.pix_fmt = "yuv420p"
                for first in range(0, num_frames, EPISODE_FRAMES):
                    for picture in episode_pictures(random, min(EPISODE_FRAMES, num_frames - first), px):
                        video.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                video.mux(stream.encode())


def episode_pictures(random: np.random.Generator, num_frames: int, px: int) -> np.ndarray:
    """(N, px, px, 3) uint8."""
    coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    scene = np.asarray(coarse.resize((px, px), Image.Resampling.BICUBIC)).astype(int)
    scene = np.clip(scene + random.integers(-6, 7, scene.shape), 0, 255).astype(np.uint8)
    pictures = np.repeat(scene[None], num_frames, axis=0)
    side = px // 5
    for _ in range(3):
        colour, places = random.integers(0, 256, 3), random.integers(0, px - side, (2, 2))
        for k in range(num_frames):
            row, column = places[0] + (places[1] - places[0]) * k // num_frames
            pictures[k, row : row + side, column : column + side] = colour
    return pictures


def decode_all(path: Path) -> np.ndarray:
    with av.open(str(path)) as video:
        return np.stack([picture.to_ndarray(format="rgb24") for picture in video.decode(video=0)])


def write_hdf5(path: Path, pictures: Mapping[str, np.ndarray], *, compressed: bool) -> None:
    """One task's file of episodes of `EPISODE_FRAMES`; gzip as our recorder's, or none as LIBERO's."""
    path.parent.mkdir(exist_ok=True)
    random = np.random.default_rng(1)
    num_frames = len(pictures[CAMERAS[0]])
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["observation_timing"] = "before_action"
        for place, first in enumerate(range(0, num_frames, EPISODE_FRAMES)):
            demo, rows = data.create_group(f"demo_{place}"), slice(first, first + EPISODE_FRAMES)
            length = len(range(num_frames)[rows])
            demo.attrs["num_samples"] = length
            demo["actions"] = random.uniform(-1, 1, (length, 7))
            for name, width in (("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2)):
                demo[f"obs/{name}"] = random.normal(size=(length, width))
            for camera in CAMERAS:
                frames = pictures[camera][rows]
                chunks = {"chunks": (min(16, length), *frames.shape[1:]), "compression": "gzip", "compression_opts": 1}
                demo.create_dataset(f"obs/{camera}_rgb", data=frames, **(chunks if compressed else {}))


if __name__ == "__main__":
    main()
