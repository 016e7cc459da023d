"""What is done to a policy's blocks before training: activation checkpointing, and torch.compile block by block.

One graph for the whole model would delay every gradient hook until its backward pass has ended, and nothing would overlap; blocks of one
kind share one compiled program."""

from collections.abc import Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from ..policy.experts.dit import DiTBlock
from ..policy.experts.unet import FilmBlock
from ..policy.layers.decoder import DecoderBlock
from ..policy.policy import Policy

if TYPE_CHECKING:
    from .config import ActivationCheckpointingConfig

Part = Literal["vision", "language_model", "expert"]

BLOCKS = (CLIPEncoderLayer, SiglipEncoderLayer, DecoderBlock, DiTBlock, FilmBlock)


def transform_blocks(policy: Policy, checkpointing: "ActivationCheckpointingConfig", *, compiled: bool) -> None:
    """Call once, after adapters were added and before the engine wraps the policy. Names of parameters stay as they are.

    Raises ValueError for a part without blocks."""
    blocks = blocks_of(policy)
    for part in checkpointing.parts:
        if part not in blocks:
            raise ValueError(
                f"activation_checkpointing.parts names {part!r}, which has no blocks in this policy; parts that have: {', '.join(blocks)}"
            )
        for block in blocks[part][:: checkpointing.every]:
            _checkpoint(block)
    if compiled:
        for block in (block for part in blocks.values() for block in part):
            _compile(block)


def blocks_of(policy: Policy) -> dict[Part, Sequence[nn.Module]]:
    """The blocks of every part that has some, in order."""
    roots: dict[Part, nn.Module | None] = {
        "vision": getattr(policy.backbone, "vision_tower", None),
        "language_model": getattr(policy.backbone, "language_model", None),
        "expert": policy.expert,
    }
    found = {
        part: [module for module in root.modules() if isinstance(module, BLOCKS)]
        for part, root in roots.items()
        if root is not None
    }
    return {part: blocks for part, blocks in found.items() if blocks}


def _checkpoint(block: nn.Module) -> None:
    # Methods of the instance, not closures: compiled blocks of one kind then share one program.
    block.forward = MethodType(_checkpointed_forward, block)
    if isinstance(block, DecoderBlock):
        block.cross = MethodType(_checkpointed_cross, block)  # type: ignore[method-assign]


def _checkpointed_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not _is_recorded(block, args[0]):
        return type(block).forward(block, *args, **kwargs)
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, **kwargs)


def _checkpointed_cross(block: DecoderBlock, *args: Any) -> Any:
    if not _is_recorded(block, args[0]):
        return type(block).cross(block, *args)
    return checkpoint(type(block).cross, block, *args, use_reentrant=False)


def _is_recorded(block: nn.Module, tokens: Tensor) -> bool:
    """Whether a backward pass will come back here: not in validation, in the search of RS-IMLE, or below what is trained."""
    is_trained = tokens.requires_grad or any(parameter.requires_grad for parameter in block.parameters())
    return torch.is_grad_enabled() and is_trained


def _compile(block: nn.Module) -> None:
    block.compile()
    if isinstance(block, DecoderBlock):
        block.cross = torch.compile(block.cross)  # type: ignore[method-assign]
