"""When each phase of each training step began, seen from outside of the loop."""

import itertools
import time
from typing import Any

import torch

PHASES = ("forward", "backward", "optimizer")
"""Of a step, in order; what the loop does before the model is called counts as forward, clipping as optimizer."""


class StepClock:
    """On the device's own clock where that is a GPU: nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.steps: list[dict[str, Any]] = []

    def begin_step(self) -> None:
        self.steps.append({})
        self.mark("forward")

    def mark(self, phase: str) -> None:
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.steps[-1][phase] = now

    def observe(self, accelerator: Any) -> None:
        """Marks where the backward pass and the optimizer begin; DeepSpeed's engine steps within `accelerator.backward`."""
        backward = accelerator.backward

        def marked_backward(loss: torch.Tensor, **settings: Any) -> None:
            self.mark("backward")
            wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)  # there only with DeepSpeed
            if wrapped is not None and "step" not in vars(wrapped.engine):
                self._mark_before_step(wrapped.engine)
            backward(loss, **settings)
            if wrapped is None:
                self.mark("optimizer")

        accelerator.backward = marked_backward

    def _mark_before_step(self, engine: Any) -> None:
        step = engine.step

        def marked_step(*arguments: Any, **settings: Any) -> None:
            self.mark("optimizer")
            step(*arguments, **settings)

        engine.step = marked_step

    def seconds(self, *, skipped: int) -> dict[str, list[float]]:
        """Of every step after the first `skipped`, and of each of its phases. The last begin only ends the step before it."""
        if self.on_gpu:
            torch.cuda.synchronize()
        found: dict[str, list[float]] = {name: [] for name in ("step", *PHASES)}
        for step, following in itertools.pairwise(self.steps[skipped:]):
            bounds = [step[phase] for phase in PHASES] + [following["forward"]]
            for phase, (start, end) in zip(PHASES, itertools.pairwise(bounds), strict=True):
                found[phase].append(self._between(start, end))
            found["step"].append(self._between(bounds[0], bounds[-1]))
        return found

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.on_gpu else end - start
