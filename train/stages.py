"""Where a run goes on, and with which weights: the first stage's come from elsewhere, a later stage's from the one before."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..data.episodes import DataError
from ..policy.backbones.paligemma import PaliGemmaConfig
from ..policy.backbones.smolvlm import SmolVLMConfig
from ..policy.checkpoints.folder import read_policy
from ..policy.checkpoints.layout import checkpoint_name
from ..policy.checkpoints.pretrained import load_pretrained
from ..policy.policy import Policy
from .calibration import calibrate
from .checkpoint import resumable_checkpoints
from .config import PlannedStage, TrainConfig
from .engine import rank
from .frozen_vision import load_tower, refuse_other_tower, refuse_trained_tower
from .trainable import set_trained
from .training_data import TrainingData


def stage_at(stages: Sequence[PlannedStage], step: int) -> int:
    """The stage that takes optimizer step `step`; at a boundary the one that begins there, at the very end the last."""
    for index, planned in enumerate(stages):
        if step < planned.last_step:
            return index
    return len(stages) - 1


def stage_policy(config: TrainConfig, planned: PlannedStage, data: TrainingData, *, filled: bool) -> Policy:
    """The policy that a stage trains, its parameters frozen and adapted as the stage says. Not `filled`, it awaits trainer
    state. Raises DataError or ValueError where weights do not fit, or vision features cannot stand in for pictures."""
    if data.features is not None:
        refuse_trained_tower(config.stages, lambda each: _new_policy(each, data))
    policy = _new_policy(planned, data)
    start = config.out / "checkpoints" / checkpoint_name(planned.first_step)
    if filled and planned.first_step > 0:
        _continue_from(policy, start)
    elif filled and config.pretrained:
        taken, untouched = load_pretrained(policy, config.pretrained, data.kept_ids)
        if rank() == 0:
            for source in taken:
                print(f"{source.source}: {source.num_tensors} tensors of {', '.join(source.parts)}")
            if untouched:
                print(f"random weights: {', '.join(untouched)}")
    if filled and planned.first_step == 0:
        calibrate(policy, data)
    set_trained(policy, planned.stage.trained, planned.stage.lora)
    if data.features is not None:
        if not filled:
            load_tower(policy, [resumable_checkpoints(config.out)[-1][1], start])
        refuse_other_tower(policy, data.features, config)
    return policy


def _new_policy(planned: PlannedStage, data: TrainingData) -> Policy:
    policy_config = planned.policy
    backbone = policy_config.backbone
    if data.kept_ids is not None and isinstance(backbone, PaliGemmaConfig | SmolVLMConfig):
        # The table is as large as the compact tokenizer, whatever the public model's is.
        policy_config = replace(policy_config, backbone=replace(backbone, vocab_size=None))
    return Policy(policy_config, data.embodiment, data.statistics)


def _continue_from(policy: Policy, checkpoint: Path) -> None:
    """Only what the new objective adds may be missing there: the embedding of a second time input."""
    before, _, _ = read_policy(checkpoint)
    missing, unexpected = policy.load_state_dict(before.state_dict(), strict=False)
    strange = [name for name in (*missing, *unexpected) if "second_level_embedding" not in name]
    if strange:
        raise DataError(f"{checkpoint} does not fit the next stage's policy: {', '.join(strange[:3])}")
