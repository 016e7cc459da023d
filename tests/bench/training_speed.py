"""How fast a policy trains on this machine's GPU, one rank: the project's own training loop (train/loop.py) on random weights and a random
batch. Run from the repository's root:

    python tests/bench/training_speed.py --models pi05 --out runs/training_speed         the table of BENCHMARKS.md, one model
    python tests/bench/training_speed.py --models pi05 --variants full-zero2 expert8-zero2 --micro-batches 16 32
    python tests/bench/training_speed.py --size small --out runs/training_speed_cpu        smaller models, on a CPU

Full size is π0.5 (two cameras, a prompt of 20 tokens in its bucket of 24, chunk 10), SmolVLA (two cameras of 512 pixels, chunk 50) and
RDT-1B (three camera slots of two observations, chunk 64), each as its recipe trains it (its augmentation, too), without the average of
the weights and without data to wait for. ZeRO has bf16 weights and float32 masters, plain float32 weights under autocast.

Each variant runs in a process of its own, since DeepSpeed cannot start twice in one, through growing micro-batches until the memory is
spent. A row is in the folder's results.csv as soon as it is measured; the same command goes on after them.

samples/s: the micro-batch over the median of the timed steps. Shares of a step: forward (with the batch's augmentation), backward, and
clipping and optimizer. Memory: the most that PyTorch had allocated. MFU: the model's operations (recomputed ones not counted) over the
GPU's peak. A compiled variant compiles anew for every micro-batch, within its untimed steps."""

import dataclasses
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
import tyro
from preset_policies import make_small_pi05, make_small_smolvla
from step_clock import PHASES, StepClock
from synthetic_training import random_batch, random_policy
from text_encoding_cost import SMALL as SMALL_RDT

from vlatune.data.batch import Batch
from vlatune.data.named import named
from vlatune.launch.studies.tables import ResultsTable
from vlatune.policy.config import PolicyConfig
from vlatune.policy.lora import LoraConfig
from vlatune.policy.policy import Policy
from vlatune.policy.presets import PRESETS
from vlatune.train.blocks import blocks_of
from vlatune.train.config import ActivationCheckpointingConfig, TrainConfig
from vlatune.train.cost import flops_per_sample, peak_flops
from vlatune.train.ema import EmaConfig
from vlatune.train.engine import Engine, make_accelerator, resolve_precision
from vlatune.train.loop import train_stage
from vlatune.train.recipes import load_recipe
from vlatune.train.trainable import Trained, set_trained

Size = Literal["full", "small", "tiny"]
KNOWN = "Best published for π0.5, full: 28.6 samples/s a GPU; aimed at: 50; limit of an H200, at 790 TFLOP/s: 106."


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and where rows are kept."""

    out: Path
    """Folder of results.csv; rows found there are not measured again."""
    models: tuple[str, ...] = ("pi05", "smolvla", "rdt")
    """pi05, smolvla, rdt."""
    variants: tuple[str, ...] = ()
    """What is trained, on which engine, and how: full-zero2-checkpointed-compiled; none: the table of BENCHMARKS.md."""
    micro_batches: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    """Samples a step, growing; a variant stops at the first that does not fit."""
    size: Size = "full"
    """The published sizes, the full ones' proportions in about a hundredth of their size, or the tests'."""
    num_steps: int = 30
    """Timed steps."""
    num_warmup_steps: int = 10
    """Steps before them."""
    time_limit_s: float | None = None
    """No variant is started later than this."""

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.num_warmup_steps < 1:
            raise ValueError("--num-steps and --num-warmup-steps must be at least 1")
        if list(self.micro_batches) != sorted(set(self.micro_batches)) or min(self.micro_batches, default=0) < 1:
            raise ValueError(
                f"--micro-batches is {' '.join(map(str, self.micro_batches))}; give growing numbers from 1 on"
            )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train."""

    trained: Trained
    engine: Engine
    num_draws: int = 1
    checkpointed: bool = False
    compiled: bool = False


def variants() -> dict[str, Variant]:
    """By name: what is trained, the engine, and whether blocks are checkpointed or compiled."""
    trained: dict[str, tuple[Trained, int]] = {
        "full": ("full", 1),
        "expert1": ("expert", 1),
        "expert8": ("expert", 8),
        "lora16": ("lora", 1),
    }
    engines: tuple[Engine, ...] = ("plain", "zero1", "zero2")
    return {
        f"{name}-{engine}{'-checkpointed' * checkpointed}{'-compiled' * compiled}": Variant(
            trained=kind, engine=engine, num_draws=num_draws, checkpointed=checkpointed, compiled=compiled
        )
        for name, (kind, num_draws) in trained.items()
        for engine, checkpointed, compiled in itertools.product(engines, (False, True), (False, True))
    }


