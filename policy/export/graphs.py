"""The two graphs of a policy in one bucket, as ONNX models.

The prefix graph: prepared pictures, raw state and prompt -> what the bound expert holds (keys and values, or a condition). The step
graph: noisy actions, noise level and that -> the expert's output. The loop of an objective's sampling stays outside."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..experts.expert import BoundExpert
from ..policy import Policy
from .bound_tensors import tensors_of, with_tensors
from .graph_inputs import NOISE_LEVEL, NOISY_ACTIONS, PROMPT_IDS, SECOND_LEVEL, observation_of

OUTPUT = "output"


class PrefixGraph(nn.Module):
    """The state is normalised and laid out in here."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def bind(self, named: Mapping[str, Tensor]) -> BoundExpert:
        return self.policy.bind(observation_of(named))

    def forward(self, named: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self.bind(named)).values())


class StepGraph(nn.Module):
    """One call of the expert that is bound to a prefix."""

    def __init__(self, policy: Policy, bound: BoundExpert) -> None:
        """Of `bound` only its shapes are read."""
        super().__init__()
        self.policy = policy  # for the weights' names, which are those of the prefix graph
        self.bound = bound

    def forward(self, named: dict[str, Tensor]) -> Tensor:
        prefix = {name: named[name] for name in tensors_of(self.bound)}
        return with_tensors(self.bound, prefix)(named[NOISY_ACTIONS], named[NOISE_LEVEL], named.get(SECOND_LEVEL))


@dataclass(frozen=True, kw_only=True)
class TracedGraph:
    """A graph, and what goes in and comes out, by name."""

    model: Any
    """onnx_ir.Model; its weights are the policy's own tensors, not copies."""
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def trace_both(policy: Policy, named: dict[str, Tensor]) -> tuple[TracedGraph, TracedGraph]:
    """Prefix and step, for inputs of the shapes of `named`."""
    prefix_graph = PrefixGraph(policy).eval()
    bound = prefix_graph.bind(named)
    prefix = tensors_of(bound)
    rows = named[PROMPT_IDS].shape[0]
    step_inputs = {NOISY_ACTIONS: torch.zeros(rows, *policy.noise_shape), NOISE_LEVEL: torch.ones(rows)}
    if policy.config.objective.has_second_level:
        step_inputs[SECOND_LEVEL] = torch.ones(rows)
    step_inputs |= prefix
    step_graph = StepGraph(policy, bound).eval()
    return (
        TracedGraph(model=_traced(prefix_graph, named, list(prefix)), inputs=named, outputs=prefix),
        TracedGraph(
            model=_traced(step_graph, step_inputs, [OUTPUT]),
            inputs=step_inputs,
            outputs={OUTPUT: step_graph(step_inputs)},
        ),
    )


def _traced(graph: nn.Module, named: dict[str, Tensor], output_names: list[str]) -> Any:
    # Says once per operator of torchvision that torchvision is not installed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its tree specs
        program = torch.export.export(graph, (), kwargs={"named": named})
        # Unoptimised: onnxruntime does it when it loads, and weights keep their names, by which graphs share one file of them.
        onnx = torch.onnx.export(
            program,
            input_names=list(named),
            output_names=output_names,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert onnx is not None  # with dynamo and no file to write
    return onnx.model
