"""Copies between tensors of different memory order, at the speed of memory."""

from __future__ import annotations

from torch import Tensor

# 32 values of 16 bits are one cache line of a transposed output; 4,096 of its lines stay in a second-level cache.
_TILE_ROWS, _TILE_COLUMNS = 32, 4096


def copy_strided(out: Tensor, source: Tensor) -> None:
    """Copy a tensor to a view of its shape. Where their fastest dimensions differ, by tiles that a cache holds.

    torch writes a transposed copy element by element over the whole tensor: twenty times slower than memory.
    """
    into, outof = _fastest(out), _fastest(source)
    small = into == outof or out.shape[into] * out.shape[outof] < _TILE_ROWS * _TILE_ROWS
    if small or out.device.type != "cpu":
        out.copy_(source)
        return
    if out.ndim > 2:
        other = next(dim for dim in range(out.ndim) if dim not in (into, outof))
        for mine, theirs in zip(out.unbind(other), source.unbind(other), strict=True):
            copy_strided(mine, theirs)
        return
    # Rows run along the output's fast dimension, columns along the source's.
    target, origin = (out, source) if into == 0 else (out.T, source.T)
    for row in range(0, target.shape[0], _TILE_ROWS):
        for column in range(0, target.shape[1], _TILE_COLUMNS):
            rows, columns = slice(row, row + _TILE_ROWS), slice(column, column + _TILE_COLUMNS)
            target[rows, columns].copy_(origin[rows, columns])


def _fastest(tensor: Tensor) -> int:
    """The dimension whose neighbours lie closest in memory, of those that have any."""
    strides = tensor.stride()
    dims = [dim for dim in range(tensor.ndim) if tensor.shape[dim] > 1]
    return min(dims, key=lambda dim: (strides[dim], -dim), default=-1)