SMALL = {"pi05": make_small_pi05, "smolvla": make_small_smolvla}
MODELS = {"pi05": "π0.5", "smolvla": "SmolVLA", "rdt": "RDT-1B"}
VARIANTS = variants()
TABLE = (
    *(name for name in VARIANTS if name.startswith("full-")),
    *("expert1-zero2", "expert8-zero2", "lora16-zero2"),
)
"""What BENCHMARKS.md has."""
MEASURED, OUT_OF_MEMORY = "measured", "out of memory"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of results.csv; what could not be measured is empty."""

    model: str
    size: str
    variant: str
    device: str
    micro_batch: int
    outcome: str
    samples_per_s: float | None = None
    step_ms: float | None = None
    forward_share: float | None = None
    backward_share: float | None = None
    optimizer_share: float | None = None
    peak_memory_gb: float | None = None
    model_tflops_per_s: float | None = None
    mfu: float | None = None
    tflop_per_sample: float | None = None
    num_trained: int | None = None
    num_parameters: int | None = None
    precision: str = ""
    torch_version: str = str(torch.__version__)


KEY = ("model", "size", "variant", "device", "micro_batch")


def main() -> None:
    options = tyro.cli(Options)
    for kind, names, known in (("model", options.models, MODELS), ("variant", options.variants, VARIANTS)):
        for name in names:
            named(kind, name, known)
    started = time.monotonic()
    for model, variant in itertools.product(options.models, options.variants or TABLE):
        if options.time_limit_s is not None and time.monotonic() - started > options.time_limit_s:
            print(
                f"stopped before {model} {variant}: --time-limit-s {options.time_limit_s:g}; the same command goes on"
            )
            break
        left = sizes_left(options, model, variant)
        if left:
            print(f"\n{model} {variant}, micro-batches {' '.join(map(str, left))}", flush=True)
            process = multiprocessing.get_context("spawn").Process(target=measure, args=(options, model, variant))
            process.start()
            process.join()
            if process.exitcode:
                add(options, model, variant, sizes_left(options, model, variant)[0], f"exit code {process.exitcode}")
    print(f"\n{markdown(results(options))}\n\n{KNOWN}")


def results(options: Options) -> ResultsTable[Row]:
    return ResultsTable(options.out, Row, KEY)


def sizes_left(options: Options, model: str, variant: str) -> list[int]:
    """Micro-batches that are neither measured nor known to be too large."""
    rows = {size: results(options).rows.get(key(options, model, variant, size)) for size in options.micro_batches}
    spent = [size for size, row in rows.items() if row is not None and row.outcome == OUT_OF_MEMORY]
    return [
        size
        for size, row in rows.items()
        if (row is None or row.outcome != MEASURED) and size < min(spent, default=sys.maxsize)
    ]


def key(options: Options, model: str, variant: str, micro_batch: int) -> tuple[Any, ...]:
    return model, options.size, variant, device_name(), micro_batch


def add(options: Options, model: str, variant: str, micro_batch: int, outcome: str, **values: Any) -> None:
    place = dict(zip(KEY, key(options, model, variant, micro_batch), strict=True))
    options.out.mkdir(parents=True, exist_ok=True)
    results(options).add(Row(**place, outcome=outcome, **values))


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def policy_config(model: str, size: Size) -> PolicyConfig:
    match size:
        case "full":
            return load_recipe(model).policy
        case "tiny":
            return PRESETS[model](tiny=True)
        case "small":
            return SMALL_RDT if model == "rdt" else SMALL[model]().config


class Finished(Exception):
    """The data's way to end the loop, which would write a checkpoint at its own last step."""


def measure(options: Options, model: str, variant_name: str) -> None:
    """In a process of its own: the variant's rows."""
    variant = VARIANTS[variant_name]
    # Runs side by side on one machine must not meet.
    os.environ.setdefault("MASTER_PORT", str(20_000 + os.getpid() % 20_000))
    left = sizes_left(options, model, variant_name)
    config = dataclasses.replace(
        load_recipe(model),
        engine=variant.engine,
        trained=variant.trained,
        lora=LoraConfig(rank=16, backbone="none" if model == "rdt" else "attention"),  # RDT's SigLIP is never trained
        compile=variant.compiled,
        batch_size=left[0],  # the step is a mean over its samples: the engine need not know how many
        num_accumulation_steps=1,
        then=(),
        ema=EmaConfig(),
        checkpoint_every=sys.maxsize,
        validate_every=sys.maxsize,
        out=options.out,
    )
    accelerator = make_accelerator(config)
    is_sharded = variant.engine != "plain"
    dtype = torch.bfloat16 if is_sharded and resolve_precision(config) == "bf16" else torch.float32
    policy = random_policy(policy_config(model, options.size), accelerator.device, dtype)
    policy.config = dataclasses.replace(
        policy.config, objective=dataclasses.replace(policy.config.objective, num_draws=variant.num_draws)
    )
    if variant.checkpointed:
        parts = ActivationCheckpointingConfig(parts=tuple(blocks_of(policy)))
        config = dataclasses.replace(config, activation_checkpointing=parts)
    config = dataclasses.replace(config, policy=policy.config)
    set_trained(policy, config.trained, config.lora)
    data = SyntheticData(options, model, variant_name, config, policy, StepClock(accelerator.device))
    data.clock.observe(accelerator)
    try:
        train_stage(
            accelerator,
            policy,
            config.stages[0],
            config,
            data,
            None,
            Undisturbed(),
            step=1,
            trainer_state=None,
        )
    except Finished:
        pass
    except torch.OutOfMemoryError as error:
        print(str(error).splitlines()[0])
        add(options, model, variant_name, data.micro_batch, OUT_OF_MEMORY)
    accelerator.end_training()


