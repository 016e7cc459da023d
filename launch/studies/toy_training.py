"""One small expert, trained with any objective on the world of two ways and asked for paths.

The expert, its first weights, the data, their order, the optimizer and the number of steps are the same for every objective.
Its prefix is made by hand: one word that never changes, and the start as proprioception.

B batch, H waypoints, 2 coordinates (A and S alike).
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...policy.experts.expert import BoundExpert
from ...policy.experts.mlp import MLPExpert, MLPExpertConfig
from ...policy.experts.pooling import PoolingConfig
from ...policy.objectives.draws import DrawKeys
from ...policy.objectives.objective import Objective
from ...policy.prefix import Prefix, PrefixShape
from ...train.config import AdamWConfig
from ...train.optim import learning_rate_at, make_optimizer
from .two_ways import HORIZON, Demonstrations, demonstrate, draw_starts

WORD_WIDTH = 2
TRAINING, STARTS, FRESH, NOISE = range(4)
"""Streams of random numbers: none of them changes with another."""


@dataclass(frozen=True, kw_only=True)
class ToySettings:
    """What all objectives share."""

    num_demos: int = 2000
    """Demonstrations to train on."""
    num_steps: int = 2500
    """Optimizer steps."""
    batch_size: int = 64
    """Demonstrations per optimizer step."""
    learning_rate: float = 3e-3
    """AdamW's peak; it falls to zero on a cosine."""
    width: int = 256
    """Hidden features of the expert, an MLP."""
    num_layers: int = 3
    """Its hidden layers."""
    num_draws: int = 1
    """Noise draws per demonstration and step."""

    def __post_init__(self) -> None:
        for name in ("num_demos", "num_steps", "batch_size", "width", "num_layers", "num_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.batch_size > self.num_demos:
            raise ValueError(f"batch_size is {self.batch_size}; it must not be more than num_demos, {self.num_demos}")


def training_demos(settings: ToySettings, share_right: float) -> Demonstrations:
    rng = np.random.default_rng(TRAINING)
    return demonstrate(draw_starts(settings.num_demos, rng), share_right=share_right, rng=rng)


def evaluation_starts(num_starts: int, paths_per_start: int) -> np.ndarray:
    """(num_starts * paths_per_start, 2): starts of their own, each repeated for the paths from it."""
    return np.repeat(draw_starts(num_starts, np.random.default_rng(STARTS)), paths_per_start, axis=0)


def fresh_demos(starts_N2: np.ndarray, share_right: float, seed: int) -> Demonstrations:
    """Demonstrations from these starts that nothing was trained on; another seed draws others."""
    return demonstrate(starts_N2, share_right=share_right, rng=np.random.default_rng((seed, FRESH)))


def make_expert(settings: ToySettings, objective: Objective, seed: int) -> MLPExpert:
    """With the same first weights whatever the objective; an embedding for a second time input starts at zero beside them."""
    width = settings.width
    config = MLPExpertConfig(
        condition="pooling",
        pooling=PoolingConfig(kind="average", width=64),
        noise_level_width=64,
        width=width,
        num_layers=settings.num_layers,
    )
    shape = PrefixShape(kv=None, tokens={"language": WORD_WIDTH}, state_dim=2)

    def build(second_level: bool) -> MLPExpert:
        torch.manual_seed(seed)
        return MLPExpert(config, prefix=shape, horizon=HORIZON, action_dim=2, second_level=second_level)

    plain = build(second_level=False)
    if not objective.has_second_level:
        return plain
    expert = build(second_level=True)
    expert.load_state_dict(plain.state_dict(), strict=False)
    return expert


def bind(expert: MLPExpert, starts_B2: np.ndarray) -> BoundExpert:
    """The expert, bound to a prefix that knows the starts."""
    batch = len(starts_B2)
    word_B1D = torch.tensor([1.0, -1.0]).expand(batch, 1, WORD_WIDTH)
    prefix = Prefix(
        tokens={"language": (word_B1D, torch.ones(batch, 1, dtype=torch.bool))},
        state_BTS=torch.as_tensor(starts_B2, dtype=torch.float32)[:, None],
    )
    return expert.bind(prefix)


def train_expert(
    settings: ToySettings, objective: Objective, demos: Demonstrations, *, seed: int
) -> tuple[MLPExpert, float]:
    """The trained expert, and the milliseconds that an optimizer step took (their median)."""
    expert = make_expert(settings, objective, seed)
    optimization = AdamWConfig(
        learning_rate=settings.learning_rate,
        num_warmup_steps=min(100, settings.num_steps // 10),
        betas=(0.9, 0.99),
        weight_decay=1e-3,
    )
    optimizer = make_optimizer(expert, optimization)
    order = np.random.default_rng((seed, TRAINING))
    paths_NH2 = torch.from_numpy(demos.paths_NH2)
    valid_BHA = torch.ones(settings.batch_size, HORIZON, 2, dtype=torch.bool)
    taken_s = []
    for step in tqdm(range(settings.num_steps), desc="  train", unit="step", leave=False, dynamic_ncols=True):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings.num_steps, optimization)
        chosen_B = order.choice(len(paths_NH2), settings.batch_size, replace=False)
        actions_BHA = paths_NH2[chosen_B]
        index_B = torch.arange(settings.batch_size) + step * settings.batch_size
        draw = objective.draw(actions_BHA, DrawKeys(seed=seed, step=step, sample_index_B=index_B))
        loss = objective.loss(bind(expert, demos.starts_N2[chosen_B]), actions_BHA, valid_BHA, draw)
        total_weight = loss.weight_BHA.sum().clamp(min=1)
        ((loss.entries_BHA * loss.weight_BHA).sum() / total_weight).backward()
        torch.nn.utils.clip_grad_norm_(expert.parameters(), optimization.gradient_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        taken_s.append(time.perf_counter() - began)
    return expert.eval(), 1e3 * float(np.median(taken_s))


@torch.no_grad()
def sample_paths(expert: MLPExpert, objective: Objective, starts_N2: np.ndarray, seed: int) -> np.ndarray:
    """(N, H, 2): one path from every start; the noise is the same for every objective."""
    noise = np.random.default_rng((seed, NOISE)).standard_normal((len(starts_N2), HORIZON, 2), dtype=np.float32)
    paths: Tensor = objective.sample(bind(expert, starts_N2), torch.from_numpy(noise))
    return paths.numpy()


@torch.no_grad()
def milliseconds_per_path(expert: MLPExpert, objective: Objective, num_calls: int = 15) -> float:
    """Wall time of one decision: a batch of one, the median of several."""
    noise = torch.zeros(1, HORIZON, 2)
    taken_s = []
    for _ in range(num_calls):
        began = time.perf_counter()
        objective.sample(bind(expert, np.array([[0.0, -1.0]])), noise)
        taken_s.append(time.perf_counter() - began)
    return 1e3 * float(np.median(taken_s))
