"""A checkpoint's tensors as bytes, a range at a time: what is read is held by the caller and by nobody else."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.files import bad_file, reason
from mapdsl.checkpoint.headers import StoredTensor

if TYPE_CHECKING:
    import torch

    from mapdsl.checkpoint.tensors import LazyState


class ByteRanges:
    """Reads ranges of a checkpoint's tensors, from any thread.

    Of safetensors files no map is made, so that nothing of them counts as this process's memory.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[Path, int] = {}
        self._state: LazyState | None = None
        self._last: tuple[str, torch.Tensor] | None = None
        self._lock = threading.Lock()

    def read(self, stored: StoredTensor, offset: int, size: int) -> bytearray:
        """`size` bytes of a tensor, from `offset` on; MapError, C507, where the file is cut short or fails."""
        if self.checkpoint.kind != "safetensors":
            return self._from_tensor(stored, offset, size)
        data = bytearray(size)
        view, done = memoryview(data), 0
        try:
            descriptor = self._open(stored.file)
            while done < size:
                count = os.preadv(descriptor, [view[done:]], stored.begin + offset + done)
                if not count:
                    break
                done += count
        except OSError as problem:
            raise bad_file(stored.file, f"cannot read tensor `{stored.name}`: {reason(problem)}") from problem
        if done < size:
            message = f"the file ends within tensor `{stored.name}`, {size - done:,} bytes early"
            raise bad_file(stored.file, message, advice="it was cut since it was opened: fetch it again")
        return data

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()
            if self._state is not None:
                self._state.close()

    def __enter__(self) -> ByteRanges:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            return self._files[path]

    def _from_tensor(self, stored: StoredTensor, offset: int, size: int) -> bytearray:
        """Torch opens its own files; tensors in them may be strided views."""
        from mapdsl.checkpoint.rawbytes import buffer
        from mapdsl.checkpoint.tensors import LazyState

        with self._lock:
            if self._state is None:
                self._state = LazyState(self.checkpoint)
            if self._last is None or self._last[0] != stored.name:  # some are read as a whole
                self._last = stored.name, self._state[stored.name]
            tensor = self._last[1]
        data = bytearray()
        for piece in _flat(tensor, offset // tensor.itemsize, (offset + size) // tensor.itemsize):
            data += buffer(piece.resolve_conj().resolve_neg().contiguous())
        return data


def _flat(tensor: torch.Tensor, begin: int, end: int) -> Iterator[torch.Tensor]:
    """Tensors that together hold the elements `begin` to `end` of a tensor; no more is copied than these."""
    if tensor.dim() < 2 or tensor.is_contiguous():
        yield tensor.reshape(-1)[begin:end]
        return
    row = tensor[0].numel()
    first, last = -(-begin // row), end // row  # whole rows
    if first > last:
        yield from _flat(tensor[last], begin - last * row, end - last * row)
        return
    if begin < first * row:
        yield from _flat(tensor[first - 1], begin - (first - 1) * row, row)
    yield tensor[first:last].reshape(-1)
    if last * row < end:
        yield from _flat(tensor[last], 0, end - last * row)
