"""Tensors of a torch Distributed Checkpoint, one at a time, read by `torch.distributed.checkpoint` itself.

Only the metadata is read without it: its own reader unpickles whatever the file holds. Chunks of several ranks are put
together here. A tensor that one chunk holds is not copied.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from mapdsl.checkpoint.dcp_metadata import SavedTensor
from mapdsl.checkpoint.files import bad_file, reason


class DcpReader:
    """Reads tensors of a folder by the names that `open_checkpoint` found; keeps the last one."""

    def __init__(self, folder: Path, saved: Mapping[str, SavedTensor]) -> None:
        self._folder = folder
        self._saved = saved
        self._last: tuple[str, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor with memory of its own; C507 where its files are broken, need code to load, or are others now."""
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one takes memory
            self._last = (name, self._read(self._saved[name]))
        return self._last[1]

    def close(self) -> None:
        """Let go of the last tensor."""
        self._last = None

    def _read(self, tensor: SavedTensor) -> torch.Tensor:
        _check_reader()
        metadata = _metadata(tensor)
        reader, planner = FileSystemReader(self._folder), _OneTensor(tensor)
        try:
            planner.set_up_planner({tensor.key: planner.outline}, metadata, is_coordinator=True)
            reader.set_up_storage_reader(metadata, is_coordinator=True)
            plan = reader.prepare_local_plan(planner.create_local_plan())
            plan = reader.prepare_global_plan(planner.create_global_plan([plan]))[0]
            reader.read_data(planner.finish_plan(plan), planner).wait()
        except pickle.UnpicklingError as problem:
            message = f"tensor `{tensor.key}` needs code to load, or is broken: {_first_line(problem)}"
            raise bad_file(self._place(tensor), message) from problem
        except OSError as problem:
            raise bad_file(self._place(tensor), f"cannot read tensor `{tensor.key}`: {reason(problem)}") from problem
        except Exception as problem:  # a broken file makes torch raise almost anything
            message = f"torch cannot load tensor `{tensor.key}`: {_first_line(problem)}"
            raise bad_file(self._place(tensor), message) from problem
        return planner.result()

    def _place(self, tensor: SavedTensor) -> Path:
        files = {chunk.file for chunk in tensor.chunks}
        return self._folder / files.pop() if len(files) == 1 else self._folder


class _OneTensor(DefaultLoadPlanner):
    """Plans for one tensor; takes over what is read as it is, bits and all."""

    def __init__(self, tensor: SavedTensor) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._dtype: torch.dtype = getattr(torch, tensor.dtype)
        self._shape = tensor.shape
        self._whole: torch.Tensor | None = None
        # Has the shape, and the memory of one element.
        self.outline = torch.empty((), dtype=self._dtype).expand(tensor.shape)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """What the reader copies a chunk into."""
        target = self.outline
        for axis, (begin, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(axis, begin, size)
        found = target.as_subclass(_Target)
        found.hand_on = functools.partial(self._take, read_item)
        return found

    def result(self) -> torch.Tensor:
        """The tensor, once all was read."""
        return torch.empty(self._shape, dtype=self._dtype) if self._whole is None else self._whole

    def _take(self, read_item: ReadItem, chunk: torch.Tensor) -> None:
        if (
            type(chunk) not in (torch.Tensor, torch.nn.Parameter)
            or chunk.layout != torch.strided
            or chunk.device.type != "cpu"
        ):
            raise ValueError(f"found a {type(chunk).__name__} on {chunk.device}, expected a dense tensor")
        if chunk.dtype != self._dtype:
            raise ValueError(f"found {chunk.dtype}, the metadata says {self._dtype}")
        if chunk.shape == torch.Size(self._shape):
            self._whole = chunk.detach()
            return
        if self._whole is None:
            self._whole = torch.empty(self._shape, dtype=self._dtype)
        target = self._whole
        for axis, (begin, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(axis, begin, size)
        width = _WIDTHS[self._dtype.itemsize]
        target.view(width).copy_(chunk.detach().view(width))  # bits: a bool byte of 2 stays 2


_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Target(torch.Tensor):
    """A tensor that hands on what is copied into it."""

    hand_on: Callable[[torch.Tensor], None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.detach:
            return args[0]
        if func is torch.Tensor.copy_:
            args[0].hand_on(args[1])
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _metadata(tensor: SavedTensor) -> Metadata:
    """Torch's own record of one tensor, made from what was read safely."""
    boxes = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in tensor.chunks]
    properties = TensorProperties(dtype=getattr(torch, tensor.dtype))
    entry = TensorStorageMetadata(properties, torch.Size(tensor.shape), boxes)
    places = {
        MetadataIndex(tensor.key, chunk.offsets): _StorageInfo(
            chunk.file, chunk.begin, chunk.length, list(chunk.transforms) or None
        )
        for chunk in tensor.chunks
    }
    return Metadata({tensor.key: entry}, storage_data=places)


# --- is torch's reader safe? -----------------------------------------------------------------------------------------


class _Probe:
    """Something that only a loader that runs code can make."""

    def __reduce__(self) -> Any:
        return _ran, ()


def _ran() -> torch.Tensor:
    return torch.zeros(1)


class _InMemory:
    """Enough of a file system for a reader to read one file."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def concat_path(self, path: object, suffix: str) -> str:
        del path
        return suffix

    @contextmanager
    def create_stream(self, path: object, mode: str) -> Iterator[io.BytesIO]:
        del path, mode
        yield io.BytesIO(self._data)


@functools.cache
def _check_reader() -> None:
    """Have torch's reader read something that needs code; C507 for a torch that would run it."""
    stream = io.BytesIO()
    torch.save(_Probe(), stream)
    tensor = SavedTensor("probe", "float32", (1,), ())
    metadata = Metadata(
        {"probe": TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([1]), _BOX)},
        storage_data={MetadataIndex("probe", (0,)): _StorageInfo("probe", 0, len(stream.getvalue()))},
    )
    reader, planner = FileSystemReader("probe"), _OneTensor(tensor)
    reader.fs = _InMemory(stream.getvalue())  # type: ignore[assignment]
    planner.set_up_planner({"probe": planner.outline}, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    try:
        reader.read_data(planner.create_local_plan(), planner)
    except pickle.UnpicklingError:
        return
    message = f"torch {torch.__version__} reads Distributed Checkpoints in a way that runs code in them"
    raise bad_file("torch", message, advice="update torch")


_BOX = [ChunkStorageMetadata(torch.Size([0]), torch.Size([1]))]


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).split("\n")[0][:300]
