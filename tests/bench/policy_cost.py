"""A π0.5 that keeps the full model's proportions, against the same weights as one plain joint attention. Run from the
repository's root: `python tests/bench/policy_cost.py` (CPU, two minutes). Every line is a ratio of CPU times in one run.

`same inputs`: two cameras and a prompt in its bucket for both. `as the references run it`: the plain one also computes a third,
absent camera and a prompt padded to 200 tokens, which its mask then hides: the same loss and actions."""

import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from dense_pi import dense_joint_forward
from preset_policies import CAMERAS, make_batch, make_small_pi05

NUM_ROUNDS = 5


def main() -> None:
    torch.set_num_threads(1)
    policy = make_small_pi05()
    batch = make_batch(policy.config, batch=1)
    seen = {camera: torch.ones(1, 1, dtype=torch.bool) for camera in CAMERAS}
    observation = dataclasses.replace(batch.observation, image_mask=seen)
    prompts = observation.prompts
    padded = dataclasses.replace(
        observation,
        images={**observation.images, "absent": torch.zeros_like(observation.images["agentview"])},
        image_mask={**seen, "absent": torch.zeros(1, 1, dtype=torch.bool)},
        prompts=dataclasses.replace(
            prompts,
            ids_BL=torch.nn.functional.pad(prompts.ids_BL, (0, 200 - prompts.ids_BL.shape[1])),
            mask_BL=torch.nn.functional.pad(prompts.mask_BL, (0, 200 - prompts.mask_BL.shape[1])),
        ),
    )
    noise = torch.randn(1, *policy.noise_shape)
    level = torch.full((1,), 0.5)

    def train(output):
        policy.zero_grad(set_to_none=True)
        output().square().mean().backward()

    @torch.inference_mode()
    def plain_sample(seen_observation):
        x = noise
        for step in range(10):
            x = x - dense_joint_forward(policy, seen_observation, x, torch.full((1,), 1 - step / 10)) / 10
        return x

    @torch.inference_mode()
    def our_sample():
        return policy.config.objective.sample(policy.bind(observation), noise)

    for plain_observation in (observation, padded):
        assert torch.allclose(our_sample(), plain_sample(plain_observation), atol=1e-4)
    ours = {
        "training step (forward and backward)": lambda: train(lambda: policy.bind(observation)(noise, level)),
        "ten sampling steps": our_sample,
    }
    for inputs, plain_observation in (("same inputs", observation), ("as the references run it", padded)):
        plain = {
            "training step (forward and backward)": lambda seen_observation=plain_observation: train(
                lambda: dense_joint_forward(policy, seen_observation, noise, level)
            ),
            "ten sampling steps": lambda seen_observation=plain_observation: plain_sample(seen_observation),
        }
        for name, our_call in ours.items():
            ratios = [seconds(plain[name]) / seconds(our_call) for _ in range(NUM_ROUNDS)]
            print(
                f"{name}, {inputs}: plain / ours = {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )


def seconds(call) -> float:
    """Of this process's CPU time on one thread: a shared machine's wall clock says little."""
    call()
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    main()
