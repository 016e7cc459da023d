"""A training step of clip_flow on vision features: every row's prompt through CLIP's frozen text tower, or each different one once.

    PYTHONPATH=tests/support python tests/bench/repeated_prompts.py [--batch-size 64] [--repeats 7]

The full-size policy with random weights and one instruction in the whole batch, as a run of one task has it. Forward and backward, one
thread, the two kinds alternating; the ratio is of medians.
"""

import statistics
import time
from dataclasses import dataclass, replace

import torch
import tyro
from synthetic_training import random_batch, random_policy

from vlatune.data.batch import Batch, Repeats
from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.presets import clip_flow


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much to measure."""

    batch_size: int = 64
    """Samples of a step."""
    repeats: int = 7
    """Steps of each kind."""


def one_instruction(batch: Batch) -> Batch:
    """The first row's prompt for all rows, and one vector per camera in place of its pictures."""
    size = len(batch.sample_index_B)
    seen, first = batch.observation, torch.zeros(size, dtype=torch.int64)
    prompts = replace(seen.prompts, ids_BL=seen.prompts.ids_BL[first], mask_BL=seen.prompts.mask_BL[first])
    features = {camera: torch.randn(size, 1, 1, 512) for camera in seen.images}
    return replace(batch, observation=replace(seen, images={}, features=features, prompts=prompts))


def main(options: Options) -> None:
    torch.set_num_threads(1)
    policy = random_policy(clip_flow(), torch.device("cpu"), torch.float32)
    every = one_instruction(random_batch(policy, options.batch_size, torch.device("cpu")))
    prompts = every.observation.prompts
    repeats = Repeats(
        row_R=torch.zeros(1, dtype=torch.int64), which_B=torch.zeros(options.batch_size, dtype=torch.int64)
    )
    once = replace(every, observation=replace(every.observation, prompts=replace(prompts, repeats=repeats)))
    seconds: dict[str, list[float]] = {"every row": [], "each different one": []}
    for step in range(options.repeats + 1):
        for name, batch in zip(seconds, (every, once), strict=True):
            start = time.perf_counter()
            loss = policy(batch, DrawKeys(seed=0, step=step, sample_index_B=batch.sample_index_B))
            loss.entries_BHA.mean().backward()
            if step:  # the first is for warming up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(", ".join(f"{name} {1000 * value:.0f} ms" for name, value in medians.items()))
    print(f"ratio {medians['every row'] / medians['each different one']:.1f}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
