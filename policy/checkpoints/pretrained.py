"""A policy about to be trained takes its weights from elsewhere: one of our checkpoints, a public policy, a plain vision or
language model. Every tensor of a source is used or on a named list of dropped ones, and a module is taken whole or not at all."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from ...data.episodes import DataError
from ...data.language import Language
from ..policy import Policy
from .folder import read_policy
from .layout import COMPLETE
from .plain_models import is_plain, local_folder, read_plain
from .public import read_public
from .weight_files import described_problems

TOKEN_TABLE = "backbone.language_model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What one source gave."""

    source: str
    num_tensors: int
    parts: tuple[str, ...]
    """Modules of the policy, as `backbone.vision_tower`."""


def load_pretrained(
    policy: Policy, sources: Sequence[str], kept_ids: Sequence[int] | None = None
) -> tuple[list[Taken], list[str]]:
    """Fill `policy` from the `sources` (folders or hub names), a later one over an earlier one. With `kept_ids`, those of a compact
    tokenizer, only these rows of a table of tokens.

    Returns what each gave, and the modules that none covers, which keep their random weights. Raises DataError, before
    anything is changed, for a source that cannot be read, has a weight that this policy has no place for or another shape of,
    or fills a module in part."""
    own = policy.state_dict()
    parts = {name: _part(name) for name in own}
    taken, collected = [], dict[str, Tensor]()
    for source in sources:
        folder = local_folder(source)
        _check_layouts(policy, folder)
        weights = _kept(policy, read_source(folder))
        if kept_ids is not None and TOKEN_TABLE in weights and not _has_kept_ids(folder, kept_ids):
            weights[TOKEN_TABLE] = weights[TOKEN_TABLE][list(kept_ids)]
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


def _has_kept_ids(folder: Path, kept_ids: Sequence[int]) -> bool:
    """Whether a checkpoint of ours has these rows and no others. Raises DataError if it has other ones."""
    if not (folder / COMPLETE).exists():
        return False
    theirs = Language.load(folder / "language").kept_ids
    if theirs is not None and tuple(theirs) != tuple(kept_ids):
        raise DataError(
            f"{folder} was trained with a compact table of {len(theirs)} tokens, this run's has {len(kept_ids)} and not the same ones; give "
            f"--language {folder / 'language'}"
        )
    return theirs is not None


def read_source(folder: Path) -> dict[str, Tensor]:
    """Weights under our names, of any source that can be read."""
    if (folder / COMPLETE).exists():
        return read_policy(folder)[0].state_dict()  # whole, with adapters merged and what the run kept frozen
    return read_plain(folder) if is_plain(folder) else dict(read_public(folder).weights)


def _check_layouts(policy: Policy, folder: Path) -> None:
    """Refuse a checkpoint of ours that learnt another place for the robot's numbers. One without slots, a public base that was
    converted, has learnt none."""
    if not (folder / COMPLETE).exists():
        return
    stored = json.loads((folder / "config.json").read_text())["policy"]
    for name in ("state_layout", "action_layout"):
        theirs, layout = stored[name], getattr(policy.config, name)
        ours = None if layout is None else json.loads(json.dumps(asdict(layout)))
        if theirs is not None and theirs["slots"] is not None and theirs != ours:
            raise DataError(
                f"{folder} was trained with {name} {theirs['name']!r}, and this run has {ours['name'] if ours else 'none'!r}: a number that "
                f"moves to another slot means something else; train with the recipe that has {theirs['name']!r}, or from other weights"
            )


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
