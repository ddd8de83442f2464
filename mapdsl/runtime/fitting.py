"""Holding tensors against what a map says: shapes, places in larger tensors, copies, bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeGuard, Union, cast

import torch
from torch import Tensor

from mapdsl.runtime.codecs.strided import copy_strided
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.sizes import Sized, SizeError, axis_sizes, joint_sizes

# The shape that a tensor must have: its sizes, or a pattern such as `V d` where some are not known.
Pattern = Union[str, "tuple[int, ...]"]


def fitted(name: str, pattern: Pattern, shape: Iterable[int], known: Mapping[str, int]) -> dict[str, int]:
    """Sizes of all axes of a pattern against a tensor's shape; an error names the tensor."""
    if not isinstance(pattern, str):
        if pattern != (found := tuple(shape)):
            raise ConversionError("R606", f"{name}: expected {list(pattern)}, found {list(found)}")
        return {}
    try:
        return axis_sizes(pattern, tuple(shape), known)
    except SizeError as err:
        raise ConversionError(err.code, f"{name}: {err}") from None


def window(view: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A place seen in the shape of the tensor that is to go there; None where that does not fit."""
    if (view.dtype, view.device) != (dtype, device) or view.numel() != torch.Size(shape).numel():
        return None
    try:
        return view.view(shape)
    except RuntimeError:
        return None


def fitted_together(tensors: Sequence[Sized], known: Mapping[str, int]) -> dict[str, int]:
    """Sizes of all axes of tensors that share some; an error names the one that does not fit the others."""
    try:
        return joint_sizes(tensors, known)
    except SizeError as err:
        raise ConversionError(err.code, str(err)) from None


def place(view: Tensor, tensor: Tensor, name: str) -> None:
    """Copy a tensor to its place in another, where shape and dtype must agree."""
    if getattr(view, "is_blank", False):
        return  # of blanks nobody knows which part is at hand
    if view.shape != tensor.shape:
        expected, found = list(view.shape), list(tensor.shape)
        raise ConversionError("R606", f"{name}: expected {expected} as in the rest of its group, found {found}")
    if view.dtype != tensor.dtype:
        raise ConversionError(
            "R606", f"{name}: expected {view.dtype} as in the rest of its group, found {tensor.dtype}"
        )
    if isinstance(view, Tensor):
        copy_strided(view, tensor)
    else:
        view.copy_(tensor)  # undecoded: all parts of it


def reshaped(name: str, tensor: Tensor, view: Tensor) -> Tensor:
    """The tensor with its dimensions cut as those of a view that is to take it."""
    if tensor.shape.numel() != view.shape.numel():
        expected, found = list(view.shape), list(tensor.shape)
        raise ConversionError("R606", f"{name}: expected {expected} as in the rest of its group, found {found}")
    return tensor.reshape(view.shape)


def compare(view: Tensor, tensor: Tensor, name: str, first: str | None = None) -> None:
    """R602 unless a copy equals the first one, of the name `first`, byte for byte."""
    first = first or "the first of its copies"
    if _is_traced(view):
        view.copy_(tensor, copy=True)
        return
    if view.shape != tensor.shape or view.dtype != tensor.dtype:
        expected, found = f"{list(view.shape)} {view.dtype}", f"{list(tensor.shape)} {tensor.dtype}"
        raise ConversionError("R602", f"{name}: expected {expected} as in {first}, found {found}")
    if not view.is_meta:
        same_bytes(name, tensor, view, first, "R602")


def only_copy(view: Tensor, dims: tuple[int, ...], name: str) -> Tensor:
    """The first of the copies that lie along some dimensions of a tensor; R602 unless all are equal."""
    if _is_traced(view):
        return cast(Tensor, view.only_copy(dims))  # there is nothing to compare
    for dim in sorted(dims, reverse=True):
        first = view.select(dim, 0)
        for number in range(1, view.shape[dim]):
            compare(first, view.select(dim, number), f"{name} (copy {number})")
        view = first
    return view


def only_zeros(view: Tensor, name: str) -> None:
    """R601 unless a part of a tensor that the other side lacks is zeros, byte for byte."""
    if _is_traced(view):
        view.has_to_be_zeros()  # looked at when the elements are
    elif not view.is_meta:
        zeros = torch.zeros((), dtype=view.dtype, device=view.device).expand(view.shape)
        same_bytes(f"{name}: the part that the other side lacks", view, zeros, "zeros")


def same_bytes(name: str, tensor: Tensor, wanted: Tensor, what: str, code: str = "R601") -> None:
    """R601 (or R602) at the first element whose bytes differ."""
    if tensor.numel() == 0:
        return
    one, other = (_flat_bytes(each) for each in (tensor, wanted))
    if not torch.equal(one, other):
        flat = int((one != other).nonzero()[0]) // tensor.element_size()
        place_ = [int(n) for n in torch.unravel_index(torch.tensor(flat), tensor.shape)]
        found, expected = tensor.reshape(-1)[flat].item(), wanted.reshape(-1)[flat].item()
        raise ConversionError(code, f"{name} differs from {what} at {place_}: expected {expected}, found {found}")


class _Traced(Protocol):
    """A tensor without elements, which notes what is done with it: see `mapdsl.runtime.traced`."""

    def copy_(self, other: Any, *, copy: bool) -> Any: ...

    def only_copy(self, dims: tuple[int, ...]) -> Any: ...

    def has_to_be_zeros(self) -> None: ...


def _is_traced(view: object) -> TypeGuard[_Traced]:
    return not isinstance(view, Tensor) and hasattr(view, "has_to_be_zeros")


def _flat_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor. One element that is expanded counts as contiguous, with strides that are not."""
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
