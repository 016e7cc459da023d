"""May features stand in for a run's pictures? Only if no stage trains the vision tower, and it is the one that made them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..data.episodes import DataError
from ..data.vision_features import DTYPES, FeatureStore
from ..policy.checkpoints.folder import WEIGHTS, weights_digest
from ..policy.policy import Policy
from .config import PlannedStage, TrainConfig
from .engine import resolve_precision
from .trainable import set_trained

TOWER = "backbone.vision_tower."


def tower_identity(policy: Policy, dtype: torch.dtype) -> dict[str, Any]:
    """What a picture's features depend on, as JSON: the tower's sizes, what is read of it, and its weights rounded to `dtype`."""
    backbone: dict[str, Any] = asdict(policy.config.backbone)
    weights = {name: tensor.to(dtype) for name, tensor in tower_of(policy).state_dict().items()}
    kind = {name: value for name, value in backbone.items() if name in ("type", "vision", "features")}
    return {**kind, "weights": weights_digest(weights)}


def tower_of(policy: Policy) -> torch.nn.Module:
    tower: torch.nn.Module = policy.backbone.vision_tower
    return tower


def refuse_trained_tower(stages: Sequence[PlannedStage], build: Callable[[PlannedStage], Policy]) -> None:
    """Raises `ValueError`, naming the stage, if a stage trains the tower of the policy that `build` makes for it."""
    for number, planned in enumerate(stages, 1):
        stage = planned.stage
        with torch.device("meta"):  # no memory, no weights: only who is trained is asked
            policy = build(planned)
            set_trained(policy, stage.trained, stage.lora)
        if any(parameter.requires_grad for parameter in tower_of(policy).parameters()):
            raise ValueError(
                f"vision_features are of a vision tower that stays as it is, and stage {number} of the run trains it (trained "
                f"{stage.trained!r}); leave vision_features out, or choose trained 'vision_frozen' or 'expert'"
            )


def refuse_other_tower(policy: Policy, stores: Sequence[FeatureStore], config: TrainConfig) -> None:
    """Raises `DataError` unless the features are what this policy's tower would give in training."""
    # Without DeepSpeed weights stay in float32, and only products are rounded.
    dtype = "bfloat16" if resolve_precision(config) == "bf16" and config.engine != "plain" else "float32"
    tower = tower_identity(policy, DTYPES[dtype])
    for store in stores:
        if store.plan.dtype != dtype:
            raise DataError(
                f"the vision features {store.path} are {store.plan.dtype}, and this run's vision tower has {dtype} weights; make them again "
                f"with --precision {'bf16' if dtype == 'bfloat16' else 'fp32'}"
            )
        differing = [name for name, value in store.plan.tower.items() if tower.get(name) != value]
        if differing or tower.keys() != store.plan.tower.keys():
            raise DataError(
                f"the vision features {store.path} were made by another vision tower than this run's (other {', '.join(differing)}); make them "
                "again with --checkpoint and a checkpoint of this run, or train on pictures"
            )


def load_tower(policy: Policy, checkpoints: Sequence[Path]) -> None:
    """Fill the tower alone, from the first of the `checkpoints` that holds it: what a run keeps frozen is in an earlier one."""
    for folder in checkpoints:
        with safe_open(folder / WEIGHTS, "pt") as weights:
            names = [name for name in list(weights.keys()) if name.startswith(TOWER)]
            found = {name.removeprefix(TOWER): weights.get_tensor(name) for name in names}
        if found:
            tower_of(policy).load_state_dict(found)
            return
    raise DataError(f"no vision tower is in {', '.join(map(str, checkpoints))}; train on pictures")
