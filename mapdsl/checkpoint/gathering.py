"""Tensors put together where they are to lie: pieces of files go to their places in another, by way of no whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mapdsl.checkpoint.file_writing import copy_range, write_tensor
from mapdsl.runtime.assembling import assembled, compare_replicas, part_of
from mapdsl.runtime.codecs.strided import copy_strided
from mapdsl.runtime.resharding import Made, Source

if TYPE_CHECKING:
    from mapdsl.checkpoint.tensors import LazyState

STRIP_BYTES = 2**24
"""How much of a tensor is put together in memory at a time."""


@dataclass(frozen=True)
class Pieces:
    """A tensor that is not put together yet, and the states of the ranks that hold pieces of it.

    With `compares`, what several ranks hold is looked at first, and must be equal: ConversionError, R602.
    """

    name: str
    made: Made
    states: Sequence[LazyState]
    dtype: torch.dtype
    compares: bool

    def assembled(self) -> Tensor:
        """The tensor, in memory."""
        return assembled(self.name, self.made, self.states, compare=self.compares)

    def write(self, path: Path, begin: int) -> None:
        """Write the tensor from a place in a file on: pieces that lie in one run there and here by the system."""
        if self.compares:
            compare_replicas(self.name, self.made, self.states)
        if not all(self._lies_in_one_run(source) for source in self.made.sources):
            self._write_strips(path, begin)
            return
        for source in self.made.sources:
            part = part_of(self.states[source.rank][source.name], source.source_box)
            place = begin + self._offset(source) * self.dtype.itemsize
            found = self.states[source.rank].range_of(part)
            if found is None or not copy_range(*found, path, place, part.nbytes):
                write_tensor(path, place, part)

    def _lies_in_one_run(self, source: Source) -> bool:
        """Whether a piece is a run of the bytes of the tensor, and of the one that it comes from."""
        held = self.states[source.rank].checkpoint.tensors[source.name].shape
        return self.made.is_filled and _is_run(source.box, self.made.shape) and _is_run(source.source_box, held)

    def _offset(self, source: Source) -> int:
        """How many elements of the tensor come before a piece."""
        offset = 0
        for (first, _), size in zip(source.box, self.made.shape, strict=True):
            offset = offset * size + first
        return offset

    def _write_strips(self, path: Path, begin: int) -> None:
        """A strip of rows after the other, filled from all pieces that reach into it."""
        rows, *others = self.made.shape
        width = math.prod(others) * self.dtype.itemsize
        count = max(1, min(rows, STRIP_BYTES // max(width, 1)))
        scratch = torch.zeros((count, *others), dtype=self.dtype)
        parts = [part_of(self.states[source.rank][source.name], source.source_box) for source in self.made.sources]
        for first in range(0, rows, count):
            strip = scratch[: min(count, rows - first)]
            if first and not self.made.is_filled:
                strip.zero_()  # what the strip before held is no padding
            for source, part in zip(self.made.sources, parts, strict=True):
                _fill(strip, first, source, part)
            write_tensor(path, begin + first * width, strip)


def _fill(strip: Tensor, first: int, source: Source, part: Tensor) -> None:
    """Copy what a piece has of some rows."""
    (top, bottom), *others = source.box
    begin, end = max(top, first), min(bottom, first + strip.shape[0])
    if begin < end:
        place = part_of(strip, ((begin - first, end - first), *others))
        copy_strided(place, part[begin - top : end - top])


def _is_run(box: Sequence[tuple[int, int]], shape: Sequence[int]) -> bool:
    """Whether a box of a tensor is a run of its elements: one position each, a range, then whole dimensions."""
    sizes = [end - begin for begin, end in box]
    place = next((n for n, size in enumerate(sizes) if size != 1), len(sizes))
    return sizes[place + 1 :] == list(shape[place + 1 :])
