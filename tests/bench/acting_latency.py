"""How long a decision takes: the plain path, the compiled one, fewer steps, a prefix that is encoded again for every step, and chunks held to
the last ones (real-time chunking), which takes a backward pass through the expert for every step.

    PYTHONPATH=tests/support python tests/bench/acting_latency.py
        on the CPU, one thread: π0.5 and SmolVLA in the full models' proportions, batch 1; ratios of medians in one run
    PYTHONPATH=tests/support python tests/bench/acting_latency.py --size full --device cuda --precision bfloat16 \\
            --policies pi05 smolvla rdt --batches 1 8 16 32 --horizons 10 50
        on a CUDA device: the published sizes with random weights, two cameras, a prompt of 24 tokens

Every time ends with a device synchronisation. The ways to decide take turns, so that a machine that grows slower does so for all of them.
`vision`, `prefix` and `expert` are the compiled path's parts, timed apart: the towers, the rest of what is computed once, and all calls of
the expert. On CUDA there are also the kernels of a decision, and the bytes of the weights that it must read over its time: for π0.5
at batch 1 the floor on an H200 is 4.6 ms (3.96 GB of prefix weights once, ten times 0.62 GB of the expert's). Every batch's table is
printed when it is measured."""

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import tyro
from preset_policies import embodiment_for, make_batch, make_small_pi05, make_small_smolvla
from preset_policies import statistics as some_statistics

from vlatune.data.batch import Observation
from vlatune.data.normalise import Statistics
from vlatune.eval.text_tables import aligned
from vlatune.policy.acceleration.sampler import CompiledSampler
from vlatune.policy.objectives.objective import Objective
from vlatune.policy.objectives.real_time import RealTimeChunking
from vlatune.policy.objectives.regression import Regression
from vlatune.policy.objectives.rs_imle import RSIMLE
from vlatune.policy.policy import Policy
from vlatune.policy.presets import PRESETS

PROMPT_TOKENS = 24
SMALL = {"pi05": make_small_pi05, "smolvla": make_small_smolvla}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to time."""

    policies: tuple[str, ...] = ("pi05", "smolvla")
    size: Literal["tiny", "small", "full"] = "small"
    """The tests' sizes, the full model's proportions (pi05 and smolvla), or the published ones."""
    device: str = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    batches: tuple[int, ...] = (1,)
    horizons: tuple[int, ...] = (10,)
    """Steps of a chunk."""
    repeats: int = 30
    """Timed decisions of each kind, after three that are not."""
    threads: int = 1
    """On the CPU."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    for name in options.policies:
        for horizon in options.horizons:
            policy = make(name, horizon, options)
            compiled = CompiledSampler(copy.deepcopy(policy), is_required=True)
            for batch in options.batches:
                rows = rows_of(policy, name, batch, compiled, options)
                print(aligned([list(rows[0]), *(list(row.values()) for row in rows)]), end="\n\n", flush=True)


def make(name: str, horizon: int, options: Options) -> Policy:
    torch.manual_seed(0)
    if options.size == "small":
        policy = SMALL[name]()
        if policy.config.horizon != horizon:
            policy = Policy(dataclasses.replace(policy.config, horizon=horizon), policy.embodiment, policy.statistics)
    else:
        config = dataclasses.replace(PRESETS[name](tiny=options.size == "tiny"), horizon=horizon)
        embodiment = embodiment_for(config, vocab_size=1000)
        figures = Statistics(
            state=some_statistics(embodiment.state_dim), actions=some_statistics(embodiment.action_dim)
        )
        with torch.device(options.device):
            policy = Policy(config, embodiment, figures)
    policy = policy.to(options.device).eval().requires_grad_(False)
    for part in (policy.backbone, policy.expert):
        part.to(getattr(torch, options.precision))
    return policy


def objectives_of(policy: Policy) -> dict[str, Objective]:
    own = policy.config.objective
    one_step = dataclasses.replace(own, num_sampling_steps=1)
    return {
        f"{own.type}, {own.num_sampling_steps} steps": own,
        f"{own.type}, 1 step": one_step,
        "regression (l1)": Regression(error="l1", output="action"),
        "rs_imle": RSIMLE(),
    }


@torch.inference_mode()
def rows_of(policy: Policy, name: str, batch: int, compiled: CompiledSampler, options: Options) -> list[dict[str, str]]:
    observation = observation_for(policy, batch).to(options.device)
    noise = torch.randn(batch, 1, *policy.noise_shape, device=options.device)
    objectives = objectives_of(policy)
    own = next(iter(objectives))
    ways: dict[tuple[str, str], Callable[[], object]] = {}
    for label, objective in objectives.items():
        ways[label, "plain"] = partial(policy.chunks, observation, noise, objective)
        ways[label, "compiled"] = partial(compiled.chunks, observation, noise, objective)
    ways[own, "prefix at every step"] = partial(prefix_at_every_step, policy, observation, noise)
    ways[own, "real-time chunking"] = partial(real_time_chunking, policy, observation, noise)
    times = in_turns(ways, options)
    parts = part_times(compiled, observation, noise, options)
    reference = statistics.median(times[own, "plain"])
    rows = []
    for (label, way), seconds in times.items():
        median = statistics.median(seconds)
        rows.append(
            {
                "policy": name,
                "chunk": str(policy.config.horizon),
                "batch": str(batch),
                "objective": label,
                "path": way,
                "median ms": f"{1e3 * median:.2f}",
                "p95 ms": f"{1e3 * float(np.percentile(seconds, 95)):.2f}",
                "observations/s": f"{batch / median:.1f}",
                "times faster": f"{reference / median:.2f}",
                **(parts_columns(parts, objectives[label]) if way == "compiled" else dict.fromkeys(PARTS, "")),
                **cuda_columns(policy, ways[label, way], median, objectives[label], options),
            }
        )
    return rows


