"""Tensors of any memory order, read tile by tile as codecs need them: neighbours in a row beside each other."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from mapdsl.runtime.codecs.kernels import transposing_kernels
from mapdsl.runtime.codecs.scratch import scratch
from mapdsl.runtime.codecs.strided import copy_strided, is_plain
from mapdsl.runtime.codecs.tiles import Tile


class _Held(threading.local):
    """What a thread's scratch holds: whose tile, which, and its memory."""

    def __init__(self) -> None:
        self.tile: tuple[int, Tile] | None = None
        self.rows = torch.empty(0)


_held = _Held()
_count = itertools.count()


class Matrices:
    """The elements of a tensor in their order as `sizes`: `[matrices, rows, columns]`.

    Tiles are views where neighbours in a row of the tensor lie together, else copies. `dtype` is one of bytes, if the
    tensor is of words that are to be read as their bytes.
    """

    def __init__(self, tensor: Tensor, sizes: tuple[int, int, int], dtype: torch.dtype | None = None) -> None:
        self.dtype, self.device = dtype or tensor.dtype, tensor.device
        self._tensor, self._sizes, self._number = tensor, sizes, next(_count)
        self._view = _viewed(tensor, sizes, self.dtype)
        self._kernels = (
            None if self._view is not None else transposing_kernels(tensor.dtype, tensor.device, tensor.numel())
        )

    @property
    def is_view(self) -> bool:
        """Whether tiles need no memory."""
        return self._view is not None

    @property
    def elements(self) -> int:
        """How many there are."""
        return self._sizes[0] * self._sizes[1] * self._sizes[2]

    def of(self, tile: Tile, per: int = 1) -> Tensor:
        """A tile of matrices that are `per` times as wide, `[rows, columns]`: until this thread asks for another."""
        if self._view is not None:
            return tile.flat(self._view, per)
        # Who encodes a tile reads it several times.
        if _held.tile != (self._number, tile):
            _held.tile = None
            _held.rows = self._copied(tile, per)
            _held.tile = self._number, tile
        return _held.rows

    def _copied(self, tile: Tile, per: int) -> Tensor:
        _, rows, columns = self._sizes
        count, first = tile.bands * tile.height, tile.matrix * rows + tile.row
        left, width = tile.column * per, tile.groups * tile.width * per
        words = self._tensor.element_size() // self.dtype.itemsize  # columns in one of the tensor's elements
        tensor = self._tensor.view(1) if not self._tensor.ndim else self._tensor
        skip = 0
        if count == 1:
            start = first * columns + left
            stop, skip = start + width, start % words
        else:
            if width < columns:
                # A row may be the last two dimensions of the tensor: then the former of them is cut.
                dim = -1 if tensor.shape[-1] * words == columns else -2
                unit = columns // tensor.shape[dim]
                begin, end = left // unit, -(-(left + width) // unit)
                tensor, columns = tensor.narrow(dim, begin, end - begin), (end - begin) * unit
                skip = left - begin * unit
            start, stop = first * columns, (first + count) * columns
        start, stop = start // words, -(-stop // words)
        out = scratch("rows", (stop - start,), tensor.dtype, tensor.device)
        place = 0
        for box in _boxes(tensor, start, stop):
            copy_strided(out[place : place + box.numel()].view(box.shape), box, self._kernels)
            place += box.numel()
        return out.view(self.dtype).view(count, -1)[:, skip : skip + width]


def _viewed(tensor: Tensor, sizes: tuple[int, int, int], dtype: torch.dtype) -> Tensor | None:
    """A tensor as matrices of a dtype, if that takes no copy and neighbours in a row lie together."""
    if not is_plain(tensor):
        return None
    try:
        view = (tensor if tensor.dtype == dtype else tensor.view(dtype)).view(sizes)
    except RuntimeError:
        return None
    return view if view.stride(-1) == 1 else None


def _boxes(tensor: Tensor, start: int, stop: int) -> Iterator[Tensor]:
    """The elements from a flat place to another, in their order, as a few views."""
    if tensor.ndim == 1:
        yield tensor[start:stop]
        return
    row = tensor[0].numel()
    first, last = -(-start // row), stop // row
    if first > last:
        yield from _boxes(tensor[last], start - last * row, stop - last * row)
        return
    if start % row:
        yield from _boxes(tensor[first - 1], start % row, row)
    if first < last:
        yield tensor[first:last]
    if stop % row:
        yield from _boxes(tensor[last], 0, stop % row)
