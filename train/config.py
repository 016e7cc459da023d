"""What a training run is: one frozen value, resolved and stored in the run's folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..policy.config import PolicyConfig
from ..policy.lora import LoraConfig
from .trainable import Trained


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW with linear warm-up and cosine decay; all counted in optimizer steps."""

    learning_rate: float = 5e-5
    """Peak."""
    final_learning_rate: float = 0.0
    """At the last step. A rate that never falls leaves a policy that hovers and never commits."""
    num_warmup_steps: int = 1000
    """Linear, from zero to the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the gradient's running mean and square."""
    weight_decay: float = 1e-4
    """On matrices; norms, biases and embeddings are not decayed."""
    gradient_clip_norm: float = 1.0
    """Longest gradient, over all parameters; longer ones are scaled down to it."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    cache: Path
    """What `vlatune prepare` wrote."""
    out: Path
    """The run's folder; a run found there is resumed."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    pretrained: tuple[str, ...] = ()
    """Folders or hub names that the first weights come from: checkpoints of ours, π0, π0.5, SmolVLA or RDT-1B, plain PaliGemma,
    SmolVLM, SigLIP or CLIP; a later one overrides an earlier one. What none of them has starts from random weights, and is named."""
    trained: Trained = "full"
    """What is trained: everything, all but the vision tower, the expert alone, or adapters (LoRA) alone."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Where `trained` is lora: which projections, and how."""
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    num_steps: int = 30_000
    """Optimizer steps."""
    stop_at_step: int | None = None
    """Save and stop here, with the schedule still laid out for num_steps; start again to go on."""
    batch_size: int = 32
    """Samples per optimizer step, over all ranks."""
    num_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    engine: Literal["zero2", "plain"] = "zero2"
    """DeepSpeed with ds_configs/zero2.json, or no DeepSpeed (one process, or DDP)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of weights and activations in training; auto is bf16 on a GPU and fp32 on a CPU. ZeRO's masters are float32 always."""
    checkpoint_every: int = 5000
    """Optimizer steps between checkpoints; the untrained policy and the last step are always saved."""
    num_trainer_states: int = 1
    """How many of the newest checkpoints keep the optimizer's state; evaluation weights are all kept."""
    validate_every: int = 1000
    """Optimizer steps between losses on the cache's validation episodes."""
    num_validation_batches: int = 8
    """Batches that a validation loss is the mean of."""
    log_every: int = 10
    """Optimizer steps between rows of metrics.csv."""
    seed: int = 0
    """Of initial weights, sample order and noise."""

    def __post_init__(self) -> None:
        for name in (
            "num_steps",
            "batch_size",
            "num_accumulation_steps",
            "checkpoint_every",
            "validate_every",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def micro_batch_size(self, world_size: int) -> int:
        """Samples per rank and micro-batch. Raises ValueError if the batch does not divide."""
        parts = world_size * self.num_accumulation_steps
        if self.batch_size % parts:
            lower = self.batch_size - self.batch_size % parts
            raise ValueError(
                f"--batch-size {self.batch_size} does not divide into {world_size} ranks x {self.num_accumulation_steps} "
                f"accumulation steps; type --batch-size {lower + parts}" + (f" or {lower}" if lower else "")
            )
        return self.batch_size // parts
