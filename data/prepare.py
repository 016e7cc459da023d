"""``vlatune prepare DEMOS --out CACHE``: demonstrations in, cache out (`cache.py` has the layout).

Torch, pandas and pyarrow are imported where the work begins: `--help` answers at once.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tqdm import tqdm

from .episodes import DataError, EpisodeSource
from .files import full_disk_said
from .images import ImageRule, Orientation, Padding, Resize
from .noops import without_noops
from .robots import robot_named
from .sources.libero_hdf5 import LiberoHdf5Source, ObservationTiming

if TYPE_CHECKING:
    from .cache_writer import CacheWriter


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Demonstrations -> a cache that training reads. Killed, it continues where it was."""

    demos: Annotated[Path, tyro.conf.Positional]
    """An HDF5 file in LIBERO's format, or a folder with some (searched recursively); or the folder of a LeRobot dataset, or its name
    on the Hugging Face hub."""
    out: Path
    """The cache to make. An equal one that is there is left as it is; a different one is refused."""
    image_px: int = 64
    """Side of the square images, in pixels."""
    orientation: Orientation = "rot180"
    """How stored images are turned: rot180 (as openpi and OpenVLA train on LIBERO), flipud or raw."""
    background: tuple[int, int, int] = (0, 0, 0)
    """Colour (red, green, blue) that pads images that are not square."""
    padding: Padding = "centre"
    """Where the padding goes: around the middle, or left_top (as SmolVLA was trained)."""
    resize: Resize = "pil_bilinear"
    """How images change their size: pil_bilinear (openpi), pil_bicubic (SigLIP's own, so RDT) or torch_bilinear (LeRobot)."""
    validation_share: float = 0.1
    """Share of each task's episodes kept out of training (at least one where a task has two)."""
    tokenizer: str = "trained"
    """`trained` (sentencepiece, on these instructions), the name or folder of a public one, a sentencepiece file, or the language folder of another cache
    or a checkpoint: a policy that is trained further must read its own tokens."""
    encoder: str = "seeded-t5"
    """Text encoder whose output is stored per instruction: `seeded-t5` (small, random, recorded), `none`, or the name or
    folder of a T5 (with its own tokenizer)."""
    robot: str = "libero_panda"
    """What the state is made of: libero_panda (end effector and fingers, as openpi and OpenVLA read LIBERO), or another card of data/robots/."""
    drop_noops: bool = False
    """Leave out the moments in which nothing moves, by OpenVLA's rule (data/noops.py)."""
    camera: Mapping[str, str] = field(default_factory=dict)
    """LeRobot: the robot's cameras and their keys in the dataset, `agentview observation.images.front`, where their names do not tell."""
    stored_orientation: Orientation | Literal["auto"] = "auto"
    """LeRobot: how its pictures had been turned when they were stored, which is undone; `auto` is rot180 for LIBERO's robots, as all
    published conversions of LIBERO have it, and raw for others."""
    observation_timing: ObservationTiming = "auto"
    """HDF5: whether the files recorded observations before or after their actions; `auto` asks the files."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}; it must be at least 0 and less than 1")

    @property
    def image_rule(self) -> ImageRule:
        return ImageRule(
            orientation=self.orientation,
            size_px=self.image_px,
            background=self.background,
            padding=self.padding,
            resize=self.resize,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """All that shapes the cache besides the demonstrations, as JSON."""
        return {
            "image_px": self.image_px,
            "orientation": self.orientation,
            "background": list(self.background),
            "padding": self.padding,
            "resize": self.resize,
            "validation_share": self.validation_share,
            "tokenizer": self.tokenizer,
            "encoder": self.encoder,
            "robot": self.robot,
            "drop_noops": self.drop_noops,
            "camera": dict(self.camera),
            "stored_orientation": self.stored_orientation,
            "observation_timing": self.observation_timing,
        }


def open_source(config: PrepareConfig) -> EpisodeSource:
    """The demonstrations, whichever format they are in. Raises `DataError` when they cannot be opened, `ValueError` for a robot
    that there is not."""
    from .sources.lerobot_dataset import LeRobotDatasetSource
    from .sources.lerobot_hub import is_lerobot

    robot = robot_named(config.robot)
    if not is_lerobot(config.demos):
        return LiberoHdf5Source(config.demos, robot=robot, observation_timing=config.observation_timing)
    stored: Orientation = "rot180" if config.robot.startswith("libero") else "raw"
    if config.stored_orientation != "auto":
        stored = config.stored_orientation
    return LeRobotDatasetSource(
        config.demos, robot=robot, cameras=dict(config.camera) or None, stored_orientation=stored
    )


def prepare(config: PrepareConfig, source: EpisodeSource | None = None) -> Path:
    """Make the cache, or leave an equal one as it is; returns its path. Raises `DataError` in one sentence.

    `source` stands in for what is at `config.demos`: demonstrations in a format of your own."""
    from .cache_writer import CacheWriter
    from .language import Language, check_available

    image_rule = config.image_rule
    source = open_source(config) if source is None else source
    fingerprint = source.fingerprint()
    settings = {**config.settings, "robot": source.robot.name}
    if config.out.exists():
        _check_equal(config, source, settings)
        return config.out
    check_available(config.tokenizer, config.encoder)
    with (
        full_disk_said(config.out),
        CacheWriter(
            config.out,
            source=fingerprint,
            settings=settings,
            robot=source.robot,
            image_rule=image_rule,
        ) as writer,
    ):
        _append_episodes(source, writer, drop_noops=config.drop_noops)
        episodes = writer.written
        splits = split_episodes([e.task for e in episodes], [e.source for e in episodes], config.validation_share)
        writer.finish(splits, Language.build([e.instruction for e in episodes], config.tokenizer, config.encoder))
    return config.out


def split_episodes(tasks: Sequence[str], keys: Sequence[str], validation_share: float) -> list[str]:
    """ "train" or "validation" for each episode: per task, the share whose keys hash lowest. Depends on nothing else."""
    splits = ["train"] * len(keys)
    for task in sorted(set(tasks)):
        of_task = [k for k, its_task in enumerate(tasks) if its_task == task]
        of_task.sort(key=lambda k: hashlib.sha256(keys[k].encode()).digest())
        wanted = max(round(validation_share * len(of_task)), 1 if validation_share > 0 else 0)
        for k in of_task[: min(wanted, len(of_task) - 1)]:
            splits[k] = "validation"
    return splits


def _append_episodes(source: EpisodeSource, writer: "CacheWriter", *, drop_noops: bool) -> None:
    keys = source.keys()
    done = len(writer.written)
    if [episode.source for episode in writer.written] != list(keys[:done]):
        raise DataError("the unfinished cache has other episodes than the demonstrations; delete it and run this again")
    with tqdm(keys, desc="prepare", unit="episode", initial=done, total=len(keys)) as progress:
        num_frames = 0
        for key in keys[done:]:
            episode = source.read(key)
            if drop_noops:
                episode = without_noops(episode, source.robot.gripper_action)
            writer.append(episode)
            num_frames += len(episode.actions_NA)
            progress.set_postfix_str(f"{num_frames} frames", refresh=False)
            progress.update()


def _check_equal(config: PrepareConfig, source: EpisodeSource, settings: Mapping[str, Any]) -> None:
    """Refuse what is at `config.out` unless it is the cache that would be made."""
    from .cache import Cache, read_manifest, unfinished_path
    from .cache_writer import differences

    if not (config.out / "manifest.json").is_file():
        raise DataError(f"{config.out} is there already and is not a cache; give another --out")
    manifest = read_manifest(config.out)
    changes = differences(manifest.source, manifest.settings, source.fingerprint(), settings)
    if changes:
        raise DataError(
            f"the cache {config.out} was made from something else ({changes}); delete it (rm -r {config.out}) or give another "
            "--out"
        )
    Cache.open(config.out)  # sizes
    shutil.rmtree(unfinished_path(config.out), ignore_errors=True)  # a kill between renaming and cleaning up


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(PrepareConfig, args=argv, prog="vlatune prepare")
    from .cache import Cache

    there = config.out.exists()
    try:
        cache = Cache.open(prepare(config))
    except (DataError, ValueError) as error:
        raise SystemExit(f"vlatune prepare: {error}") from None
    manifest = cache.manifest
    print(
        f"{'left as it is' if there else 'made'}: {config.out}: {manifest.num_frames} frames, {manifest.num_episodes} episodes "
        f"({manifest.num_validation_episodes} for validation), {manifest.num_tasks} tasks"
    )


if __name__ == "__main__":
    main()
