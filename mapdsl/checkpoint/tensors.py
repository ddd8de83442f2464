"""A checkpoint's tensors, mapped from disk and read when they are used."""

from __future__ import annotations

import errno
import mmap
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mapdsl.checkpoint.checkpoint import TORCH_SUFFIXES, Checkpoint
from mapdsl.checkpoint.dtypes import DTYPE_NAMES, TORCH_DTYPES, dtype_name, stored_shape, torch_dtype, torch_shape
from mapdsl.checkpoint.files import bad_file, reason
from mapdsl.checkpoint.gathering import Pieces
from mapdsl.checkpoint.headers import StoredTensor
from mapdsl.checkpoint.shares import ShareReader
from mapdsl.checkpoint.torch_files import MappedFile
from mapdsl.language.diagnostics import MapError

if TYPE_CHECKING:
    from mapdsl.checkpoint.dcp import DcpReader

__all__ = [
    "DTYPE_NAMES",
    "TORCH_DTYPES",
    "LazyState",
    "dtype_name",
    "stored_shape",
    "torch_dtype",
    "torch_shape",
]

# `mmap.MAP_NORESERVE` came with Python 3.12; these machines share its number.
_IS_COMMON = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64", "arm64")
_NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if _IS_COMMON else 0)


class LazyState(Mapping[str, torch.Tensor]):
    """A state dict over a checkpoint: `state[name]` is a CPU tensor over the file's pages, not a copy.

    The mapping is private: writing into a tensor changes memory, never the file. A tensor whose offset is no multiple
    of its element size is copied, and so is each where the system grants no map. F4 has torch's paired shape
    (`torch_shape`). A file that was cut is an error when its next tensor is asked for; those that were handed out must
    not be cut. `meta()` gives the same mapping with meta tensors, from the headers alone. Tensors of torch files are as
    they were saved, strided views too; those of a Distributed Checkpoint have memory of their own, and so have those
    that are put together from the shares of several ranks.

    `state[name]` raises a MapError: C507 for a listing (no data) or a file that changed, C504 for a dtype that torch
    lacks, C503 for an F4 shape that torch cannot hold.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str = "cpu") -> None:
        if device not in ("cpu", "meta"):
            raise ValueError(f"device is {device!r}, expected 'cpu' or 'meta'")
        self.checkpoint = checkpoint
        self._is_meta = device == "meta"
        self._maps: dict[Path, torch.Tensor | None] = {}
        self._pages: dict[Path, mmap.mmap] = {}
        self._loaded: dict[Path, MappedFile] = {}
        self._dcp: DcpReader | None = None
        self._shares: ShareReader | None = None

    def meta(self) -> LazyState:
        """The same names with empty tensors on the meta device; works for listings too."""
        return LazyState(self.checkpoint, device="meta")

    def close(self) -> None:
        """Let go of the files. Tensors that were handed out keep theirs; asking again maps it again."""
        self._maps.clear()
        self._pages.clear()
        self._loaded.clear()
        if self._dcp is not None:
            self._dcp.close()
        if self._shares is not None:
            self._shares.close()

    def release(self, name: str) -> None:
        """Let the pages of a tensor that was handed out leave this process.

        The tensor stays good, what it holds is read from the file again when it is used; what was written into it is
        lost. Does nothing where there is no map, or the system has no such call.
        """
        stored = self.checkpoint.tensors[name]
        if self._shares is not None:
            self._shares.release(name)
            return
        if stored.file in self._loaded:
            self._loaded[stored.file].release(name)
        pages = self._pages.get(stored.file)
        if pages is None or not hasattr(mmap, "MADV_DONTNEED") or stored.begin == stored.end:
            return
        begin = stored.begin // mmap.PAGESIZE * mmap.PAGESIZE  # neighbours on shared pages are read again, too
        pages.madvise(mmap.MADV_DONTNEED, begin, stored.end - begin)

    def check_whole(self, name: str) -> None:
        """C507 where the file of a tensor that was handed out has been cut since: the end of its last page is zeros."""
        stored = self.checkpoint.tensors[name]
        if self._shares is not None:
            self._shares.check_whole(name)
        elif stored.file in self._pages:
            _check_end(stored, self._pages[stored.file].size())

    def range_of(self, tensor: torch.Tensor) -> tuple[Path, int] | None:
        """The file and the first byte there of a tensor that is, as it lies in memory, a run of a file's bytes."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            return None
        if self._shares is not None:
            return self._shares.range_of(tensor)
        begin = tensor.data_ptr()
        for path, whole in self._maps.items():
            if whole is not None and 0 <= begin - whole.data_ptr() <= whole.nbytes - tensor.nbytes:
                return path, begin - whole.data_ptr()
        return None

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self.checkpoint.tensors[name]
        try:
            dtype, shape = torch_dtype(stored.dtype), torch_shape(stored.dtype, stored.shape)
        except MapError as problem:
            found = problem.diagnostics[0]
            raise bad_file(self._place(stored), f"tensor `{name}`: {found.message}", found.help, found.code) from None
        if self._is_meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        if not self.checkpoint.has_data:
            advice = "a listing holds names and shapes only: use meta(), or give the checkpoint itself"
            raise bad_file(self._place(stored), f"tensor `{name}` has no data here", advice)
        if self.checkpoint.kind == "dcp":
            return self._from_dcp(name)
        if self.checkpoint.kind == "shares":
            return self._share_reader()[name]
        if stored.file.name.endswith(TORCH_SUFFIXES):
            return self._from_torch_file(stored)
        return self._from_map(stored, dtype, shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.tensors)

    def __len__(self) -> int:
        return len(self.checkpoint.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint.tensors

    def _from_map(self, stored: StoredTensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        if stored.begin == stored.end:
            return torch.empty(shape, dtype=dtype)
        whole = self._map(stored)
        if whole is None:
            data = torch.frombuffer(bytearray(self._read(stored)), dtype=torch.uint8)
        elif stored.begin % dtype.itemsize:
            data = whole[stored.begin : stored.end].clone()  # wider elements must begin at a multiple of their size
        else:
            data = whole[stored.begin : stored.end]
        return data.view(dtype).view(shape)

    def _map(self, stored: StoredTensor) -> torch.Tensor | None:
        """A whole file as bytes; None where the system grants no memory map of this size."""
        if stored.file not in self._maps:
            if sys.byteorder != "little":
                raise bad_file(stored.file, "safetensors data are little-endian, this machine is not")
            try:
                pages = map_file(stored)
            except OSError as problem:
                raise bad_file(stored.file, f"cannot map the file: {reason(problem)}") from problem
            self._maps[stored.file] = None if pages is None else torch.frombuffer(pages, dtype=torch.uint8)
            if pages is not None:
                self._pages[stored.file] = pages
        if stored.file in self._pages:  # its size now: what is cut off would be read as zeros, or end the process
            _check_end(stored, self._pages[stored.file].size())
        return self._maps[stored.file]

    def _read(self, stored: StoredTensor) -> bytes:
        try:
            with stored.file.open("rb") as file:
                file.seek(stored.begin)
                return file.read(stored.end - stored.begin)
        except OSError as problem:
            raise bad_file(stored.file, f"cannot read tensor `{stored.name}`: {reason(problem)}") from problem

    def _from_torch_file(self, stored: StoredTensor) -> torch.Tensor:
        if stored.file not in self._loaded:
            self._loaded[stored.file] = MappedFile(stored.file)
        tensor = self._loaded[stored.file].tensors.get(stored.name)
        if tensor is None or dtype_name(tensor.dtype) != stored.dtype or stored_shape(tensor) != stored.shape:
            raise bad_file(stored.file, f"tensor `{stored.name}` is not what the file held when it was opened")
        return tensor

    def _from_dcp(self, name: str) -> torch.Tensor:
        if self._dcp is None:
            from mapdsl.checkpoint.dcp import DcpReader  # imports torch.distributed

            self._dcp = DcpReader(self.checkpoint.folder, self.checkpoint.saved)
        return self._dcp[name]

    def pieces(self, name: str) -> Pieces | None:
        """What a tensor is still to be put together from, where it comes from the shares of ranks and goes to one."""
        return None if self.checkpoint.shares is None else self._share_reader().pieces(name)

    def _share_reader(self) -> ShareReader:
        shares = self.checkpoint.shares
        assert shares is not None
        if self._shares is None:
            self._shares = ShareReader(shares, [LazyState(of_rank) for of_rank in shares.checkpoints])
        return self._shares

    def _place(self, stored: StoredTensor) -> Path:
        return stored.file if stored.file.name else self.checkpoint.path


def _check_end(stored: StoredTensor, size: int) -> None:
    """C507 where a file has become too short for a tensor."""
    if size < stored.end:
        raise bad_file(stored.file, f"tensor `{stored.name}` ends at byte {stored.end:,}, found {size:,}")


def map_file(stored: StoredTensor) -> mmap.mmap | None:
    """Map a tensor's file as a whole.

    The pages are private and writable, since torch has no read-only tensors. Linux would count all of them as memory
    that could be needed, and refuse a file larger than the machine's memory, but for MAP_NORESERVE.
    """
    with stored.file.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        _check_end(stored, size)
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        try:
            return mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=protection)
        except OSError as problem:
            if problem.errno == errno.ENOMEM:  # strict accounting (vm.overcommit_memory=2), or a limit of the shell
                return None
            raise
