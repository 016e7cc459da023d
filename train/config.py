"""What a training run is: one frozen value, resolved and stored in the run's folder."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..data.augment import AugmentConfig
from ..data.condition_dropout import ConditionsConfig
from ..data.windows import STATELESS_STYLES
from ..policy.config import PolicyConfig
from ..policy.lora import LoraConfig
from ..policy.objectives import AnyObjective
from .blocks import Part
from .ema import EmaConfig
from .hub import HubConfig
from .trainable import Trained

Engine = Literal["zero1", "zero2", "zero2_offload", "zero3", "plain"]


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
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    """Modules that learn at another pace, by their path in the policy: `backbone 0.1 backbone.vision_tower 0.01`. The longest path
    that fits a parameter counts; all others have factor 1."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of a run: what is trained, towards which objective, on which schedule."""

    num_steps: int
    """Optimizer steps."""
    trained: Trained = "full"
    """What is trained: everything, all but the vision tower, the expert alone, adapters (LoRA) alone, or adapters and the expert."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Where adapters are trained: on which projections, and how."""
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    """Its own schedule; Adam's running means start afresh."""
    objective: AnyObjective | None = None
    """None: the one of the stage before."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """A stage and its place in the run."""

    stage: Stage
    policy: PolicyConfig
    """With the stage's objective."""
    first_step: int
    """Optimizer steps of the run before it."""

    @property
    def last_step(self) -> int:
        return self.first_step + self.stage.num_steps


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointingConfig:
    """Blocks that forget what they computed in the forward pass and compute it again in the backward pass: about a third more work
    for a fraction of the memory. The results are the same bit for bit."""

    parts: tuple[Part, ...] = ()
    """Whose blocks: the vision tower's, the language model's, the expert's; none: all activations are kept."""
    every: int = 1
    """Of their blocks, every so-manieth: 2 keeps the activations of every other block."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"activation_checkpointing.every is {self.every}; it must be at least 1 (every block)")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    cache: Path
    """What `vlatune prepare` wrote."""
    language: Path | None = None
    """What `vlatune embed` wrote of the cache's instructions, in place of the cache's own tokens and text features."""
    more_caches: tuple[Path, ...] = ()
    """Further caches of the same robot, cameras and tokenizer, mixed with the first."""
    cache_weights: tuple[float, ...] | None = None
    """How much of every batch comes from each cache, relative to the others, the first one first; none: by their samples."""
    vision_features: Path | None = None
    """What `vlatune features` wrote of the cache's pictures, read in their place; for a vision tower that is not trained, and
    without augmentation."""
    more_vision_features: tuple[Path, ...] = ()
    """The same of `more_caches`, one each."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes to training pictures, made on the device."""
    conditions: ConditionsConfig = field(default_factory=ConditionsConfig)
    """What training hides from the policy, and noise on its state."""
    out: Path
    """The run's folder; a run found there is resumed."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    pretrained: tuple[str, ...] = ()
    """Folders or hub names that the first weights come from: checkpoints of ours, π0, π0.5, SmolVLA or RDT-1B, plain PaliGemma,
    SmolVLM, SigLIP or CLIP; a later one overrides an earlier one. What none of them has starts from random weights, and is named."""
    trained: Trained = "full"
    """What is trained: everything, all but the vision tower, the expert alone, adapters (LoRA) alone, or adapters and the expert."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Where adapters are trained: on which projections, and how."""
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    num_steps: int = 30_000
    """Optimizer steps of the run's first stage; of the whole run where it has no other."""
    then: tuple[Stage, ...] = ()
    """Further stages, each on the weights that the one before ended with."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """An average of the weights, kept beside them and saved with every checkpoint. Starts afresh in every stage."""
    stop_at_step: int | None = None
    """Save and stop here, with the schedule still laid out for num_steps; start again to go on."""
    batch_size: int = 32
    """Samples per optimizer step, over all ranks."""
    num_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    engine: Engine = "zero2"
    """DeepSpeed with ds_configs/<engine>.json, or plain: no DeepSpeed (one process, or DDP)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of weights and activations in training; auto is bf16 on a GPU and fp32 on a CPU. ZeRO's masters are float32 always."""
    activation_checkpointing: ActivationCheckpointingConfig = field(default_factory=ActivationCheckpointingConfig)
    compile: bool = False
    """Compile the blocks of towers, language model and expert, each kind once, with torch.compile; the first steps take minutes longer."""
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
    wandb: str | None = None
    """Project of Weights & Biases that gets TensorBoard's numbers, too; none: no project."""
    hub: HubConfig = field(default_factory=HubConfig)
    """Where checkpoints are pushed to while the run goes on."""
    overfit_batches: int | None = None
    """Train on the first so many batches over and over: the first thing to try on new data. The loss must go to nearly nothing, and
    what is otherwise measured on validation episodes is measured on these batches."""
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
        if self.overfit_batches is not None and self.overfit_batches < 1:
            raise ValueError(f"overfit_batches is {self.overfit_batches}; it must be at least 1, or left out")
        if self.vision_features is None and self.more_vision_features:
            raise ValueError(
                "more_vision_features is given and vision_features is not; give the first cache's, too, or neither"
            )
        if self.vision_features is not None and not self.augment.is_off:
            raise ValueError(
                "vision_features stand in for pictures, which augmentation would change at every step; leave vision_features out, or switch "
                "all of augment off"
            )
        if self.conditions.dropout and not self.policy.backbone.reads_embeddings:
            raise ValueError(
                f"conditions.dropout is {self.conditions.dropout}, and the backbone {self.policy.backbone.type!r} reads token ids, while a "
                "hidden instruction is the text features of the empty text, which RDT reads; set it to 0"
            )
        if self.conditions.state_noise_db is not None and self.policy.prompt not in STATELESS_STYLES:
            raise ValueError(
                f"conditions.state_noise_db is {self.conditions.state_noise_db}, and policy.prompt {self.policy.prompt!r} spells the state out "
                "in words, which would have no noise; leave it out"
            )
        if self.ema.decay and self.engine == "zero3":
            raise ValueError(
                "ema.decay is not 0, and the average is not kept under ZeRO-3; choose engine zero2, or ema.decay 0"
            )

    @property
    def stages(self) -> tuple[PlannedStage, ...]:
        """All of the run, in order."""
        first = Stage(num_steps=self.num_steps, trained=self.trained, lora=self.lora, optimizer=self.optimizer)
        planned: list[PlannedStage] = []
        policy, step = self.policy, 0
        for stage in (first, *self.then):
            policy = policy if stage.objective is None else replace(policy, objective=stage.objective)
            planned.append(PlannedStage(stage=stage, policy=policy, first_step=step))
            step += stage.num_steps
        return tuple(planned)

    @property
    def total_steps(self) -> int:
        return self.stages[-1].last_step

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
