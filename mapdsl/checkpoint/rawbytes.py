"""Tensors as the bytes that files hold, in memory order of the logical tensor, without numpy."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator

import torch

STRIP_BYTES = 16 * 2**20
"""How much of a strided tensor, or of one on a device, is made contiguous at a time."""

_ADVISE_DONT_NEED = 4  # of Linux, where it also drops pages of private maps; `ctypes` knows no name for it
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def buffer(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes, which keep the tensor."""
    if not tensor.nbytes:
        return memoryview(b"")
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]  # else nothing holds one that was made for this call
    return memoryview(array).cast("B")


def release_pages(tensor: torch.Tensor) -> None:
    """Let the pages of a tensor that is mapped from a file leave this process; it stays good, and is read again.

    What was written into a private map is lost, into a shared one kept. Only where the system has such a call.
    """
    if not sys.platform.startswith("linux") or not tensor.numel():
        return
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE  # neighbours on shared pages are read again, too
    end = tensor.data_ptr() + reach * tensor.itemsize
    call = ctypes.CDLL(None).madvise
    call(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(_ADVISE_DONT_NEED))


def strips(tensor: torch.Tensor, limit: int = STRIP_BYTES) -> Iterator[torch.Tensor]:
    """Contiguous CPU tensors that together hold the bytes of `tensor`, slowest axis first.

    A contiguous CPU tensor is given back as it is. Any other is copied in strips of at most `limit` bytes, not whole;
    they share one piece of memory, so use each before asking for the next.
    """
    tensor = tensor.detach()
    if not (tensor.is_conj() or tensor.is_neg()):
        # Copy bits, not values: a bool byte of 2 stays 2, and kernels for rare dtypes are not needed.
        tensor = tensor.view(_SAME_WIDTH[tensor.itemsize])
    scratch: torch.Tensor | None = None  # one for all: malloc would not find freed strips again, and grow
    for piece in _pieces(tensor, limit):
        if _is_plain(piece):
            yield piece
            continue
        if scratch is None:
            scratch = torch.empty(min(tensor.nbytes, max(limit, tensor.itemsize)), dtype=torch.uint8)
        yield scratch[: piece.nbytes].view(piece.dtype).view(piece.shape).copy_(piece)


def _pieces(tensor: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
    """Views that together hold a tensor in order, each as plain memory or of at most `limit` bytes."""
    if tensor.dim() == 0 or tensor.nbytes <= limit or _is_plain(tensor):
        yield tensor
    else:
        rows = limit * tensor.shape[0] // tensor.nbytes
        for start in range(0, tensor.shape[0], max(rows, 1)):
            yield from _pieces(tensor[start : start + rows] if rows else tensor[start], limit)


def _is_plain(tensor: torch.Tensor) -> bool:
    is_lazy = tensor.is_conj() or tensor.is_neg()
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not is_lazy
