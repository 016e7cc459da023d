"""`vlatune export CHECKPOINT FOLDER`: a policy as ONNX graphs, checked with onnxruntime against torch.

FOLDER/
    export.json            shapes and names, cameras, image rule, scaling, objective and its loop, measured differences (`description.py`)
    prefix_0.onnx          for each bucket: what is computed once an observation
    expert_step_0.onnx     and one call of the expert; the sampling loop stays outside
    weights.bin            the weights of all graphs, each once
    language/              tokenizer and instructions, as in the checkpoint

Everything is float32. LeRobot's layout (safetensors and config) is `vlatune convert`'s."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from ...data.episodes import DataError
from ...data.language import Language
from ...data.normalise import Normaliser
from ...data.prompt import NUM_STATE_BINS, prompt_text
from ..acting import read_any_policy
from ..checkpoints.public import PublicOptions
from ..policy import Policy
from .buckets import Bucket, make_buckets
from .check import differences, random_observation
from .description import (
    FORMAT_VERSION,
    LANGUAGE,
    WEIGHTS,
    ActionReading,
    BucketGraphs,
    Description,
    Graph,
    Scaling,
    TensorShape,
)
from .graph_inputs import named_inputs
from .graphs import TracedGraph, trace_both
from .onnx_policy import OnnxPolicy
from .packages import needed
from .sampling_loop import STEPS, levels_in_numbers
from .weights_file import WeightsFile

ANY_TEXT = "pick up the bowl"
"""For a check, where a checkpoint knows no instruction."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A policy as ONNX graphs, in float32, checked with onnxruntime. Each combination of batch size, prompt length and camera set is a pair
    of graphs; the sampling loop stays outside. (LeRobot's layout: `vlatune convert`.)"""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint of ours, or a public one."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The folder to write; it must not exist."""
    batch_sizes: tuple[int, ...] = (1,)
    """Observations a call; fewer are padded, more are split."""
    prompt_tokens: tuple[int, ...] = ()
    """Tokens that prompts are padded to; empty: as many as the longest known instruction needs with any state, rounded up to a multiple of 8."""
    camera_sets: tuple[str, ...] = ()
    """Cameras whose pictures are read, joined by commas, for each set of graphs (the policy's others count as absent); empty: all."""
    tolerance: float = 1e-4
    """Largest relative difference between onnxruntime and torch; above it nothing is written."""
    averaged: bool = False
    """The run's average weights (EMA)."""
    public: PublicOptions = field(default_factory=PublicOptions)


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(tyro.conf.OmitArgPrefixes[ExportConfig], prog="vlatune export", args=argv)
    description = export(config)
    for graphs in description.graphs:
        assert graphs.differences is not None  # or it had not been written
        print(f"{graphs.bucket}: largest difference from torch {graphs.differences.largest:.1e}")
    print(f"{config.out}: {2 * len(description.graphs)} graphs of {config.checkpoint}")


@torch.no_grad()
def export(config: ExportConfig) -> Description:
    """Raises DataError if the checkpoint cannot be read or `out` is there already, and ValueError if a package is missing, a bucket does not
    fit the policy, or a graph differs from torch by more than the tolerance: then nothing is written."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        needed(package)
    if config.out.exists():
        raise DataError(f"{config.out} exists; give a new folder")
    policy, language, weights_hash = read_any_policy(config.checkpoint, config.public, averaged=config.averaged)
    policy = policy.eval().requires_grad_(False)
    lengths = prompt_lengths(policy, language)
    prompt_tokens = config.prompt_tokens or (_longest(language, lengths),)
    buckets = make_buckets(config.batch_sizes, prompt_tokens, config.camera_sets, policy.embodiment.cameras)
    texts = {bucket: _fitting_texts(bucket, lengths) for bucket in buckets}

    unfinished = config.out.with_name(f"{config.out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    language.save(unfinished / LANGUAGE)
    graphs = write_graphs(unfinished, policy, buckets)
    description = describe(
        policy, graphs, checkpoint=config.checkpoint, weights_hash=weights_hash, tolerance=config.tolerance
    )
    description.write(unfinished)
    exported = OnnxPolicy(unfinished)
    checked = tuple(
        replace(pair, differences=differences(policy, exported, pair, texts[pair.bucket])) for pair in graphs
    )
    for pair in checked:
        assert pair.differences is not None
        if not pair.differences.largest <= config.tolerance:
            shutil.rmtree(unfinished)
            raise ValueError(
                f"the graphs for {pair.bucket} differ from torch by {pair.differences}, relatively, and --tolerance is {config.tolerance:g}; "
                "nothing was written"
            )
    description = replace(description, graphs=checked)
    description.write(unfinished)
    unfinished.rename(config.out)
    return description


def write_graphs(folder: Path, policy: Policy, buckets: Sequence[Bucket]) -> tuple[BucketGraphs, ...]:
    weights = WeightsFile(folder / WEIGHTS, [f"policy.{name}" for name, _ in policy.named_parameters()])
    written = []
    for index, bucket in enumerate(buckets):
        example = random_observation(
            policy, rows=bucket.batch, prompt_tokens=bucket.prompt_tokens, cameras=bucket.cameras, seed=0
        )
        prefix, step = trace_both(policy, named_inputs(example))
        files = f"prefix_{index}.onnx", f"expert_step_{index}.onnx"
        for graph, file in zip((prefix, step), files, strict=True):
            weights.write_graph(graph.model, folder / file)
        written.append(BucketGraphs(bucket=bucket, prefix=_graph(files[0], prefix), step=_graph(files[1], step)))
    return tuple(written)


def _graph(file: str, traced: TracedGraph) -> Graph:
    def shapes(tensors: dict[str, torch.Tensor]) -> tuple[TensorShape, ...]:
        return tuple(
            TensorShape(name=name, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
            for name, tensor in tensors.items()
        )

    return Graph(file=file, inputs=shapes(traced.inputs), outputs=shapes(traced.outputs))


def describe(
    policy: Policy, graphs: tuple[BucketGraphs, ...], *, checkpoint: Path, weights_hash: str, tolerance: float
) -> Description:
    config, embodiment = policy.config, policy.embodiment
    noise_levels, second_levels = levels_in_numbers(config.objective, policy.noise_shape)
    return Description(
        format_version=FORMAT_VERSION,
        checkpoint=str(checkpoint),
        weights_hash=weights_hash,
        versions={package: version(package) for package in ("vlatune", "torch", "onnx", "onnxscript", "onnxruntime")},
        robot=embodiment.robot,
        cameras=embodiment.cameras,
        image_rule=embodiment.image_rule,
        observation_offsets=config.observation_offsets,
        state=_scaling(policy.state_normaliser, embodiment.state_dim),
        prompt=config.prompt,
        reads_embeddings=config.backbone.reads_embeddings,
        horizon=config.horizon,
        action_dim=embodiment.action_dim,
        action_width=policy.action_layout.width,
        actions=ActionReading(
            slots=tuple(policy.action_layout.slots_C.tolist()),
            encoding=config.action_layout.encoding if config.action_layout else "as_is",
            scaling=_scaling(policy.action_normaliser, embodiment.action_dim),
        ),
        objective=config.objective,
        sampling=STEPS[config.objective.type],
        noise_levels=noise_levels,
        second_levels=second_levels,
        graphs=graphs,
        tolerance=tolerance,
    )


def _scaling(normaliser: Normaliser, num_dims: int) -> Scaling:
    centre, scale = normaliser.centre_D.expand(num_dims), normaliser.scale_D.expand(num_dims)
    return Scaling(centre=tuple(centre.tolist()), scale=tuple(scale.tolist()))


def prompt_lengths(policy: Policy, language: Language) -> dict[str, int]:
    """Known instruction -> tokens of its longest prompt, whatever the state that is written into it."""
    style, state_dim = policy.config.prompt, policy.embodiment.state_dim

    def num_tokens(texts: Sequence[str], state: float) -> list[int]:
        prompts = [prompt_text(style, text, np.full(state_dim, state, np.float32)) for text in texts]
        return [int(language.prompts([prompt]).mask_BL.sum()) for prompt in prompts]

    # Below all bins, and in the middle of each: which number has most tokens is the tokenizer's affair.
    states = [-2.0, *(-1 + (2 * bin + 1) / NUM_STATE_BINS for bin in range(NUM_STATE_BINS))]
    longest = max(states, key=lambda state: num_tokens([ANY_TEXT], state)[0])
    texts = language.known_texts or (ANY_TEXT,)
    return dict(zip(texts, num_tokens(texts, longest), strict=True))


def _longest(language: Language, lengths: dict[str, int]) -> int:
    if not language.known_texts:
        raise ValueError(
            f"this checkpoint names no instructions, so nothing says how long prompts are; give --prompt-tokens ({ANY_TEXT!r} has "
            f"{lengths[ANY_TEXT]})"
        )
    return -(-max(lengths.values()) // 8) * 8


def _fitting_texts(bucket: Bucket, lengths: dict[str, int]) -> list[str]:
    fitting = [text for text, length in lengths.items() if length <= bucket.prompt_tokens]
    if not fitting:
        raise ValueError(
            f"--prompt-tokens {bucket.prompt_tokens}: the shortest prompt of this checkpoint can have {min(lengths.values())} tokens; give as "
            "many or more"
        )
    return fitting
