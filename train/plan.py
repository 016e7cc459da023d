"""``vlatune plan RECIPE --gpus 8 --memory-gb 80``: what a recipe needs on each GPU under every engine, what fits, and how long it takes.

Reads no data and needs no GPU. GB are 10^9 bytes."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Annotated, get_args

import pandas as pd
import torch
import tyro

from ..data.batch import Batch
from ..data.prompt import PromptStyle
from ..policy.policy import Policy
from .activation_memory import ActivationMemory, activation_memory
from .blocks import blocks_of, transform_blocks
from .config import ActivationCheckpointingConfig, Engine, PlannedStage, TrainConfig
from .cost import (
    PEAK_FLOPS,
    PartSize,
    StepFlops,
    meta_batch,
    meta_policy,
    part_sizes,
    peak_flops,
    step_flops,
)
from .engine_memory import engine_memory, is_bf16
from .recipes import RECIPES, load_recipe
from .trainable import set_trained

GB = 1e9

USUAL_UTILISATION = 0.4
"""Model FLOP utilisation of a training step that is well tuned."""

MEMORY_COLUMNS = ("weights", "gradients", "optimizer", "average", "buffers", "activations", "step", "total")

NOTES = """\
An estimate: nothing was run. GB are 10^9 bytes (a card sold as 80 GB has about 85 of them).
weights .. average  what stays: weights, gradients, float32 masters and Adam's two moments, the average of the weights (--ema.decay)
buffers             beside them in the backward pass: buckets in which gradients travel, weights gathered
activations         the most that a micro-batch's forward and backward pass hold, attention being one kernel; plain: and bfloat16 copies
step                the optimizer's step, in place of buffers and activations
total               the most at a time; fits: if {reserve_gb:g} GB (--reserve-gb) remain for what is not in it: the CUDA context, NCCL's
                    buffers, batches read ahead, kernels' work space, what the allocator loses in fragments
