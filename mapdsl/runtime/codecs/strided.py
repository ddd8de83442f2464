"""Copies between tensors of different memory order, at the speed of memory."""

from __future__ import annotations

from torch import Tensor

from mapdsl.runtime.codecs.kernels import each
from mapdsl.runtime.codecs.scratch import scratch

_SMALL = 1 << 10  # elements that a first-level cache holds in any order
_STRIP = 1 << 20  # elements turned at a time: the scratch of a copy


def copy_strided(out: Tensor, source: Tensor) -> None:
    """Copy a tensor to a view of its shape, strip by strip where their fastest dimensions differ.

    Into such a view torch copies element by element over the whole tensor, twenty times slower than memory; a whole
    matrix it transposes in blocks, and that is copied on. Gradients do not flow through a copy.
    """
    source = source.detach()
    into, outof = _fastest(out), _fastest(source)
    small = into == outof or out.shape[into] * out.shape[outof] < _SMALL
    if small or out.device.type != "cpu" or (out.device, out.dtype) != (source.device, source.dtype):
        out.copy_(source)
        return
    if out.ndim > 2:
        other = next(dim for dim in range(out.ndim) if dim not in (into, outof))
        for mine, theirs in zip(out.unbind(other), source.unbind(other), strict=True):
            copy_strided(mine, theirs)
        return
    # Rows run along the source's fast dimension, columns along the output's.
    target, origin = (out.T, source.T) if into == 0 else (out, source)
    rows, columns = target.shape
    step = max(1, _STRIP // rows)

    def work(column: int) -> None:
        strip = origin[:, column : column + step]
        turned = scratch("turned", tuple(strip.shape), out.dtype, out.device)
        turned.copy_(strip.T.contiguous().T)
        target[:, column : column + step].copy_(turned)

    each(work, range(0, columns, step), out.device)


def _fastest(tensor: Tensor) -> int:
    """The dimension whose neighbours lie closest in memory, of those that have any."""
    strides = tensor.stride()
    dims = [dim for dim in range(tensor.ndim) if tensor.shape[dim] > 1]
    return min(dims, key=lambda dim: (strides[dim], -dim), default=-1)
