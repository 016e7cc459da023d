"""How much memory activations take, counted on torch's meta device by running the real policy, forward and backward, as a GPU would.

What lives at a time depends on shapes and on the order of operations alone, so the count is what an allocator would have given out."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data.batch import Batch
from ..policy.policy import Policy
from .cost import training_loss


@dataclass(frozen=True, kw_only=True)
class ActivationMemory:
    """The most bytes that a forward and backward pass holds beside weights and gradients, as a straight line over the micro-batch."""

    fixed: float
    per_sample: float

    def at(self, micro_batch: int) -> float:
        return self.fixed + self.per_sample * micro_batch


def activation_memory(
    policy: Policy, batch_of: Callable[[int], Batch], *, autocast: bool, micro_batches: tuple[int, int] = (1, 32)
) -> ActivationMemory:
    """Of a policy on the meta device, with its blocks checkpointed or not, in the dtype that its weights have; `autocast`: products in
    bfloat16 over float32 weights. The line through the peaks at two micro-batches: between them the peak, a maximum of straight lines,
    is at most that."""
    few, many = micro_batches
    at_few, at_many = (peak_bytes(policy, batch_of(size), autocast=autocast) for size in micro_batches)
    per_sample = (at_many - at_few) / (many - few)
    return ActivationMemory(fixed=at_few - few * per_sample, per_sample=per_sample)


def peak_bytes(policy: Policy, batch: Batch, *, autocast: bool) -> int:
    """The most memory that one forward and backward pass allocates at a time: activations and their gradients, and each parameter's
    gradient for the moment in which it is made. Not the weights, and not the batch."""
    hooks = [p.register_post_accumulate_grad_hook(_forget) for p in policy.parameters() if p.requires_grad]
    live = LiveBytes([*policy.parameters(), *policy.buffers()])
    with live, AsOnGpu(autocast=autocast) as kernels:
        loss = training_loss(policy, batch)
        kernels.end_of_forward()
        # The engine itself: within `backward`, which a mode may replace, `AsOnGpu` would be off while blocks are computed again.
        _engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    for hook in hooks:
        hook.remove()
    return live.peak


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made within it that still exist, and the most there were."""

    def __init__(self, not_counted: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in not_counted}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._see(result.untyped_storage())
        self.peak = max(self.peak, self.now)
        return results

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, address: int) -> None:
        self.now -= self._sizes.pop(address)


PRODUCTS = {functional.linear, functional.conv1d, functional.conv2d, torch.matmul, torch.bmm}
"""What autocast does in bfloat16, of all that policies call; the rest follows from the dtypes of its inputs."""


class AsOnGpu(TorchFunctionMode):
    """Lets the meta device keep for the backward pass what a GPU keeps: attention is one kernel there, with a sum for each row, where the
    meta device makes the whole matrix of scores. Optionally autocast, which knows no meta device."""

    def __init__(self, *, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast
        self._copies: dict[Tensor, Tensor] | None = {}

    def end_of_forward(self) -> None:
        """Autocast keeps a weight's bfloat16 copy until then, for further calls with it."""
        self._copies = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_attention = func is functional.scaled_dot_product_attention
        if self.autocast and (is_attention or func in PRODUCTS):
            args = [self._cast(value) for value in args]
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        return _fused_attention(*args, **kwargs) if is_attention else func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        is_kept = isinstance(value, nn.Parameter) and value.requires_grad and torch.is_grad_enabled()
        if not is_kept or self._copies is None:
            return value.to(torch.bfloat16)
        if value not in self._copies:
            self._copies[value] = value.to(torch.bfloat16)
        return self._copies[value]


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    # The one fused kernel that takes a mask and grouped heads on the meta device. It keeps what those of a GPU keep.
    attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return attended
