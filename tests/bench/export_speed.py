"""How long one decision takes through onnxruntime and through torch, in turn in one run, on the CPU, batch 1, two cameras.

    OMP_NUM_THREADS=2 python tests/bench/export_speed.py --num-threads 2

The tests' tiny policies, and smaller ones in the published proportions (`preset_policies.py`). Both begin at prepared inputs; torch is the
plain path. Printed are medians in milliseconds, their ratio, how far apart the actions are, and what exporting and loading cost."""

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from preset_policies import CAMERAS, make_policy, make_small_pi05, make_small_smolvla

from vlatune.data.language import Language
from vlatune.policy.backbones.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from vlatune.policy.export.buckets import Bucket
from vlatune.policy.export.check import random_observation
from vlatune.policy.export.command import describe, write_graphs
from vlatune.policy.export.description import LANGUAGE
from vlatune.policy.export.graph_inputs import named_inputs
from vlatune.policy.export.onnx_policy import OnnxPolicy
from vlatune.policy.parity import relative_difference
from vlatune.policy.policy import Policy
from vlatune.policy.presets import clip_flow


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to time."""

    num_threads: int = 1
    """Of torch and of onnxruntime alike."""
    num_calls: int = 20
    """Timed calls of each, after three that are not."""
    prompt_tokens: int = 48
    """Of the one prompt."""


def make_small_clip_flow() -> Policy:
    """CLIP's ViT-S/16 on 224 pixels, half as deep, and the published MLPs."""
    vision = ClipVisionConfig(width=384, mlp_dim=1536, depth=6, num_heads=6)
    text = ClipTextConfig(width=256, mlp_dim=1024, depth=6, num_heads=4)
    return make_policy(replace(clip_flow(), backbone=ClipConfig(vision=vision, text=text)))


POLICIES: dict[str, Callable[[], Policy]] = {
    "clip_flow, tiny": lambda: make_policy("clip_flow"),
    "pi05, tiny": lambda: make_policy("pi05"),
    "smolvla, tiny": lambda: make_policy("smolvla"),
    "clip_flow, small": make_small_clip_flow,
    "pi05, small": make_small_pi05,
    "smolvla, small": make_small_smolvla,
}


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.num_threads)
    print(
        f"{'':18}{'parameters':>12}{'torch ms':>10}{'onnx ms':>10}{'ratio':>7}{'difference':>12}{'export s':>10}{'load s':>8}"
    )
    for name, make in POLICIES.items():
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            print(f"{name:18}{row(make().eval().requires_grad_(False), Path(folder), options)}", flush=True)
    print(f"peak memory of it all: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")


def row(policy: Policy, folder: Path, options: Options) -> str:
    start = time.perf_counter()
    exported = exported_of(policy, folder, options)
    export_s = time.perf_counter() - start
    observation = random_observation(policy, rows=1, prompt_tokens=options.prompt_tokens, cameras=CAMERAS, seed=2)
    prepared = {tensor_name: tensor.numpy() for tensor_name, tensor in named_inputs(observation).items()}
    noise = torch.randn(1, *policy.noise_shape, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    actions = exported.sample(prepared, noise.numpy())
    load_s = time.perf_counter() - start
    difference = relative_difference(torch.from_numpy(actions), policy.sample(observation, noise))
    torch_ms, onnx_ms = medians(
        lambda: policy.sample(observation, noise), lambda: exported.sample(prepared, noise.numpy()), options.num_calls
    )
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    return f"{parameters:12,}{torch_ms:10.1f}{onnx_ms:10.1f}{onnx_ms / torch_ms:7.2f}{difference:12.1e}{export_s:10.1f}{load_s:8.2f}"


def exported_of(policy: Policy, folder: Path, options: Options) -> OnnxPolicy:
    """As `vlatune export` does it, without its check."""
    Language.build(["a text"], encoder="none").save(folder / LANGUAGE)  # inputs are prepared: nobody asks it
    graphs = write_graphs(folder, policy, [Bucket(batch=1, prompt_tokens=options.prompt_tokens, cameras=CAMERAS)])
    describe(policy, graphs, checkpoint=folder, weights_hash="", tolerance=1e-4).write(folder)
    return OnnxPolicy(folder, num_threads=options.num_threads)


def medians(first: Callable[[], object], second: Callable[[], object], num_calls: int) -> tuple[float, float]:
    """Milliseconds, the two called in turn, so that a busy machine is busy for both."""
    times: tuple[list[float], list[float]] = ([], [])
    for call in range(3 + num_calls):
        for function, kept in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            if call >= 3:
                kept.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    main()
