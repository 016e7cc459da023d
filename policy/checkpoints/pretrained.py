"""A policy about to be trained takes its weights from elsewhere: one of our checkpoints, a public policy, a plain vision or
language model. Every tensor of a source is used or on a named list of dropped ones, and a module is taken whole or not at all."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from ...data.episodes import DataError
from ..policy import Policy
from .layout import COMPLETE
from .plain_models import is_plain, local_folder, read_plain
from .public import read_public
from .weight_files import described_problems


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What one source gave."""

    source: str
    num_tensors: int
    parts: tuple[str, ...]
    """Modules of the policy, as `backbone.vision_tower`."""


def load_pretrained(policy: Policy, sources: Sequence[str]) -> tuple[list[Taken], list[str]]:
    """Fill `policy` from the `sources` (folders or hub names), a later one over an earlier one.

    Returns what each gave, and the modules that none covers, which keep their random weights. Raises DataError, before
    anything is changed, for a source that cannot be read, has a weight that this policy has no place for or another shape of,
    or fills a module in part."""
    own = policy.state_dict()
    parts = {name: _part(name) for name in own}
    taken, collected = [], dict[str, Tensor]()
    for source in sources:
        weights = _kept(policy, read_source(local_folder(source)))
        unknown = sorted(weights.keys() - own.keys())
        misshapen = sorted(
            f"{name} is {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
            for name, tensor in weights.items()
            if name in own and own[name].shape != tensor.shape
        )
        covered = {parts[name] for name in weights if name in own}
        missing = sorted(name for name in own if parts[name] in covered and name not in weights)
        problems = described_problems(missing=missing, unexpected=unknown, misshapen=misshapen)
        if problems:
            raise DataError(
                f"{source} does not fit this policy: {problems}. Give the policy the sizes of the checkpoint"
            )
        collected |= weights
        taken.append(Taken(source=source, num_tensors=len(weights), parts=tuple(sorted(covered))))
    policy.load_state_dict(collected, strict=False)
    return taken, sorted(set(parts.values()) - {part for source in taken for part in source.parts})


def read_source(folder: Path) -> dict[str, Tensor]:
    """Weights under our names, of any source that can be read."""
    if (folder / COMPLETE).exists():
        return load_file(folder / "model.safetensors")
    return read_plain(folder) if is_plain(folder) else dict(read_public(folder).weights)


def _kept(policy: Policy, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the layers beyond the policy's depth: SmolVLA reads 16 of SmolVLM's 32."""
    layer = "backbone.language_model.layers."
    here = {name.split(".")[3] for name in policy.state_dict() if name.startswith(layer)}
    return {
        name: tensor
        for name, tensor in weights.items()
        if not (match := re.match(re.escape(layer) + r"(\d+)\.", name)) or not here or match[1] in here
    }


def _part(name: str) -> str:
    """The module that is taken whole: the expert (or its U-Net), or one of the backbone's."""
    whole_expert = name.startswith("expert.") and not name.startswith("expert.unet.")
    return "expert" if whole_expert else ".".join(name.split(".")[:2])