class Undisturbed:
    """In place of the loop's `Interruption`: on a signal the process just ends, and writes no checkpoint."""

    def agreed(self, _accelerator: Any) -> bool:
        return False


class SyntheticData:
    """What the loop asks of `TrainingData`: random batches that lie on the device, of one micro-batch size after another. A size's row is
    written when the loop asks for the batch after its last."""

    validation = None

    def __init__(
        self, options: Options, model: str, variant: str, config: TrainConfig, policy: Policy, clock: StepClock
    ) -> None:
        self.options, self.model, self.variant = options, model, variant
        self.config, self.policy, self.clock = config, policy, clock
        self.sizes = sizes_left(options, model, variant)
        self.micro_batch = self.sizes[0]
        self.loader = self
        self.num_samples = self.sizes[-1]
        self.statistics = policy.statistics
        one = random_batch(policy, 1, torch.device("cpu"))
        self.empty_text = one.observation.prompts  # in place of hidden instructions
        # Before blocks are compiled or checkpointed, and counted on a sample where it is.
        self.flops = flops_per_sample(policy, one)
        self.num_trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        self.num_parameters = sum(p.numel() for p in policy.parameters())

    def batches(self, _first_step: int, device: torch.device) -> Iterator[Batch]:
        for size in self.sizes:
            self.micro_batch = size
            if self.config.compile:
                torch.compiler.reset()  # a program for this very shape, as in a run that has only this one
            batch = random_batch(self.policy, size, device)
            self.clock.steps.clear()
            if self.clock.on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            for _ in range(self.options.num_warmup_steps + self.options.num_steps):
                self.clock.begin_step()
                yield batch
            self.clock.begin_step()
            self._add_row(device)
        raise Finished

    def _add_row(self, device: torch.device) -> None:
        seconds = self.clock.seconds(skipped=self.options.num_warmup_steps)
        step_s = statistics.median(seconds["step"])
        rate = self.micro_batch / step_s
        peak = peak_flops(device_name())
        shares = {f"{phase}_share": sum(seconds[phase]) / sum(seconds["step"]) for phase in PHASES}
        add(
            self.options,
            self.model,
            self.variant,
            self.micro_batch,
            MEASURED,
            samples_per_s=rate,
            step_ms=1e3 * step_s,
            **shares,
            peak_memory_gb=torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
            model_tflops_per_s=rate * self.flops / 1e12,
            mfu=None if peak is None else rate * self.flops / peak,
            tflop_per_sample=self.flops / 1e12,
            num_trained=self.num_trained,
            num_parameters=self.num_parameters,
            precision=resolve_precision(self.config),
        )
        print(f"  micro-batch {self.micro_batch}: {rate:.2f} samples/s", flush=True)


def markdown(table: ResultsTable[Row]) -> str:
    """Every row, a table for each device."""
    lines = []
    rows = sorted(table.rows.values(), key=lambda row: row.device)
    for device, group in itertools.groupby(rows, key=lambda row: row.device):
        lines += [
            f"\n{device}\n",
            "| model | variant | micro-batch | samples/s | step | forward, backward, optimizer | memory | TFLOP/s | MFU |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in group:
            cells = [f"{MODELS[row.model]} ({row.size})", row.variant, str(row.micro_batch)]
            if row.outcome == MEASURED:
                shares = (row.forward_share, row.backward_share, row.optimizer_share)
                cells += [f"{row.samples_per_s:.3g}", f"{row.step_ms:.0f} ms", " / ".join(f"{s:.0%}" for s in shares)]
                cells += ["" if row.peak_memory_gb is None else f"{row.peak_memory_gb:.1f} GB"]
                cells += [f"{row.model_tflops_per_s:.3g}", "" if row.mfu is None else f"{row.mfu:.0%}"]
            else:
                cells += [row.outcome, *[""] * 5]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"training_speed: {error}") from error
