"""A π0.5 and a SmolVLA that keep the full models' proportions, against the same weights as their references run them. Run from
the repository's root: `python tests/bench/policy_cost.py [pi05] [smolvla]` (CPU, a few minutes each). Every line is a ratio of CPU times
in one run; in brackets that of the floating-point operations of both, here and in the full models, where attention is a smaller share.

"Plain" is one joint attention over all tokens (tests/support), checked to give the same actions. A training step is forward and backward,
all weights trained, and its causes are added one after another:

    same inputs            two cameras, a prompt of 20 tokens in its bucket of 24, for both
    + padded prompt        π0.5: 200 slots; SmolVLA: 48; the mask hides them
    + third camera         absent, computed, hidden by the mask
    + nested checkpoints   each camera's tower computed twice, the trunk three times: checkpointed whole and layer by layer

That is how LeRobot's π0.5 trains where its memory option is on, and openpi's PyTorch trainer always. LeRobot's SmolVLA has no such option
and encodes an absent camera only where its configuration asks for one: there the second line is its habit, the last two what the
same habits would cost. Ten sampling steps are compared with a plain one that encodes the observation at every step."""

import copy
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from dense_pi import called, checkpointed, dense_joint_forward
from dense_smolvla import dense_smolvla_forward
from preset_policies import ACTION_DIM, CAMERAS, embodiment_for, make_small_pi05, make_small_smolvla
from preset_policies import statistics as some_statistics
from synthetic_training import random_batch

from vlatune.data.batch import Observation, Prompts
from vlatune.data.named import named
from vlatune.data.normalise import Statistics
from vlatune.policy.config import PolicyConfig
from vlatune.policy.policy import Policy
from vlatune.train.recipes import load_recipe

Forward = Callable[[Policy, Observation, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What is compared, and how its reference pads a prompt."""

    name: str
    recipe: str
    """Of the full size."""
    make: Callable[[], Policy]
    plain: Callable[..., Tensor]
    """A `Forward` with `run`, by which its parts are called."""
    num_slots: int


MODELS = {
    "pi05": Model(
        name="π0.5",
        recipe="pi05",
        make=make_small_pi05,
        plain=dense_joint_forward,
        num_slots=200,
    ),
    "smolvla": Model(
        name="SmolVLA",
        recipe="smolvla",
        make=make_small_smolvla,
        plain=dense_smolvla_forward,
        num_slots=48,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare."""

    models: tyro.conf.Positional[tuple[str, ...]] = tuple(MODELS)
    num_rounds: int = 7
    """Of each comparison; the median counts."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    for model in [named("model", name, MODELS) for name in options.models]:
        compare(model, options.num_rounds)


def compare(model: Model, num_rounds: int) -> None:
    def report(name: str, plain: Callable[[], Any], ours: Callable[[], Any]) -> None:
        """Neighbours in time are compared: what else the machine does, it does to both."""
        plain(), ours()
        ratios = sorted(seconds(plain) / seconds(ours) for _ in range(num_rounds))
        print(
            f"  {name}: plain / ours = {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            flush=True,
        )

    policy = model.make()
    observation = random_batch(policy, 1, torch.device("cpu")).observation
    padded = padded_prompt(observation, model.num_slots)
    third = with_absent_camera(padded)
    full_size = shapes_of(load_recipe(model.recipe).policy)
    noise, level = torch.randn(1, *policy.noise_shape), torch.full((1,), 0.5)
    sizes = f"{tokens(policy, observation)} and {tokens(policy, third)} prefix tokens"
    size = sum(p.numel() for p in policy.parameters()) / 1e6
    print(f"{model.name}: {size:.1f} M parameters, {sizes}, load {os.getloadavg()[0]:.1f}")

    def train(forward: Forward, seen: Observation) -> None:
        policy.zero_grad(set_to_none=True)
        forward(policy, seen, noise, level).square().mean().backward()

    causes: dict[str, tuple[Forward, Observation]] = {
        "same inputs": (partial(model.plain, run=called), observation),
        "+ padded prompt": (partial(model.plain, run=called), padded),
        "+ third camera": (partial(model.plain, run=called), third),
        "+ nested checkpoints": (partial(model.plain, run=checkpointed), third),
    }
    for name, (plain, seen) in causes.items():
        assert torch.allclose(ours(policy, observation, noise, level), plain(policy, seen, noise, level), atol=1e-4)
        here, full = (operations(p, plain, seen) / operations(p, ours, observation) for p in (policy, full_size))
        report(
            f"training step, {name} (operations {here:.2f}, at full size {full:.2f})",
            partial(train, plain, seen),
            partial(train, ours, observation),
        )

    @torch.inference_mode()
    def our_sample() -> Tensor:
        return policy.config.objective.sample(policy.bind(observation), noise)

    for name, seen in (("same inputs", observation), ("+ padded prompt + third camera", third)):

        @torch.inference_mode()
        def plain_sample(seen=seen) -> Tensor:
            x = noise
            for step in range(10):
                x = x - model.plain(policy, seen, x, torch.full((1,), 1 - step / 10)) / 10
            return x

        assert torch.allclose(our_sample(), plain_sample(), atol=1e-4), name
        report(f"ten sampling steps, {name}", plain_sample, our_sample)


def ours(policy: Policy, observation: Observation, x_BHA: Tensor, noise_level_B: Tensor) -> Tensor:
    return policy.bind(observation)(x_BHA, noise_level_B)


def shapes_of(config: PolicyConfig) -> Policy:
    """Without weights."""
    embodiment = dataclasses.replace(embodiment_for(config), cameras=(*CAMERAS, "absent"))
    numbers = Statistics(state=some_statistics(embodiment.state_dim), actions=some_statistics(ACTION_DIM))
    with torch.device("meta"):
        return Policy(config, embodiment, numbers)


def operations(policy: Policy, forward: Forward, seen: Observation) -> int:
    """Floating-point operations of a training step's matrix products, counted without computing them."""
    shapes = copy.deepcopy(policy).to("meta")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        output = forward(shapes, seen.to("meta"), torch.zeros(1, *policy.noise_shape), torch.zeros(1))
        output.square().mean().backward()
    return counter.get_total_flops()


def padded_prompt(observation: Observation, num_slots: int) -> Observation:
    prompts = observation.prompts
    more = (0, num_slots - prompts.ids_BL.shape[1])
    padded = Prompts(ids_BL=functional.pad(prompts.ids_BL, more), mask_BL=functional.pad(prompts.mask_BL, more))
    return dataclasses.replace(observation, prompts=padded)


def with_absent_camera(observation: Observation) -> Observation:
    return dataclasses.replace(
        observation,
        images={**observation.images, "absent": torch.zeros_like(observation.images[CAMERAS[0]])},
        image_mask={**observation.image_mask, "absent": torch.zeros(1, 1, dtype=torch.bool)},
    )


@torch.inference_mode()
def tokens(policy: Policy, observation: Observation) -> int:
    return policy.prefix(observation).mask_BP.shape[1]


def seconds(call: Callable[[], Any]) -> float:
    """Of this process's CPU time on one thread: a shared machine's wall clock says little."""
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    main()
