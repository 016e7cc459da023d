"""What K noise draws (or candidates) per encoded prefix cost in training, the backbone frozen: `python tests/bench/draws_cost.py`.

A small π0.5 in the full model's proportions, chunk 10, batch 1, CPU. Every figure is a ratio of CPU times
to one draw in the same run."""

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from preset_policies import make_batch, make_small_pi05

from vlatune.policy.objectives.draws import DrawKeys
from vlatune.policy.objectives.flow import Flow

NUM_ROUNDS = 15
NUM_DRAWS = (1, 2, 4, 8, 16)


def main() -> None:
    torch.set_num_threads(1)
    policy = make_small_pi05()
    policy.backbone.requires_grad_(False)
    batch = make_batch(policy.config, batch=1)
    keys = DrawKeys(seed=0, step=0, sample_index_B=batch.sample_index_B)

    def step_seconds(num_draws: int) -> float:
        policy.config = replace(policy.config, objective=Flow(num_draws=num_draws))
        start = time.process_time()
        policy.zero_grad(set_to_none=True)
        policy(batch, keys).entries_BHA.mean().backward()
        return time.process_time() - start

    for num_draws in NUM_DRAWS:
        step_seconds(num_draws)
    rounds = [{num_draws: step_seconds(num_draws) for num_draws in NUM_DRAWS} for _ in range(NUM_ROUNDS)]
    print(f"one draw: {1e3 * statistics.median(each[1] for each in rounds):.0f} ms")
    for num_draws in NUM_DRAWS[1:]:
        ratios = sorted(each[num_draws] / each[1] for each in rounds)
        print(f"{num_draws} draws / one draw = {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
