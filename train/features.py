"""``vlatune features CACHE --out FEATURES --checkpoint CHECKPOINT``: what a frozen vision tower makes of every picture of a cache.

Training reads it with `--vision-features` and never runs the tower. It is large: the size is printed before anything is computed.

Torch and transformers are imported where the work begins: `--help` answers at once.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tqdm import tqdm

from ..data.episodes import DataError
from ..data.files import full_disk_said

if TYPE_CHECKING:
    import torch

    from ..data.cache import Cache
    from ..data.vision_features import FeaturesPlan
    from ..policy.policy import Policy


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Pictures of a cache -> features of a frozen vision tower, for `vlatune train --vision-features`. Killed, it continues where it was."""

    cache: Annotated[Path, tyro.conf.Positional]
    """What `vlatune prepare` wrote; it is only read."""
    out: Path
    """The folder to make. An equal one that is there is left as it is; a different one is refused."""
    checkpoint: Path
    """The policy whose tower it is: a checkpoint of ours, as RUN/checkpoints/step_000000 or what `vlatune convert --to vlatune` made of a
    public one. Train with the same tower, for instance with --pretrained and this checkpoint."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the tower and its features, the same as in training; auto is bf16 on a GPU and fp32 on a CPU. (Training with bf16 and engine
    plain keeps weights in float32: give fp32.)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the tower runs; auto is CUDA where there is one."""
    batch_size: int = 64
    """Frames that go through the tower together."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")


def make_features(config: FeaturesConfig) -> Path:
    """Make the store, or leave an equal one as it is; returns its path. Raises `DataError` or `ValueError` in one sentence."""
    from ..data.cache import Cache, unfinished_path
    from ..data.text_encoder import encoder_device
    from ..data.vision_features import FeatureStore
    from ..data.vision_features_writer import FeatureWriter
    from ..policy.checkpoints.folder import read_policy

    cache = Cache.open(config.cache)
    policy, _, _ = read_policy(config.checkpoint)
    cache_px, policy_px = cache.image_rule.size_px, policy.config.backbone.image_px
    if cache_px != policy_px:
        raise DataError(
            f"the vision tower of {config.checkpoint} reads {policy_px}-pixel images, and those of {cache.path} have {cache_px}; prepare with "
            f"--image-px {policy_px}"
        )
    device = encoder_device(config.device)
    plan = _plan(config, cache, policy, device)
    _check_room(config.out, plan)
    if config.out.exists():
        changes = FeatureStore.open(config.out, cache).plan.differences(plan)
        if changes:
            raise DataError(
                f"the vision features {config.out} were made from something else ({changes}); delete them (rm -r {config.out}) or give another "
                "--out"
            )
        shutil.rmtree(unfinished_path(config.out), ignore_errors=True)  # a kill between renaming and cleaning up
        return config.out
    with full_disk_said(config.out), FeatureWriter(config.out, plan) as writer:
        progress = tqdm(desc="features", unit="frame", total=plan.num_frames, initial=writer.num_done, disable=None)
        with progress:
            while writer.num_done < plan.num_frames:
                frames = slice(writer.num_done, writer.num_done + config.batch_size)
                writer.append({camera: _features(policy, cache, camera, frames, device) for camera in plan.cameras})
                progress.update(writer.num_done - progress.n)
        writer.finish()
    return config.out


def _plan(config: FeaturesConfig, cache: "Cache", policy: "Policy", device: "torch.device") -> "FeaturesPlan":
    """Brings the policy to the device, in the store's precision."""
    from ..data.vision_features import DTYPES, FeaturesPlan
    from .config import TrainConfig
    from .engine import resolve_precision
    from .frozen_vision import tower_identity

    of_training = TrainConfig(cache=config.cache, out=config.out, precision=config.precision)
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if resolve_precision(of_training) == "bf16" else "float32"
    policy.eval().requires_grad_(False).to(device, DTYPES[dtype])
    shape_1ND = _features(policy, cache, cache.manifest.cameras[0], slice(0, 1), device).shape
    return FeaturesPlan(
        cache_digest=cache.digest,
        num_frames=cache.num_frames,
        cameras=cache.manifest.cameras,
        tower=tower_identity(policy, DTYPES[dtype]),
        dtype=dtype,
        shape=(shape_1ND[1], shape_1ND[2]),
    )


def _features(policy: "Policy", cache: "Cache", camera: str, frames: slice, device: "torch.device") -> "torch.Tensor":
    """(frames, N, D)."""
    import torch

    with torch.no_grad():
        images = torch.from_numpy(cache.images[camera][frames].copy()).to(device)
        features_MND: torch.Tensor = policy.backbone.picture_features(images)
    return features_MND


def _check_room(out: Path, plan: "FeaturesPlan") -> None:
    """Print the size, and raise `DataError` if the disk has less than is still to be written."""
    from ..data.cache import unfinished_path
    from ..data.vision_features import in_gb

    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    print(f"{plan.size_text}; free on that disk: {in_gb(free)}", flush=True)
    there = sum(file.stat().st_size for folder in (out, unfinished_path(out)) for file in folder.rglob("*.bin"))
    if plan.size_bytes - there > free:
        raise DataError(
            f"the vision features take {in_gb(plan.size_bytes)} and the disk of {out} has {in_gb(free)} free; give --out on a larger disk, or "
            "train on pictures"
        )


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(FeaturesConfig, args=argv, prog="vlatune features")
    there = config.out.exists()
    make_features(config)
    print(f"{'left as it is' if there else 'made'}: {config.out}; train with --vision-features {config.out}")
