"""Boxes of a checkpoint's tensors, on disk: no bytes are read but theirs, and small gaps between them."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from mapdsl.checkpoint.byteranges import ByteRanges
from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.dtypes import torch_dtype, torch_shape
from mapdsl.checkpoint.file_writing import write_all
from mapdsl.checkpoint.headers import StoredTensor
from mapdsl.checkpoint.rawbytes import buffer
from mapdsl.runtime.codecs.storage import Box

_GAP_BYTES = 1 << 12
"""What lies between two runs is read with them, if it is less: a call costs as much."""


class BoxReader:
    """Reads boxes of tensors, from any thread; `read_bytes` counts what was read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._ranges = ByteRanges(checkpoint)
        self.read_bytes = 0

    def __enter__(self) -> BoxReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: object, trace: TracebackType | None) -> None:
        self._ranges.close()

    def read(self, name: str, box: Box) -> Tensor:
        """A box of a tensor, in memory of its own. MapError, C507, where the file is cut short or fails."""
        stored = self.checkpoint.tensors[name]
        dtype, shape = torch_dtype(stored.dtype), torch_shape(stored.dtype, stored.shape)
        sizes = [end - begin for begin, end in box]
        out = torch.empty(sizes, dtype=dtype)
        flat = out.view(-1).view(torch.uint8)
        place = 0
        for begin, count, step, length in _runs(shape, box, dtype.itemsize):
            data = self._ranges.read(stored, begin, (count - 1) * step + length)
            self.read_bytes += len(data)
            rows = torch.frombuffer(data, dtype=torch.uint8).as_strided((count, length), (step, 1))
            flat[place : place + count * length].view(count, length).copy_(rows)
            place += count * length
        return out


class BoxWriter:
    """Writes boxes of tensors to their places in files of their final size, which others may write to as well."""

    def __init__(self, folder: Path, places: Mapping[str, StoredTensor]) -> None:
        self.folder, self.places = folder, places
        self._files: dict[Path, int] = {}

    def __enter__(self) -> BoxWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: object, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                for descriptor in self._files.values():
                    os.fsync(descriptor)
        finally:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def write(self, name: str, box: Box, tensor: Tensor) -> None:
        """Write a box of a tensor; OSError where the file system fails."""
        place = self.places[name]
        dtype, shape = torch_dtype(place.dtype), torch_shape(place.dtype, place.shape)
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(end - begin for begin, end in box)), name
        data, done = buffer(tensor.cpu().contiguous()), 0
        if place.file not in self._files:
            self._files[place.file] = os.open(self.folder / place.file, os.O_WRONLY)
        for begin, count, step, length in _runs(shape, box, dtype.itemsize):
            for row in range(count):
                write_all(self._files[place.file], data[done : done + length], place.begin + begin + row * step)
                done += length


def _runs(shape: tuple[int, ...], box: Box, itemsize: int) -> Iterator[tuple[int, int, int, int]]:
    """The bytes of a box: where to begin, and how many runs, how far apart and how long, to read at a time."""
    if any(begin == end for begin, end in box):
        return
    # The trailing dimensions that are whole, and the one before them, make a run.
    inner = len(shape)
    while inner > 0 and box[inner - 1] == (0, shape[inner - 1]):
        inner -= 1
    strides = [math.prod(shape[dim + 1 :]) * itemsize for dim in range(len(shape))]
    if inner == 0:
        yield 0, 1, 0, math.prod(shape) * itemsize
        return
    first, last = box[inner - 1]
    length, offset = (last - first) * strides[inner - 1], first * strides[inner - 1]
    if inner == 1:
        yield offset, 1, 0, length
        return
    begin, end = box[inner - 2]
    step = strides[inner - 2]
    for places in itertools.product(*(range(*span) for span in box[: inner - 2])):
        start = offset + sum(place * stride for place, stride in zip(places, strides, strict=False))
        if step - length <= _GAP_BYTES:
            yield start + begin * step, end - begin, step, length
            continue
        for row in range(begin, end):
            yield start + row * step, 1, 0, length


__all__ = ["BoxReader", "BoxWriter"]
