"""A bound expert taken apart into named tensors, and put together again: what the prefix graph hands to the step graph.

A bound expert is an expert and what it reads: tensors, in tuples and mappings. It is taken apart by what it holds, so that another expert
needs nothing here; what holds tensors in another way is refused, not missed."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..experts.expert import BoundExpert


def tensors_of(bound: BoundExpert) -> dict[str, Tensor]:
    """By their place, such as `layers_kv.0.1`; one that stands in several places by the first of them. Raises TypeError for anything
    that is neither a tensor, a plain value, nor a tuple, list or mapping of such."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in _walk(_held(bound), ""):
        if id(tensor) not in seen:
            named[name] = tensor
            seen.add(id(tensor))
    return named


def with_tensors(bound: BoundExpert, named: Mapping[str, Tensor]) -> BoundExpert:
    """The same expert with these tensors in place of what `tensors_of` named."""
    by_identity = {id(tensor): named[name] for name, tensor in tensors_of(bound).items()}
    other = copy.copy(bound)
    for name, value in _held(bound).items():
        setattr(other, name, _replaced(value, by_identity))
    return other


def _held(bound: BoundExpert) -> dict[str, Any]:
    return {name: value for name, value in vars(bound).items() if not isinstance(value, nn.Module)}


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, tuple | list) else None


def _walk(value: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    items = _items(value)
    if isinstance(value, Tensor):
        yield place, value
    elif items is not None:
        for key, item in items:
            yield from _walk(item, f"{place}.{key}" if place else str(key))
    elif not isinstance(value, str | int | float | None):
        raise TypeError(
            f"a bound expert's {place} is a {type(value).__name__}, which cannot be handed from graph to graph"
        )


def _replaced(value: Any, by_identity: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return by_identity[id(value)]
    if isinstance(value, Mapping):
        return {key: _replaced(item, by_identity) for key, item in value.items()}
    return type(value)(_replaced(item, by_identity) for item in value) if isinstance(value, tuple | list) else value
