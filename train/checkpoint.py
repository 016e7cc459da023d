"""Checkpoints of a run: written whole or not at all, and the newest one resumed from."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data.episodes import DataError
from ..policy.checkpoints.folder import write_policy, write_weights
from ..policy.checkpoints.layout import COMPLETE, checkpoint_name, complete_checkpoints
from ..policy.policy import Policy
from .config import TrainConfig
from .ema import Ema
from .engine import is_zero3

DISCARDED = "trainer.discarded"
"""A checkpoint's trainer state while it is deleted."""

FREE_TO_CHANGE = {
    "activation_checkpointing",
    "out",
    "cache",
    "more_caches",
    "language",
    "vision_features",
    "more_vision_features",
    "stop_at_step",
    "checkpoint_every",
    "num_trainer_states",
    "log_every",
    "validate_every",
    "num_validation_batches",
    "hub",
    "wandb",
}
"""Fields that do not alter what a run computes; caches are compared by their content instead of their path."""


def save_checkpoint(
    accelerator: Accelerator,
    model: torch.nn.Module,
    ema: Ema | None,
    run: Path,
    step: int,
    *,
    language: Path,
    provenance: Mapping[str, Any],
    num_trainer_states: int,
    base_step: int | None,
) -> None:
    """All ranks call this. The folder appears under its name only when its last file is written.

    With a `base_step` what is frozen is left out and referred to there; None: everything is written, adapters merged."""
    final = run / "checkpoints" / checkpoint_name(step)
    temporary = final.with_name(f".{final.name}.partial")
    if accelerator.is_main_process:
        for unfinished in final.parent.glob(".*.partial"):  # what a kill left behind
            shutil.rmtree(unfinished)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary / "trainer"))
    accelerator.wait_for_everyone()
    if ema is not None:
        ema.save(temporary / "trainer", accelerator.process_index)
    policy = accelerator.unwrap_model(model)
    assert isinstance(policy, Policy)
    # Under ZeRO-3 all ranks gather it; elsewhere every rank has it whole, and Accelerate would copy it once more on each.
    weights = accelerator.get_state_dict(model) if is_zero3(accelerator) else policy.state_dict()
    if accelerator.is_main_process:
        base = None if base_step is None else final.with_name(checkpoint_name(base_step)) / "model.safetensors"
        write_policy(temporary, policy, weights, language, {**provenance, "step": step}, base=base)
    if ema is not None:
        with ema.in_place_of_weights():
            if accelerator.is_main_process:
                write_weights(temporary, policy, policy.state_dict(), whole=base_step is None, averaged=True)
            accelerator.wait_for_everyone()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / COMPLETE).write_text(f"step {step}\n")
        _flush_to_disk(temporary)
        (final / COMPLETE).unlink(missing_ok=True)  # first: half of it must not look whole
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for _, older in resumable_checkpoints(run)[:-num_trainer_states]:
            (older / "trainer").rename(older / DISCARDED)  # at once: half of it is never resumed from
        for discarded in final.parent.glob(f"*/{DISCARDED}"):
            shutil.rmtree(discarded)
    accelerator.wait_for_everyone()


def load_trainer_state(accelerator: Accelerator, ema: Ema | None, checkpoint: Path) -> None:
    """What `save_checkpoint` wrote on as many ranks; all ranks call this."""
    accelerator.load_state(str(checkpoint / "trainer"))
    if ema is not None:
        ema.load(checkpoint / "trainer", accelerator.process_index)


def _flush_to_disk(folder: Path) -> None:
    """So that after a power cut the new name never stands before unwritten content."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def resumable_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints that still have trainer state, oldest first."""
    return [(step, path) for step, path in complete_checkpoints(run).items() if (path / "trainer").is_dir()]


def store_config(run: Path, config: Mapping[str, Any]) -> None:
    """Write the resolved config of a new run; an existing one stays as it is."""
    path = run / "config.json"
    if path.exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(config, indent=1) + "\n")
    temporary.replace(path)


def refuse_other_settings(run: Path, config: Mapping[str, Any]) -> None:
    """Raises DataError, naming what differs, if `run` holds a run that computes something else."""
    path = run / "config.json"
    if not path.exists():
        return
    # What the run's version of vlatune had no setting for, it did as the default says.
    old = {name: value for name, value in _defaults().items() if name in config} | json.loads(path.read_text())
    differing = _differences(old, json.loads(json.dumps(config)), "")
    if differing:
        raise DataError(
            f"{run} holds a run with other settings: {'; '.join(differing[:3])}. "
            "Type --out with a new folder, or the old values to resume"
        )


def _defaults() -> dict[str, Any]:
    """Of `TrainConfig`'s own settings, as config.json has them."""
    defaults: dict[str, Any] = {}
    for field in fields(TrainConfig):
        if field.default is not MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not MISSING:
            value = field.default_factory()
            defaults[field.name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    found: dict[str, Any] = json.loads(json.dumps(defaults, default=str))
    return found


def _differences(old: Any, new: Any, name: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if not (name == "" and key in FREE_TO_CHANGE)]
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    return [] if old == new else [f"{name} was {old!r}, now {new!r}"]
