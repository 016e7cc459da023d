"""How a policy does on episodes that it was not trained on: its loss, and the actions it would have taken."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.batch import Batch
from ..data.loader import Loader
from ..policy.objectives.draws import DrawKeys
from ..policy.policy import Policy
from .config import TrainConfig
from .engine import mean_over_ranks


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    loader: Loader,
    config: TrainConfig,
    action_names: Sequence[str],
) -> dict[str, float]:
    """Over the validation episodes, or the batches of `overfit_batches`, with the same noise every time and no dropout. All ranks call it.
    The mean loss; of chunks that the policy samples, per dimension `action_error_<name>`, the mean absolute difference from the
    demonstrated actions in units of their deviation, and their mean `action_error`; `action_mse`, the mean square of the difference as the
    policy normalises actions; and `action_magnitude`, the sampled actions' mean size over the demonstrated ones': a timid policy shows
    here first."""
    policy = accelerator.unwrap_model(model)
    assert isinstance(policy, Policy)
    model.eval()
    loss = torch.zeros((), device=accelerator.device)
    sums: Tensor | None = None
    num_batches = config.num_validation_batches
    if config.overfit_batches is not None:
        num_batches = min(num_batches, config.overfit_batches * config.num_accumulation_steps)
    for index in range(num_batches):
        batch = loader.batch(index)
        keys = DrawKeys(seed=config.seed, step=0, sample_index_B=batch.sample_index_B)
        batch = batch.to(accelerator.device)
        loss += mean_over_ranks(accelerator, model(batch, keys))
        of_batch = _action_sums(policy, batch, keys)
        sums = of_batch if sums is None else sums + of_batch
    model.train()
    assert sums is not None
    values = {"validation_loss": float(accelerator.reduce(loss, reduction="mean")) / num_batches}
    error_A, size_A, wanted_size_A, square_A, count_A = accelerator.reduce(sums, reduction="sum").unbind()
    errors = (error_A / count_A).tolist()
    values |= {f"action_error_{name}": error for name, error in zip(action_names, errors, strict=True)}
    return values | {
        "action_error": sum(errors) / len(errors),
        "action_mse": float((square_A / count_A).mean()),
        "action_magnitude": float(size_A.sum() / wanted_size_A.sum().clamp(min=1e-12)),
    }


def _action_sums(policy: Policy, batch: Batch, keys: DrawKeys) -> Tensor:
    """(5, A): absolute errors, sizes of the sampled and of the demonstrated actions, all over the data's deviation; squared errors as the
    policy normalises actions; and how many."""
    _, noise_BHA = keys.draw(1, policy.noise_shape, batch.actions_BHA.device)
    sampled_BHA = policy.sample(batch.observation, noise_BHA)
    deviation = policy.statistics.actions.std
    assert deviation is not None  # statistics of caches are whole
    scale_A = torch.tensor(deviation, device=sampled_BHA.device).clamp(min=1e-6)
    valid_BH1 = batch.valid_BH[..., None].to(sampled_BHA.dtype)
    square_BHA = (policy.action_normaliser(sampled_BHA) - policy.action_normaliser(batch.actions_BHA)).square()
    wanted_BHA = batch.actions_BHA / scale_A
    sampled_BHA = sampled_BHA / scale_A
    sizes = (sampled_BHA.abs(), wanted_BHA.abs())
    parts = ((sampled_BHA - wanted_BHA).abs(), *sizes, square_BHA, torch.ones_like(sampled_BHA))
    return torch.stack([(part * valid_BH1).sum(dim=(0, 1)) for part in parts])
