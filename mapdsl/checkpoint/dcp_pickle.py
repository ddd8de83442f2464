"""The `.metadata` of a torch Distributed Checkpoint: a pickle, read without running anything, and without torch.

What it names is never looked up: the few classes that such a file needs have inert doubles here, which hold what the
file says of them, and any other name ends the reading. The doubles are made anew for each file, so that one that sets
attributes on them leaves no trace.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mapdsl.checkpoint.files import bad_file, file_size, read_bytes
from mapdsl.checkpoint.headers import TORCH_SPELLINGS

MAX_BYTES = 2_000_000_000
"""The most that is read; a thousand ranks' chunks of a hundred thousand tensors are smaller."""

_PACKAGE = "torch.distributed.checkpoint."
_RECORDS = {
    (_PACKAGE + "metadata", "BytesStorageMetadata"),
    (_PACKAGE + "metadata", "ChunkStorageMetadata"),
    (_PACKAGE + "metadata", "Metadata"),
    (_PACKAGE + "metadata", "MetadataIndex"),
    (_PACKAGE + "metadata", "StorageMeta"),
    (_PACKAGE + "metadata", "TensorProperties"),
    (_PACKAGE + "metadata", "TensorStorageMetadata"),
    (_PACKAGE + "filesystem", "_StorageInfo"),
    # Before torch 2.2 the properties were those of sharded tensors.
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
}
_UNREAD = {  # where it was saved, and how tensors lay in memory
    (_PACKAGE + "metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    ("torch", "device"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath", "Path")),
}
_DTYPES = {*TORCH_SPELLINGS.values(), "complex32", "complex128", "qint8", "quint8", "qint32", "quint4x2", "quint2x4"}
# What such a file has no use for: extensions, references into other data, old ways to make objects, raw buffers, sets.
_NEVER = (
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
    pickle.PERSID,
    pickle.BINPERSID,
    pickle.INST,
    pickle.OBJ,
    pickle.BYTEARRAY8,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
    pickle.EMPTY_SET,
    pickle.FROZENSET,
)
_TUPLES = (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
_MAX_DEPTH = 4


class TorchName(str):
    """A dtype, by its name in torch."""

    __slots__ = ()


class Record:
    """One object of the file: `kind` is its class, its attributes are those that the file gives it."""

    kind = ""

    def __setstate__(self, state: Any) -> None:
        if type(state) is dict and all(type(name) is str and name != "kind" for name in state):
            self.__dict__.update(state)
        elif self.kind == "TensorProperties" and type(state) is tuple and len(state) == 5:
            self.dtype = state[0]  # layout, requires_grad, memory format and pinning are not read
        else:
            raise pickle.UnpicklingError(f"a {self.kind} holds something else than its fields")


class _Unread:
    """What is of no interest, with whatever it is made from."""

    def __init__(self, *_: Any) -> None:
        pass


def read_pickle(path: Path) -> Record:
    """The `Metadata` in the file; C507 when it needs anything else than its own classes, is broken or too large."""
    raw = read_bytes(path, file_size(path), "metadata", MAX_BYTES)
    try:
        found = _Reader(raw).load()
    except MemoryError as problem:
        raise bad_file(path, "the metadata cannot be read: it asks for more memory than there is") from problem
    except _CodeError as problem:
        message = f"the file needs code to load: it names {problem}, which no checkpoint's metadata needs"
        advice = "it may be hostile: load it where you trust it, and save the state dict as safetensors"
        raise bad_file(path, message, advice) from problem
    except Exception as problem:  # a broken pickle raises almost anything
        message = str(problem).strip().split("\n")[0][:200] or type(problem).__name__
        raise bad_file(path, f"the metadata is no sound pickle: {message}") from problem
    if not isinstance(found, Record) or found.kind != "Metadata":
        raise bad_file(path, f"expected a checkpoint's Metadata in the file, found a {type(found).__name__}")
    return found


class _CodeError(pickle.UnpicklingError):
    """A name that is not among those allowed."""


def _refuse(reader: Any) -> None:
    raise pickle.UnpicklingError("it holds an operation that no checkpoint's metadata needs")


def _checked_tuple(make: Callable[[Any], None], reader: Any) -> None:
    make(reader)
    found = reader.stack[-1]
    depth = max((reader.nested.get(id(item), (1, item))[0] for item in found if type(item) is tuple), default=0)
    if depth >= _MAX_DEPTH:
        raise pickle.UnpicklingError("tuples are nested too deeply")
    if depth:
        reader.nested[id(found)] = (depth + 1, found)  # kept, so that no other tuple gets its id


class _Reader(pickle._Unpickler):
    """The unpickler that is written in Python: that in C takes gigabytes for a few bytes that number a memo high, and
    hashing tuples that are nested a million deep overflows its stack."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw))
        self.nested: dict[int, tuple[int, object]] = {}
        self._doubles: dict[tuple[str, str], Any] = {("torch", "Size"): _size, ("collections", "OrderedDict"): dict}

    def find_class(self, module: str, name: str, /) -> Any:
        """The double of a class; nothing is imported."""
        key = (module, name)
        if key not in self._doubles:
            if key in _RECORDS:
                self._doubles[key] = type(name, (Record,), {"kind": name})
            elif key in _UNREAD:
                self._doubles[key] = type(name, (_Unread,), {})
            elif module == "torch" and name in _DTYPES:
                self._doubles[key] = TorchName(name)
            else:
                raise _CodeError(f"`{module}.{name}`"[:200])
        return self._doubles[key]

    dispatch = {  # noqa: RUF012 (it is the base class's)
        **pickle._Unpickler.dispatch,
        **{code[0]: _refuse for code in _NEVER},
        **{code[0]: functools.partial(_checked_tuple, pickle._Unpickler.dispatch[code[0]]) for code in _TUPLES},
    }


def _size(values: Any = ()) -> tuple[int, ...]:
    """Stands for `torch.Size`."""
    if type(values) not in (tuple, list) or not all(type(value) is int for value in values):
        raise pickle.UnpicklingError("a size is made of something else than numbers")
    return tuple(values)
