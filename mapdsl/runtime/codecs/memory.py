"""Memory for tensors that are to be filled."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

_LARGE = 4 << 20  # bytes: huge pages are of two MiB, and begin where the system says


def fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """A tensor of its own memory, which has no values yet.

    A large one on the CPU is to be in huge pages: to hand out memory in pages of 4 KiB takes the system longer than a
    copy into it takes. It is a wish: where the system has no huge pages, or no memory for them, it is as any other.
    """
    made = torch.empty(shape, dtype=dtype, device=device)
    if made.device.type == "cpu" and made.nbytes >= _LARGE and (advise := _advise()) is not None:
        begin = -(-made.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(begin, made.data_ptr() + made.nbytes - begin, mmap.MADV_HUGEPAGE)
    return made


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    """The system's `madvise`, where it knows of huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found


__all__ = ["fresh"]
