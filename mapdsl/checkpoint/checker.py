"""In a writer's place: compares what a conversion makes with what a checkpoint holds, and writes nothing."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mapdsl.checkpoint.byteranges import ByteRanges
from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.dtypes import dtype_name, stored_shape, torch_dtype, torch_shape
from mapdsl.checkpoint.elements import STRIP_BYTES, Difference, Tally, header_difference
from mapdsl.checkpoint.gathering import Pieces
from mapdsl.checkpoint.headers import StoredTensor
from mapdsl.checkpoint.layout import Entry
from mapdsl.checkpoint.rawbytes import buffer, strips
from mapdsl.checkpoint.sidecar import Entry as KeptEntry
from mapdsl.checkpoint.sidecar import SideFile, WriteOnly
from mapdsl.checkpoint.tensors import LazyState
from mapdsl.language.diagnostics import MapError

_LARGE_BYTES = 2**26


class Checker:
    """Compares tensors, given in any order and from any thread, with those of a checkpoint.

    `entries` say which there are to be; they are held against the headers at once. `write`, `copy` and `viewed` compare
    one tensor. They, and all else that `convert_tensors` asks for, are called as those of a `CheckpointWriter`, so that
    a conversion can be run into this in its place.
    With `is_reference` the checkpoint's tensors are those expected, and those given are found.
    """

    def __init__(self, checkpoint: Checkpoint, entries: Iterable[Entry], *, is_reference: bool = False) -> None:
        self.checkpoint = checkpoint
        self.is_reference = is_reference
        self._expected = {name: StoredTensor(name, dtype, tuple(shape)) for name, dtype, shape in entries}
        self.missing: list[StoredTensor] = []
        self.unknown: list[StoredTensor] = []
        self.differences: dict[str, Difference] = {}
        self.untold: dict[str, str] = {}
        self.bytes_compared = 0
        self.scratch = checkpoint.folder  # where memory that `view` gives may lie, without a name
        self._data = ByteRanges(checkpoint)
        self._state = LazyState(checkpoint)
        self._equal: set[str] = set()
        self._stand_ins: dict[int, tuple[Tensor, str]] = {}
        self._lock = threading.Lock()
        self._expect()

    @property
    def nbytes(self) -> int:
        """The size of the tensors that there are to be."""
        return sum(tensor.nbytes for tensor in self._expected.values())

    @property
    def compared(self) -> int:
        """How many tensors were compared byte for byte."""
        return len(self._equal) + sum(difference.kind == "bytes" for difference in self.differences.values())

    def take_over(self, names: Iterable[str]) -> None:
        """Tensors that an earlier run has compared: there are none, for nothing is noted."""
        if list(names):
            raise AssertionError("a comparison is not continued")

    def write(self, name: str, tensor: Tensor) -> None:
        """Compare one tensor, strip by strip; what is wrong by its header already is not looked at again."""
        with self._lock:
            stand_in = self._stand_ins.pop(id(tensor), None)
            stored = self.checkpoint.tensors.get(name)
            if stored is None or name in self.differences:
                return
            if stand_in is not None:
                self.untold[name] = stand_in[1]
                return
        difference = self._difference(stored, tensor)
        with self._lock:
            self.bytes_compared += stored.nbytes
            if difference is None:
                self._equal.add(name)
            else:
                self.differences[name] = difference

    def gather(self, name: str, tensor: Tensor, pieces: Pieces) -> None:
        """Compare a tensor that is still to be put together."""
        del tensor
        self.write(name, pieces.assembled())

    def copy(self, name: str, tensor: Tensor, source: Path, offset: int) -> None:
        """Compare one tensor, which lies in a file."""
        del source, offset
        self.write(name, tensor)

    def view(self, name: str) -> Tensor | None:
        """Memory to make a large tensor in, which the system can put on disk; then call `viewed`.

        The file has no name and goes with the memory. None where there is no room for it, and for small tensors.
        """
        stored = self._expected[name]
        if stored.nbytes < _LARGE_BYTES:
            return None
        for folder in (self.scratch, None):
            with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):  # so that a full disk is found now, not by a signal later
                    os.posix_fallocate(file.fileno(), 0, stored.nbytes)
                else:
                    os.ftruncate(file.fileno(), stored.nbytes)
                pages = torch.frombuffer(mmap.mmap(file.fileno(), stored.nbytes), dtype=torch.uint8)
                return pages.view(torch_dtype(stored.dtype)).view(torch_shape(stored.dtype, stored.shape))
        return None

    def viewed(self, name: str, tensor: Tensor) -> None:
        """Compare one tensor, which was made in memory that `view` gave."""
        self.write(name, tensor)

    def read(self, name: str) -> Tensor:
        """A tensor again that was compared, as tied tensors want it: where it was found equal, the checkpoint's own.

        Where it was not, what it should have been is gone: a tensor without data comes back, and the tensor that is
        then given with it is not compared, but noted in `untold` with the name of this one.
        """
        with self._lock:
            if name in self._equal:
                return self._state[name]
            tensor = torch.empty(0)
            self._stand_ins[id(tensor)] = (tensor, name)
            return tensor

    def close(self) -> None:
        """Let go of the files."""
        self._data.close()
        self._state.close()

    def _expect(self) -> None:
        """Hold the headers against names, dtypes and shapes."""
        held = self.checkpoint.tensors
        self.missing = [tensor for name, tensor in self._expected.items() if name not in held]
        self.unknown = [tensor for name, tensor in held.items() if name not in self._expected]
        if self.is_reference:
            self.missing, self.unknown = self.unknown, self.missing
        for name in self._expected.keys() & held.keys():
            pair = (held[name], self._expected[name]) if self.is_reference else (self._expected[name], held[name])
            difference = header_difference(*pair)
            if difference is not None:
                self.differences[name] = difference

    def _difference(self, stored: StoredTensor, tensor: Tensor) -> Difference | None:
        if header_difference(stored, StoredTensor(stored.name, dtype_name(tensor.dtype), stored_shape(tensor))):
            raise AssertionError(f"`{stored.name}` is not what was to be made")
        tally, begin = Tally(stored), 0
        for strip in strips(tensor):
            data = buffer(strip)
            for offset in range(0, len(data), STRIP_BYTES):
                made = data[offset : offset + STRIP_BYTES]
                held = self._data.read(stored, begin + offset, len(made))
                pair = (held, made) if self.is_reference else (made, held)
                tally.compare(begin + offset, *pair)
            begin += len(data)
        return tally.difference()


class KeptChecker(WriteOnly):
    """Takes what codecs keep, as the `entries` of an adapter's complement, and compares it with a side file if any."""

    def __init__(self, side: SideFile | None) -> None:
        self.side = side
        self.taken: set[str] = set()
        self.differences: list[Difference] = []
        self.problems: list[str] = []
        self._lock = threading.Lock()

    def __setitem__(self, name: str, entry: KeptEntry) -> None:
        alternative, kept = entry
        with self._lock:
            self.taken.add(name)
        if self.side is None:
            return
        try:
            was, held = self.side[name]
        except KeyError:
            self.problems.append(f"it keeps nothing of `{name}`")
            return
        except MapError as problem:
            self.problems.append(problem.diagnostics[0].message)
            return
        if was != alternative or (held is None) != (kept is None):
            self.problems.append(f"it has `{name}` as {was}, expected {alternative}")
        elif kept is not None and held is not None:
            self._compare(name, kept.to_tensors(), held.to_tensors())

    def stored(self, name: str, tensor: Tensor) -> None:
        """Compare a tensor that the map drops with the one that the side file keeps."""
        if self.side is None:
            return
        if name not in self.side.stored_names:
            self.problems.append(f"it lacks the dropped tensor `{name}`")
            return
        try:
            self._compare(name, {"stored": tensor}, {"stored": self.side.stored(name)})
        except MapError as problem:
            self.problems.append(problem.diagnostics[0].message)

    def finish(self) -> None:
        """Look for what the side file keeps of tensors that are not there."""
        if self.side is not None:
            left = [name for name in self.side if name not in self.taken]
            self.problems += [f"it keeps something of `{name}`, which is not there" for name in left]

    def _compare(self, name: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
        if expected.keys() != found.keys():
            parts = [", ".join(roles) or "nothing" for roles in (found, expected)]
            self.problems.append(f"it keeps {parts[0]} of `{name}`, expected {parts[1]}")
            return
        for role, tensor in expected.items():
            pair = [StoredTensor(f"{name}|{role}", dtype_name(t.dtype), stored_shape(t)) for t in (tensor, found[role])]
            difference = header_difference(*pair) or _difference(pair[0], tensor, found[role])
            if difference is not None:
                self.differences.append(difference)


def _difference(stored: StoredTensor, expected: Tensor, found: Tensor) -> Difference | None:
    """Two tensors in memory, of one dtype and shape."""
    tally = Tally(stored)
    one, other = buffer(expected := expected.contiguous()), buffer(found := found.contiguous())
    for offset in range(0, len(one), STRIP_BYTES):
        tally.compare(offset, one[offset : offset + STRIP_BYTES], bytearray(other[offset : offset + STRIP_BYTES]))
    return tally.difference()