most                samples a GPU and micro-batch that fit, keeping all activations; most_checkpointed: with every block checkpointed
cpu                 memory of the machine, per GPU"""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """For which machine, and of what a cache would say."""

    gpus: int = 1
    """How many, over all nodes."""
    memory_gb: float = 80.0
    """Of each, 10^9 bytes."""
    device: str = "H100"
    """Which: its data sheet's speed turns operations into samples a second."""
    reserve_gb: float = 4.0
    """Of each GPU's memory, what must stay free: for what the estimate does not know."""
    prompt_tokens: int | None = None
    """Tokens that prompts are padded to, a multiple of 8; none: LIBERO's longest instructions with a public tokenizer, which is 24, or 64
    where π0.5's prompt spells out the state."""
    compact_vocab: int | None = None
    """Rows of the token table where the cache has a compact tokenizer (`vlatune prepare --compact`); none: the public model's."""
    csv: bool = False
    """Print CSV, a row for each stage and engine, in place of tables."""

    def __post_init__(self) -> None:
        for name in ("gpus", "memory_gb", "prompt_tokens", "compact_vocab"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be more than 0")
        if self.reserve_gb < 0:
            raise ValueError(f"reserve_gb is {self.reserve_gb}; it must be 0 or more")
        if peak_flops(self.device) is None:
            raise ValueError(f"nothing is known of the device {self.device!r}; there are: {', '.join(PEAK_FLOPS)}")

    def tokens_with(self, prompt: PromptStyle) -> int:
        """Of a prompt."""
        return self.prompt_tokens or (64 if prompt == "pi05" else 24)


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    """What a recipe needs on each GPU under every engine, and what fits. Every setting of `vlatune train` is one here."""

    plan: Annotated[PlanConfig, tyro.conf.arg(name="")] = field(default_factory=PlanConfig)
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: vlatune plan RECIPE [--help] [--gpus N] [--memory-gb GB] [settings of the recipe]\n\nrecipes:")
        print("\n".join(f"  {name}" for name in RECIPES))
        return
    recipe, *settings = arguments
    both = tyro.cli(
        tyro.conf.AvoidSubcommands[_Arguments],
        prog=f"vlatune plan {recipe}",
        default=_Arguments(train=load_recipe(recipe)),
        args=settings,
    )
    stages = [plan_stage(planned, both.train, both.plan) for planned in both.train.stages]
    if both.plan.csv:
        print(pd.concat([stage.table for stage in stages]).to_csv(index=False).rstrip())
        return
    print("\n\n".join([*(stage.text for stage in stages), NOTES.format(reserve_gb=both.plan.reserve_gb)]))


def plan_stage(planned: PlannedStage, config: TrainConfig, plan: PlanConfig) -> "StagePlan":
    """Raises ValueError where the batch does not divide, or the trained set or the checkpointing does not fit the policy."""
    micro_batch = config.micro_batch_size(plan.gpus)
    policy = _stage_policy(planned, plan)
    parameters = list(policy.parameters())

    @cache
    def activations(plain: bool, checkpointing: ActivationCheckpointingConfig) -> ActivationMemory:
        return _activations(planned, config, plan, checkpointing, plain=plain)

    return StagePlan(
        planned=planned,
        config=config,
        plan=plan,
        parts=part_sizes(policy),
        flops=step_flops(policy, _batch(policy, min(micro_batch, 8), config, plan)),
        engines=engine_table(
            config,
            plan,
            sizes=[parameter.numel() for parameter in parameters],
            trained_sizes=[parameter.numel() for parameter in parameters if parameter.requires_grad],
            activations=activations,
            every_block=ActivationCheckpointingConfig(parts=tuple(blocks_of(policy))),
        ),
    )


def engine_table(
    config: TrainConfig,
    plan: PlanConfig,
    *,
    sizes: Sequence[int],
    trained_sizes: Sequence[int],
    activations: Callable[[bool, ActivationCheckpointingConfig], ActivationMemory],
    every_block: ActivationCheckpointingConfig,
) -> pd.DataFrame:
    """A row for each engine. `activations` of the plain engine (True) or of DeepSpeed's, with these blocks checkpointed."""
    usable = (plan.memory_gb - plan.reserve_gb) * GB
    rows = []
    for engine in get_args(Engine):
        memory, is_plain = engine_memory(engine, config, plan.gpus, sizes, trained_sizes), engine == "plain"
        of_micro_batch = activations(is_plain, config.activation_checkpointing).at(config.micro_batch_size(plan.gpus))
        total = memory.total(of_micro_batch)
        is_refused = engine == "zero3" and config.ema.decay > 0
        in_bytes = {**asdict(memory), "activations": of_micro_batch, "total": total}
        rows.append(
            {"engine": engine}
            | {name: round(in_bytes[name] / GB, 2) for name in MEMORY_COLUMNS}
            | {
                "fits": "refused: average" if is_refused else "yes" if total <= usable else "no",
                "most": memory.largest_micro_batch(activations(is_plain, ActivationCheckpointingConfig()), usable),
                "most_checkpointed": memory.largest_micro_batch(activations(is_plain, every_block), usable),
                "cpu": round(memory.cpu / GB, 2),
            }
        )
    return pd.DataFrame(rows)


def _stage_policy(planned: PlannedStage, plan: PlanConfig) -> Policy:
    policy = meta_policy(planned.policy, vocab_size=plan.compact_vocab)
    set_trained(policy, planned.stage.trained, planned.stage.lora)
    return policy


def _batch(policy: Policy, size: int, config: TrainConfig, plan: PlanConfig) -> Batch:
    tokens = plan.tokens_with(policy.config.prompt)
    return meta_batch(policy, size, tokens, vision_features=config.vision_features is not None)


def _activations(
    planned: PlannedStage,
    config: TrainConfig,
    plan: PlanConfig,
    checkpointing: ActivationCheckpointingConfig,
    *,
    plain: bool,
) -> ActivationMemory:
    policy = _stage_policy(planned, plan)
    policy.to(torch.bfloat16 if is_bf16(config) and not plain else torch.float32)
    transform_blocks(policy, checkpointing, compiled=False)
    return activation_memory(
        policy, lambda size: _batch(policy, size, config, plan), autocast=plain and is_bf16(config)
    )


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage costs."""

    planned: PlannedStage
    config: TrainConfig
    plan: PlanConfig
    parts: Mapping[str, PartSize]
    flops: StepFlops
    engines: pd.DataFrame
    """A row for each."""

    def samples_per_s(self, utilisation: float) -> float:
        """Of one GPU whose model FLOP utilisation is that."""
        peak = peak_flops(self.plan.device)
        assert peak is not None  # PlanConfig has refused a device without
        return utilisation * peak / self.flops.total

    @property
    def hours(self) -> float:
        """Of the stage on all GPUs at USUAL_UTILISATION."""
        samples = self.planned.stage.num_steps * self.config.batch_size
        return samples / self.samples_per_s(USUAL_UTILISATION) / self.plan.gpus / 3600

    @property
    def table(self) -> pd.DataFrame:
        """For CSV: each row complete in itself."""
        planned, plan = self.planned, self.plan
        known = {
            "first_step": planned.first_step,
            "last_step": planned.last_step,
            "trained": planned.stage.trained,
            "objective": planned.policy.objective.type,
            "gpus": plan.gpus,
            "memory_gb": plan.memory_gb,
            "micro_batch": self.config.micro_batch_size(plan.gpus),
            "parameters": self.parts["together"].total,
            "trained_parameters": self.parts["together"].trained,
            "tflop_forward": self.flops.forward / 1e12,
            "tflop": self.flops.total / 1e12,
            "device": plan.device,
            "samples_per_s_at_peak": self.samples_per_s(1),
            "hours": self.hours,
        }
        return pd.DataFrame([known] * len(self.engines)).join(self.engines)

    @property
    def text(self) -> str:
        """For a person."""
        planned, plan, config = self.planned, self.plan, self.config
        heading = (
            f"steps {planned.first_step} to {planned.last_step}: {planned.stage.trained}, {planned.policy.objective.type}, on {plan.gpus} x "
            f"{plan.device} of {plan.memory_gb:g} GB; {config.batch_size} samples a step, {config.micro_batch_size(plan.gpus)} a GPU and "
            f"micro-batch, prompts of {plan.tokens_with(planned.policy.prompt)} tokens"
        )
        speed = (
            f"{_significant(self.flops.total / 1e12)} TFLOP a sample, {_significant(self.flops.forward / 1e12)} of them forward: at most "
            f"{_significant(self.samples_per_s(1))} samples/s on one {plan.device}, and {_significant(self.samples_per_s(USUAL_UTILISATION))} "
            f"at an MFU of {USUAL_UTILISATION:.0%}, at which the {planned.stage.num_steps:,} steps take {_significant(self.hours)} hours on all."
        )
        start = f"First every rank makes the policy in the machine's memory: {4 * self.parts['together'].total / GB:.1f} GB each."
        sizes = pd.DataFrame([{"parameters": part, **asdict(size)} for part, size in self.parts.items()])
        return "\n".join(
            [
                heading,
                "",
                _aligned(sizes),
                "",
                _aligned(self.engines.rename(columns={"engine": "GB per GPU"})),
                "",
                speed,
                start,
            ]
        )


def _aligned(table: pd.DataFrame) -> str:
    """The first column, names, to the left."""
    name = str(table.columns[0])
    named = table.set_index(name).rename_axis(index=None, columns=name)
    counts = [column for column in named if pd.api.types.is_integer_dtype(named[column])]
    written: str = named.to_string(
        float_format="{:.2f}".format, formatters={str(name): "{:,}".format for name in counts}
    )
    return written


def _significant(value: float) -> str:
    """Three digits."""
    return f"{float(f'{value:.3g}'):,.10g}"
