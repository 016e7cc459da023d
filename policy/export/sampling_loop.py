"""What is left to the program that runs the graphs: at which levels the step graph is called, and what is done with its output.

Here that is `Objective.sample`, called with the step graph in place of the expert (`onnx_policy.py`). For programs that are not ours the
same is written into export.json in numbers and words."""

from collections.abc import Sequence

import torch

from ..acceleration.levels import levels_of
from ..objectives.objective import Objective

STEPS = {
    "flow": "n steps; euler: x = x - v / n; midpoint: x = x - v(x - v / 2n, half a step on) / n; heun: as euler with the mean of v here and "
    "v(x - v / n, a step on), but in the last step euler's. v is the output, or (x - output) / max(level, 0.05) where prediction is 'sample'",
    "one_step": "n steps: x = x - output / n",
    "shortcut": "n steps: x = x - output / n; the second level is 1 / n",
    "regression": "one call with x = 0 in place of noise; the chunk is the output, or x - output where objective.output is 'aligned'",
    "diffusion": "n steps; the clean action that the output means goes to DPMSolverMultistepScheduler or DDIMScheduler of diffusers, set as "
    "in vlatune's policy/objectives/diffusion.py",
    "rs_imle": "one call; the chunk is the output, or x - output where objective.output is 'aligned'",
}
"""Objective -> what its sampling does, x being noise at first and in the end the chunk."""


def levels_in_numbers(objective: Objective, noise_shape: Sequence[int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Noise levels and, where the objective has them, second levels of the calls that one sample takes, in order."""
    levels = levels_of(objective, tuple(noise_shape), torch.device("cpu"))
    return (
        tuple(float(level_B) for level_B, _ in levels),
        tuple(float(second_B) for _, second_B in levels if second_B is not None),
    )
