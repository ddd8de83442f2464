"""Where the loops of the block-scaled codecs run: in torch's operators, or compiled, with the same bytes.

Compiled kernels are used where numba is installed, for large tensors in a CPU's memory, whose working type is bf16 or
f32. MAPDSL_KERNELS says otherwise: `torch` never uses them,
`compiled` wherever they exist, for small tensors too.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mapdsl.runtime.codecs.elements import Element, TableElement
from mapdsl.runtime.errors import ConversionError

WORTHWHILE = 1 << 20  # elements: torch does fewer in a millisecond, in which a compiled kernel would not even load

COMPILED_DTYPES = (torch.bfloat16, torch.float32)  # of values

T = TypeVar("T")


class Kernels(Protocol):
    """Work on one tile: `codes` `[rows, bytes]`, `values` `[rows, bytes * per]`, columns together in memory.

    The rows are bands of `height`, the bytes groups of `width`; `factors` are float32 `[bands, groups]`.
    """

    def decode(
        self, element: TableElement, codes: Tensor, factors: Tensor, values: Tensor, height: int, width: int
    ) -> None:
        """Write the values of a tile."""

    def encode(
        self, element: TableElement, values: Tensor, factors: Tensor, codes: Tensor, height: int, width: int
    ) -> None:
        """Write the codes of a tile."""

    def largest(self, values: Tensor, bands: int, groups: int, height: int, width: int) -> Tensor:
        """The largest magnitude of each block, float32 `[bands, groups]`; NaNs are the largest."""


_kernels: list[Kernels | None] = []
_lock = threading.Lock()


def compiled_kernels(element: Element, dtype: torch.dtype, device: torch.device, values: int) -> Kernels | None:
    """The compiled kernels, if they are to be used for so many values of this dtype on this device."""
    wish = os.environ.get("MAPDSL_KERNELS", "auto")
    if wish not in ("auto", "torch", "compiled"):
        raise ConversionError("C505", f"MAPDSL_KERNELS is {wish!r}, not auto, torch or compiled")
    able = device.type == "cpu" and dtype in COMPILED_DTYPES and isinstance(element, TableElement)
    if wish == "torch" or not able or (wish == "auto" and values < WORTHWHILE):
        return None
    kernels = _loaded()
    if kernels is None and wish == "compiled":
        raise ConversionError("C505", "MAPDSL_KERNELS is compiled, and numba is missing: pip install mapdsl[fast]")
    return kernels


def _loaded() -> Kernels | None:
    """The compiled kernels, where there are any: an adapter in one file, which needs torch alone, has none."""
    with _lock:
        if not _kernels:
            is_home = __name__ == "mapdsl.runtime.codecs.kernels"
            if is_home and importlib.util.find_spec("numba") is not None:
                _kernels.append(importlib.import_module("mapdsl.runtime.codecs.compiled").CompiledKernels())
            else:
                _kernels.append(None)
        return _kernels[0]


def each(work: Callable[[T], object], items: Iterable[T], device: torch.device) -> None:
    """Do work on each item, on as many threads as torch would use for one operator.

    That many operators on small tensors at once, each on one thread, cost less than all threads on one after another.
    Work may call this again: then it goes on on its own thread. Work for a device that is no CPU is queued by one.
    """
    given = list(items)
    alone = device.type != "cpu" or hasattr(_role, "is_worker")
    threads = 1 if alone else torch.get_num_threads()
    if threads < 2 or len(given) < 2:
        for item in given:
            work(item)
    else:
        try:
            for _ in _pool(threads).map(work, given):
                pass
        finally:
            torch.set_num_threads(threads)  # for threads that start later; workers have said 1


_role = threading.local()
_pools: dict[int, ThreadPoolExecutor] = {}


def _pool(threads: int) -> ThreadPoolExecutor:
    """A pool that stays: new threads would have to touch new memory."""
    with _lock:
        if threads not in _pools:
            _pools[threads] = ThreadPoolExecutor(threads, "mapdsl-codecs", _mark_worker)
        return _pools[threads]


def _mark_worker() -> None:
    """A worker does all of its work alone."""
    _role.is_worker = True
    torch.set_num_threads(1)


def _forget_pools() -> None:
    """The threads of a process do not live on in its children."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)
