"""A GPU played on the CPU, so that what is written for one runs where there is none: the numbers are real, the device's rules are CUDA's.

Its tensors say `cuda:0` and hold their values in the machine's memory. Mixing them with the CPU's is refused, as CUDA does. A CUDA graph
records every operation with the very memory that it read and wrote and, played back, repeats them there: what Python decided while it was
recorded stays decided, what CUDA cannot record (waiting for a value, copies from and to the machine's memory, shapes that depend on
values) is refused. Kernels, streams and speed are not played: a GPU's own tests are those marked `gpu`."""

import contextlib
import ctypes
import functools
import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
"""By whole numbers, as a rule: then their shapes are known."""
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
extern "C" void put_guard() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(&guard);
}
"""
"""Without one torch's builds for CPUs refuse the very name of the device."""


needs_pretended_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or shutil.which("g++") is None,
    reason="a real GPU is here, or no g++ to build a pretended one's stub",
)


class OnGpu(torch.Tensor):
    """`host` has the values."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> Self:
        with torch.inference_mode(False):  # a view's bookkeeping is written on it, even in inference mode
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                host.shape,
                strides=host.stride(),
                storage_offset=host.storage_offset(),
                dtype=host.dtype,
                device=DEVICE,
            )
        tensor.host = host
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was called on a pretended GPU's tensor outside of pretended_gpu()")


class RecordedGraph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.num_replays = 0

    def record(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        keep = functools.partial(tree_map, lambda value: value.clone() if _is_on_cpu(value) else value)
        args, kwargs = keep(args), keep(kwargs)
        read = {value.host.untyped_storage().data_ptr() for value in tree_leaves((args, kwargs)) if _is_ours(value)}
        written = [value for value in tree_leaves(found) if isinstance(value, torch.Tensor)]
        new = [None if value.untyped_storage().data_ptr() in read else value for value in written]
        self.calls.append((func, _hosts(args), _hosts(kwargs), new))

    def replay(self) -> None:
        self.num_replays += 1
        for func, args, kwargs, places in self.calls:
            found = [value for value in tree_leaves(func(*args, **kwargs)) if isinstance(value, torch.Tensor)]
            for place, value in zip(places, found, strict=True):
                if place is not None:  # else a view of what it read, or that itself
                    place.copy_(value)


class PretendedGpu(TorchDispatchMode):
    """While it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.recording: RecordedGraph | None = None
        self.graphs: list[RecordedGraph] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not ATTENTION and (found := self._in_parts(func, args, kwargs)) is not NotImplemented:
            return found
        values = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        ours = [value for value in values if _is_ours(value)]
        asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        is_here = asked.type == "cuda" if asked is not None else bool(ours)
        if not ours and not is_here:
            return func(*args, **kwargs)
        between = (bool(ours) and asked is not None and not is_here) or (
            is_here and any(_is_on_cpu(value) for value in values)
        )
        is_copy = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if between and not is_copy and any(value.dim() for value in values if _is_on_cpu(value)):
            raise RuntimeError(f"{func}: expected all tensors on one device; got {[str(v.device) for v in values]}")
        if self.recording is not None:
            self._refuse_what_cuda_cannot_record(func, args, between and is_copy)
        if asked is not None:
            kwargs["device"] = CPU
        found = func(*_hosts(args), **_hosts(kwargs))
        if self.recording is not None:
            self.recording.record(func, args, kwargs, found)
        if not is_here:
            return found
        known = {id(value.host) if _is_ours(value) else id(value): value for value in values}

        def ours_again(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return known[id(value)] if id(value) in known else OnGpu(value)

        return tree_map(ours_again, found)

    def _in_parts(self, func: Any, args: Any, kwargs: Any) -> Any:
        """In inference mode operations come whole that are made of others, which say more plainly what they read and write."""
        if not func._can_decompose():
            return NotImplemented
        with self:
            return func.decompose(*args, **kwargs)

    @staticmethod
    def _refuse_what_cuda_cannot_record(func: Any, args: Any, is_copy_between: bool) -> None:
        if func is ATTENTION:  # could drop out
            return
        tags = {torch.Tag.data_dependent_output, torch.Tag.nondeterministic_seeded}
        if func not in INDEXING or any(index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(args[1])):
            tags.add(torch.Tag.dynamic_output_shape)
        if is_copy_between or tags & set(func.tags):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")

    @contextlib.contextmanager
    def capture(self, graph: RecordedGraph, **_: Any) -> Iterator[None]:
        """`torch.cuda.graph`."""
        self.recording = graph
        self.graphs.append(graph)
        try:
            yield
        finally:
            self.recording = None


def _is_ours(value: Any) -> bool:
    return isinstance(value, OnGpu)


def _hosts(tree: Any) -> Any:
    return tree_map(lambda value: value.host if _is_ours(value) else value, tree)


def _is_on_cpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not _is_ours(value)


@functools.cache
def _library() -> ctypes.CDLL:
    root = Path(torch.__file__).parent
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", "guard.cpp", "-o", "guard.so"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "guard.cpp").write_text(GUARD)
        subprocess.run([*command, f"-L{root / 'lib'}", "-lc10"], cwd=folder, check=True)
        return ctypes.CDLL(f"{folder}/guard.so")


class _Stream:
    def wait_stream(self, other: "_Stream") -> None:
        pass


class _Event:
    """Work is done when it has been asked for."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at_s = math.nan

    def record(self, stream: _Stream) -> None:
        self.at_s = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        return 1000 * (end.at_s - self.at_s)


@contextlib.contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    """`device="cuda"` works, torch.compile changes nothing, and graphs are recorded."""
    _library().put_guard()
    gpu = PretendedGpu()
    nothing: Callable[..., Any] = contextlib.nullcontext
    played = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "current_stream": lambda *_: _Stream(),
        "Stream": _Stream,
        "Event": _Event,
        "device": nothing,
        "stream": nothing,
        "CUDAGraph": RecordedGraph,
        "graph": gpu.capture,
        "graph_pool_handle": lambda: (0, 1),
        "synchronize": lambda *_: None,
    }
    before = torch._C._only_lift_cpu_tensors()
    with monkeypatch.context() as patch, sdpa_kernel(SDPBackend.MATH), gpu:
        for name, value in played.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "compile", lambda function, **_: function)
        # A parameter becomes another tensor when its module is moved, instead of getting other memory.
        patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        torch._C._set_only_lift_cpu_tensors(True)  # or torch.tensor(…, device="cuda") would go to a real one
        try:
            yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
