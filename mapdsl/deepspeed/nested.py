"""The tensors of a module's state as DeepSpeed and Megatron save it: dicts in dicts, and other values among them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mapdsl.runtime.errors import ConversionError

_MAX_DEPTH = 32


def flat(module: Mapping[Any, Any], file: str) -> dict[str, Tensor]:
    """All tensors in nested dicts, by their keys joined by dots. C506 where two are called the same."""
    found: dict[str, Tensor] = {}
    for name, value in _leaves(module, "", file):
        if isinstance(value, Tensor):
            if name in found:
                message = f"{file}: two tensors are called {name}, once nested dicts are joined by dots"
                raise ConversionError("C506", message)
            found[name] = value.detach()
    return found


def refilled(module: Mapping[Any, Any], tensors: Mapping[str, Tensor], prefix: str = "") -> dict[Any, Any]:
    """The same nested dicts with other tensors, in the same order; what is no tensor is copied."""
    out: dict[Any, Any] = {}
    for key, value in module.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out[key] = refilled(value, tensors, f"{name}.")
        else:
            out[key] = tensors[name] if isinstance(value, Tensor) else copy.deepcopy(value)
    return out


def own(value: Any) -> Any:
    """A copy of whatever a checkpoint holds; of a tensor that is a view, no more than the view."""
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if type(value) in (list, tuple):
        return type(value)(map(own, value))
    if isinstance(value, dict):
        return {key: own(item) for key, item in value.items()}
    return copy.deepcopy(value)


def _leaves(value: Mapping[Any, Any], prefix: str, file: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > _MAX_DEPTH:
        raise ConversionError("C507", f"{file}: dicts are nested more than {_MAX_DEPTH} deep")
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _leaves(item, f"{prefix}{key}.", file, depth + 1)
        else:
            yield f"{prefix}{key}", item