PARTS = ("vision ms", "prefix ms", "expert ms")


def observation_for(policy: Policy, batch: int) -> Observation:
    """Two cameras and a prompt of `PROMPT_TOKENS` tokens."""
    observation = make_batch(policy.config, batch).observation
    prompts = observation.prompts
    repeats = PROMPT_TOKENS // prompts.ids_BL.shape[1]
    embedding = prompts.embedding_BLE
    wide = dataclasses.replace(
        prompts,
        ids_BL=prompts.ids_BL.repeat(1, repeats),
        mask_BL=torch.ones(batch, PROMPT_TOKENS, dtype=torch.bool),
        embedding_BLE=None if embedding is None else embedding.repeat(1, repeats, 1),
    )
    return dataclasses.replace(observation, prompts=wide)


def prefix_at_every_step(policy: Policy, observation: Observation, noise_BKHA: torch.Tensor) -> torch.Tensor:
    class Forgetful:
        def __call__(self, x_BHA, noise_level_B, second_level_B=None):
            return policy.bind(observation)(x_BHA, noise_level_B, second_level_B)

    return policy.config.objective.sample(Forgetful(), noise_BKHA[:, 0])


def real_time_chunking(policy: Policy, observation: Observation, noise_BKHA: torch.Tensor) -> torch.Tensor:
    """Plain otherwise: every row goes on with a chunk of which half is left."""
    with torch.inference_mode(False), torch.no_grad():
        noise_BHA = noise_BKHA[:, 0].clone()
        return RealTimeChunking().sample(
            policy.config.objective,
            policy.bind(observation),
            noise_BHA,
            torch.zeros_like(noise_BHA),
            torch.ones(len(noise_BHA), dtype=torch.bool),
            policy.action_layout.mask_W,
            num_executed=noise_BHA.shape[1] // 2,
            inference_delay=1,
        )


def in_turns(ways: dict[tuple[str, str], Callable[[], object]], options: Options) -> dict[tuple[str, str], list[float]]:
    """Seconds of every decision."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in ways}
    for repeat in range(options.repeats + 3):
        for key, decide in ways.items():
            seconds = timed(decide, options)
            if repeat >= 3:
                times[key].append(seconds)
    return times


def timed(call: Callable[[], object], options: Options) -> float:
    synchronise(options.device)
    start = time.perf_counter()
    call()
    synchronise(options.device)
    return time.perf_counter() - start


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def part_times(
    compiled: CompiledSampler, observation: Observation, noise: torch.Tensor, options: Options
) -> dict[str, float]:
    """Median milliseconds of the towers, of towers and prefix and of one call of the expert, each as the compiled path runs it."""
    backbone = compiled.policy.backbone
    pictures = torch.cat([images[:, -1] for images in observation.images.values()])
    bound = compiled.encode(compiled.policy, observation, 1)
    features = bound.level_features(torch.ones(1, device=noise.device))
    see = torch.compile(backbone.picture_features, fullgraph=True, dynamic=False)
    calls: dict[str, Callable[[], object]] = {
        "vision": lambda: see(pictures),
        "encoded": lambda: compiled.encode(compiled.policy, observation, 1),
        "call": lambda: compiled.evaluate(bound, noise[:, 0], features),
    }
    if noise.is_cuda:
        calls = {part: graphed(call) for part, call in calls.items()}
    times = {part: [timed(call, options) for _ in range(options.repeats + 3)][3:] for part, call in calls.items()}
    return {part: 1e3 * statistics.median(seconds) for part, seconds in times.items()}


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def parts_columns(parts: dict[str, float], objective: Objective) -> dict[str, str]:
    values = (parts["vision"], parts["encoded"] - parts["vision"], objective.num_sampling_steps * parts["call"])
    return {part: f"{value:.2f}" for part, value in zip(PARTS, values, strict=True)}


def cuda_columns(
    policy: Policy, call: Callable[[], object], seconds: float, objective: Objective, options: Options
) -> dict[str, str]:
    """Kernels of a decision, and the weights that it must read over its time."""
    if not options.device.startswith("cuda"):
        return {}
    read = num_bytes(policy.backbone) + objective.num_sampling_steps * num_bytes(policy.expert)
    return {"kernels": str(num_kernels(call)), "weights GB/s": f"{read / seconds / 1e9:.0f}"}


def num_kernels(call: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def num_bytes(module: torch.nn.Module) -> int:
    """Of the matrices that a call multiplies with: no tables, and no modulations, which are constants of the levels."""
    matrices = [
        layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and not name.endswith(".dense")
    ]
    return sum(weight.numel() * weight.element_size() for weight in matrices)


if __name__ == "__main__":
    main()
