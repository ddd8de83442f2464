"""Copies between tensors of different memory order, at the speed of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from mapdsl.runtime.codecs.kernels import Kernels, each, transposing_kernels
from mapdsl.runtime.codecs.memory import fresh
from mapdsl.runtime.codecs.scratch import scratch

_SMALL = 1 << 10  # elements that a first-level cache holds in any order
_STRIP = 1 << 20  # elements turned at a time: the scratch of a copy


def copy_strided(out: Tensor, source: Tensor, kernels: Kernels | None = None) -> None:
    """Copy a tensor to a view of its shape, strip by strip where their fastest dimensions differ.

    Into such a view torch copies element by element over the whole tensor, twenty times slower than memory; a whole
    matrix it transposes in blocks, and that is copied on, or a compiled kernel transposes it in one go: `kernels`, or
    those that are to be used for so many elements. Gradients do not flow through a copy.
    """
    source = source.detach()
    is_own = out.device.type == "cpu" and out.device == source.device and out.dtype == source.dtype
    if not (is_own and is_plain(out) and is_plain(source)):
        out.copy_(source)
        return
    if out.element_size() == 1:  # bits: of a bool torch makes 0 or 1, whatever byte is stored; FP4 it does not copy
        out, source = out.view(torch.uint8), source.view(torch.uint8)
    if _is_in_order(out, source):
        out.copy_(source)
        return
    found = transposing_kernels(out.dtype, out.device, out.numel())
    _copy(out, source, (kernels or found) if out.element_size() == 2 else None)


def contiguous_copy(source: Tensor) -> Tensor:
    """A copy in memory of its own, its last dimension the fastest; gradients flow to the source, if it wants any."""
    wants_grad = source.requires_grad and torch.is_grad_enabled()
    if source.device.type != "cpu" or wants_grad or not is_plain(source):
        return source.clone(memory_format=torch.contiguous_format)
    out = fresh(tuple(source.shape), source.dtype)
    copy_strided(out, source)
    return out


def contiguous(source: Tensor) -> Tensor:
    """The tensor itself if its last dimension is the fastest and nothing lies between, else such a copy."""
    return source if source.is_contiguous() else contiguous_copy(source)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is what lies in its memory: a DTensor is not, nor a conjugate or negative that is yet to be."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not (tensor.is_conj() or tensor.is_neg())


def _copy(out: Tensor, source: Tensor, kernels: Kernels | None) -> None:
    if _is_in_order(out, source):
        out.copy_(source)
        return
    into, outof = _fastest(out), _fastest(source)
    if out.ndim > 2:
        other = next(dim for dim in range(out.ndim) if dim not in (into, outof))
        for mine, theirs in zip(out.unbind(other), source.unbind(other), strict=True):
            _copy(mine, theirs, kernels)
        return
    # Rows run along the source's fast dimension, columns along the output's.
    target, origin = (out.T, source.T) if into == 0 else (out, source)
    rows, columns = target.shape
    are_whole = target.stride(1) == 1 and origin.stride(0) == 1
    step = max(1, _STRIP // rows)

    def work(column: int) -> None:
        strip, place = origin[:, column : column + step], target[:, column : column + step]
        if kernels is not None and are_whole and kernels.transpose(strip.T, place):
            return
        straight = strip.T.contiguous().T
        if place.is_contiguous():
            place.copy_(straight)
            return
        turned = scratch("turned", tuple(strip.shape), out.dtype, out.device)
        turned.copy_(straight)
        place.copy_(turned)

    each(work, range(0, columns, step), out.device)


def _is_in_order(out: Tensor, source: Tensor) -> bool:
    """Whether torch copies as fast as it can: along one dimension that is fast in both, or within a cache."""
    into, outof = _fastest(out), _fastest(source)
    return into == outof or out.shape[into] * out.shape[outof] < _SMALL


def _fastest(tensor: Tensor) -> int:
    """The dimension whose neighbours lie closest in memory, of those that have any."""
    strides = tensor.stride()
    dims = [dim for dim in range(tensor.ndim) if tensor.shape[dim] > 1]
    return min(dims, key=lambda dim: (strides[dim], -dim), default=-1)
