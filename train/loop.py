"""The training loop: one stage of a run, from its first step or a resumed one to its last."""

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.augment import augment
from ..data.batch import Batch
from ..data.condition_dropout import harden
from ..policy.objectives.draws import DrawKeys
from ..policy.policy import Policy
from .blocks import transform_blocks
from .checkpoint import load_trainer_state, save_checkpoint
from .config import PlannedStage, TrainConfig
from .ema import Ema
from .engine import clip_gradients, mean_over_ranks, prepare, resolve_precision
from .finite import FiniteGuard
from .hub import HubPush
from .optim import learning_rate_at, make_optimizer
from .speed import Speed
from .tracking import Tracker
from .training_data import TrainingData
from .validation import validate


def train_stage(
    accelerator: Accelerator,
    policy: Policy,
    planned: PlannedStage,
    config: TrainConfig,
    data: TrainingData,
    tracker: Tracker | None,
    interruption: "Interruption",
    step: int,
    *,
    trainer_state: Path | None,
    hub: HubPush | None = None,
) -> int:
    """Train `policy` from optimizer step `step` of the run; returns the last finished one: the stage's last, or where somebody
    asked to stop. All ranks call it. `trainer_state` is the checkpoint to go on from."""
    stage = planned.stage
    transform_blocks(policy, config.activation_checkpointing, compiled=config.compile)
    model, optimizer = prepare(accelerator, policy, make_optimizer(policy, stage.optimizer), stage.optimizer)
    ema = Ema(model, config.ema) if config.ema.decay else None
    last_step = min(planned.last_step, config.stop_at_step or planned.last_step)
    is_final_stage = planned.last_step == config.total_steps

    def save(finished: int) -> None:
        is_whole = stage.trained == "full" or finished == 0 or (finished == planned.last_step and not is_final_stage)
        save_checkpoint(
            accelerator,
            model,
            ema,
            config.out,
            finished,
            language=data.language_path,
            provenance={"cache_digest": data.digest},
            num_trainer_states=config.num_trainer_states,
            base_step=None if is_whole else planned.first_step,
        )
        if hub is not None:
            hub.push(finished)

    if trainer_state is not None:
        load_trainer_state(accelerator, ema, trainer_state)
    elif step == 0:
        save(0)
    accelerator.print(
        f"{sum(p.numel() for p in policy.parameters() if p.requires_grad):,} of "
        f"{sum(p.numel() for p in policy.parameters()):,} parameters trained ({stage.trained}), "
        f"{data.loader.num_samples:,} samples; steps {step} to {last_step}, {config.batch_size} samples each, on "
        f"{accelerator.num_processes} x {accelerator.device.type}, {resolve_precision(config)}, engine {config.engine}"
    )

    batches = timed(data.batches(step, accelerator.device))
    window, guard = Window(accelerator), FiniteGuard(accelerator)
    speed: Speed | None = None
    while step < last_step:
        rate = learning_rate_at(step - planned.first_step, stage.num_steps, stage.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        micro_batches = [next(batches) for _ in range(config.num_accumulation_steps)]
        shares = shares_of_step(accelerator, [batch for batch, _ in micro_batches], planned)
        for (batch, waited_s), share in zip(micro_batches, shares, strict=True):
            with accelerator.accumulate(model):
                keys = DrawKeys(seed=config.seed, step=step, sample_index_B=batch.sample_index_B)
                unreduced = model(seen_in_training(batch, keys, config, accelerator, policy, data), keys)
                loss = mean_over_ranks(accelerator, unreduced) * share
                accelerator.backward(loss)
                grad_norm = clip_gradients(accelerator, model, config.engine, stage.optimizer)
                optimizer.step()
                optimizer.zero_grad()
            window.add(loss, waited_s, unreduced.metrics)
            guard.add(step, loss, batch)
        guard.add_norm(step, grad_norm)
        if ema is not None:
            ema.update()
        step += 1
        if tracker is not None:
            tracker.advance()
        is_due = step % config.log_every == 0 or step % config.validate_every == 0
        is_saved = step % config.checkpoint_every == 0 or step == last_step
        if not (is_due or is_saved):
            continue
        guard.check(config.out)  # before anything is written
        if interruption.agreed(accelerator):
            last_step, is_saved = step, True
        values = window.values(config.batch_size / config.num_accumulation_steps)
        values |= {"grad_norm": float(grad_norm), "learning_rate": rate}
        if tracker is not None:
            speed = speed or Speed(accelerator, policy, batch)
            values |= speed.values(values["samples_per_s"])
        if data.validation is not None and (step % config.validate_every == 0 or step == planned.last_step):
            values |= validate(accelerator, model, data.validation, config, data.action_names)
        if tracker is not None:
            tracker.log(step, values)
        if is_saved:
            save(step)
    return step


class Interruption:
    """SIGTERM and SIGUSR1, with which clusters announce that a machine will be taken away: heard by one rank, obeyed by all."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._hear)

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True  # nothing else: the process may be anywhere

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any rank was asked to stop. All ranks call this at the same step."""
        asked = torch.tensor(float(self.asked), device=accelerator.device)
        self.asked = bool(accelerator.reduce(asked, reduction="sum") > 0)
        return self.asked


def seen_in_training(
    batch: Batch, keys: DrawKeys, config: TrainConfig, accelerator: Accelerator, policy: Policy, data: TrainingData
) -> Batch:
    """On the device, with the pictures changed and conditions hidden as the config asks."""
    batch = batch.to(accelerator.device)
    observation = augment(
        batch.observation,
        config.augment,
        seed=keys.seed,
        step=keys.step,
        sample_index_B=keys.sample_index_B,
        background=policy.embodiment.image_rule.background,
    )
    observation = harden(
        observation,
        config.conditions,
        state=data.statistics.state,
        empty_text=data.empty_text,
        seed=keys.seed,
        step=keys.step,
        sample_index_B=keys.sample_index_B,
    )
    return replace(batch, observation=observation)


def shares_of_step(accelerator: Accelerator, micro_batches: Sequence[Batch], planned: PlannedStage) -> Sequence[Tensor]:
    """What each micro-batch's mean counts in the step's, 1 on average: a batch with fewer valid chunk steps counts less, so that the
    step is that of one big batch. (RS-IMLE rejects samples beside that; there each micro-batch is a mean over its own survivors.)"""
    if len(micro_batches) == 1 or planned.policy.train_padded_steps:
        return [torch.ones((), device=accelerator.device)] * len(micro_batches)
    counts = torch.stack([batch.valid_BH.sum() for batch in micro_batches]).float().to(accelerator.device)
    counts = accelerator.reduce(counts, reduction="sum")
    return list(counts / counts.mean())


def timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch and how long the loop waited for it, in seconds."""
    while True:
        asked = time.perf_counter()
        batch = next(batches)
        yield batch, time.perf_counter() - asked


class Window:
    """Sums since the last row of metrics.csv; loss and the objective's metrics stay on the device until they are read."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._restart()

    def _restart(self) -> None:
        self.loss = torch.zeros((), device=self.accelerator.device)
        self.metrics: dict[str, Tensor] = {}
        self.count = 0
        self.waited_s = 0.0
        self.start = time.perf_counter()

    def add(self, loss: Tensor, waited_s: float, metrics: Mapping[str, Tensor]) -> None:
        self.loss += loss.detach()
        for name, value in metrics.items():
            self.metrics[name] = self.metrics.get(name, 0) + value
        self.count += 1
        self.waited_s += waited_s

    def values(self, samples_per_batch: float) -> dict[str, float]:
        elapsed_s = time.perf_counter() - self.start
        values = {
            "loss": float(self.accelerator.reduce(self.loss, reduction="mean")) / self.count,
            "samples_per_s": self.count * samples_per_batch / elapsed_s,
            "data_wait_share": self.waited_s / elapsed_s,
        }
        for name, total in sorted(self.metrics.items()):  # in one order on every rank
            values[name] = float(self.accelerator.reduce(total, reduction="mean")) / self.count
        self._restart()
        return values
