"""An export against the policy that it was made of: the same inputs through onnxruntime and through torch."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...data.batch import Observation, Prompts, RawObservation
from ..parity import relative_difference
from ..policy import Policy
from .bound_tensors import tensors_of
from .description import BucketGraphs, Differences
from .graph_inputs import named_inputs, observation_of
from .onnx_policy import OnnxPolicy, filled_up

LEVELS = (1.0, 0.55, 0.1)
"""Of the rows of the step graph's random inputs, in turn."""
SEEDS = (0, 1, 2)
"""Of random inputs: with one row and two cameras, each camera is missing once."""


def random_observation(
    policy: Policy, *, rows: int, prompt_tokens: int, cameras: Sequence[str], seed: int
) -> Observation:
    """Random numbers of the prefix graph's shapes: states of the data's spread, prompts of different lengths, and where there are several
    cameras, now and then a row without one."""
    config, embodiment = policy.config, policy.embodiment
    random = np.random.default_rng(seed)
    px, times = config.backbone.image_px, len(config.observation_offsets)
    length_B = random.integers(1, prompt_tokens + 1, rows)
    length_B[-1] = prompt_tokens
    mask_BL = torch.from_numpy(np.arange(prompt_tokens) < length_B[:, None])
    ids_BL, embedding_BLE = torch.zeros(rows, prompt_tokens, dtype=torch.int64), None
    if config.backbone.reads_embeddings:  # and no ids
        shape = (rows, prompt_tokens, embodiment.encoder_width or 0)
        embedding_BLE = torch.from_numpy(random.standard_normal(shape, dtype=np.float32)) * mask_BL[..., None]
    else:
        ids_BL = torch.from_numpy(random.integers(0, embodiment.vocab_size, (rows, prompt_tokens))) * mask_BL
    # C + 1 cases in turn, beginning with the seed's: camera 0 is missing, camera 1, …, none.
    missing_B = (np.arange(rows) + seed) % (len(cameras) + 1) if len(cameras) > 1 else np.ones(rows)
    return Observation(
        images={
            camera: torch.from_numpy(random.integers(0, 256, (rows, times, px, px, 3), dtype=np.uint8))
            for camera in cameras
        },
        image_mask={
            camera: torch.from_numpy(missing_B != index)[:, None].repeat(1, times)
            for index, camera in enumerate(cameras)
        },
        state_BTS=_random_states(policy, random, rows),
        prompts=Prompts(
            ids_BL=ids_BL,
            mask_BL=mask_BL,
            embedding_BLE=embedding_BLE,
        ),
    )


def _random_states(policy: Policy, random: np.random.Generator, rows: int) -> Tensor:
    """(B, T, S) in raw units, as spread as the data."""
    shape = (rows, len(policy.config.observation_offsets), policy.embodiment.state_dim)
    raw: Tensor = policy.state_normaliser.inverse(torch.from_numpy(random.standard_normal(shape, dtype=np.float32)))
    return raw


def like_recorded(
    policy: Policy, *, rows: int, cameras: Sequence[str], texts: Sequence[str], seed: int
) -> list[RawObservation]:
    """Smooth pictures of a camera's format, states of the data's spread, and the instructions in turn."""
    random = np.random.default_rng(seed)
    times, px = len(policy.config.observation_offsets), policy.config.backbone.image_px
    shape = (px, px + px // 3)
    slopes = np.stack(np.meshgrid(*(np.linspace(0, 1, side) for side in shape), indexing="ij"), axis=-1)

    def picture_TRC3() -> np.ndarray:
        colours = np.einsum("rcd,tdk->trck", slopes, random.uniform(-0.5, 0.5, (times, 2, 3)))
        return (255 * np.abs(colours)).astype(np.uint8)

    return [
        RawObservation(
            images={camera: picture_TRC3() for camera in cameras},
            state_TS=state_TS,
            instruction=texts[row % len(texts)],
        )
        for row, state_TS in enumerate(_random_states(policy, random, rows).numpy())
    ]


def differences(policy: Policy, exported: OnnxPolicy, graphs: BucketGraphs, texts: Sequence[str]) -> Differences:
    """Of one bucket. `texts` are instructions whose prompts fit it."""
    on_random = [_on_random_inputs(policy, exported, graphs, seed) for seed in SEEDS]
    bucket = graphs.bucket
    raw = like_recorded(policy, rows=bucket.batch, cameras=bucket.cameras, texts=texts, seed=0)
    seen = filled_up(exported.prepared(raw), bucket)
    observation = observation_of({name: torch.from_numpy(value) for name, value in seen.items()})
    noise_BHA = torch.randn(bucket.batch, *policy.noise_shape, generator=torch.Generator().manual_seed(0))
    chunks_BHA = exported.sampled(graphs, seen, noise_BHA.numpy(), policy.config.objective)
    return Differences(
        prefix=float(np.max([prefix for prefix, _ in on_random])),
        output=float(np.max([output for _, output in on_random])),
        actions=relative_difference(
            torch.from_numpy(exported.description.actions.raw(chunks_BHA)), policy.sample(observation, noise_BHA)
        ),
    )


def _on_random_inputs(policy: Policy, exported: OnnxPolicy, graphs: BucketGraphs, seed: int) -> tuple[float, float]:
    """Of the prefix graph's outputs, and of the step graph's on top of them."""
    bucket = graphs.bucket
    observation = random_observation(
        policy, rows=bucket.batch, prompt_tokens=bucket.prompt_tokens, cameras=bucket.cameras, seed=seed
    )
    bound = policy.bind(observation)
    prefix = exported.prefix(graphs, {name: tensor.numpy() for name, tensor in named_inputs(observation).items()})
    x_BHA = torch.randn(bucket.batch, *policy.noise_shape, generator=torch.Generator().manual_seed(seed))
    level_B = torch.tensor([LEVELS[(row + seed) % len(LEVELS)] for row in range(bucket.batch)])
    second_level_B = level_B / 2 if policy.config.objective.has_second_level else None
    output_BHA = exported.bound(graphs, prefix)(x_BHA, level_B, second_level_B)
    return _largest(tensors_of(bound), prefix), relative_difference(output_BHA, bound(x_BHA, level_B, second_level_B))


def _largest(torchs: Mapping[str, Tensor], theirs: Mapping[str, np.ndarray]) -> float:
    """Over tensors by name; a mask that differs counts as wholly different."""
    found = [0.0]
    for name, tensor in torchs.items():
        other = torch.from_numpy(theirs[name])
        if tensor.is_floating_point() and tensor.any():
            found.append(relative_difference(other, tensor))
        else:
            found.append(float(not torch.equal(other, tensor)))
    return float(np.max(found))  # NaN if there is one
