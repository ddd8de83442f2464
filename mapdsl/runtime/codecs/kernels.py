"""Where the loops of the block-scaled codecs run: in torch's operators, or compiled, with the same bytes.

Compiled kernels are used where numba is installed, for large or many tensors in a CPU's memory: for codecs whose
working type is bf16 or f32, and to transpose 16-bit values. MAPDSL_KERNELS says otherwise: `torch` never uses them,
`compiled` wherever they exist, for small tensors too.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mapdsl.runtime.codecs.elements import Element, TableElement
from mapdsl.runtime.errors import ConversionError

# Loading takes half a second. It is worth it for a tensor of so many elements, of which there are more as a rule, or
# when torch has had so many in smaller ones; then for all but the smallest.
WORTHWHILE = 1 << 20
MANY = 1 << 26
FEW = 1 << 14

ITEMS_A_THREAD = 8  # at least: to wake a thread takes as long as several tiles
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

    def decode_transposed(
        self, element: TableElement, codes: Tensor, factors: Tensor, out: Tensor, height: int, width: int
    ) -> bool:
        """Write the values of a tile to `out` `[columns, rows]`, of whole rows; False where this kernel cannot."""

    def transpose(self, source: Tensor, out: Tensor) -> bool:
        """Write `out` `[columns, rows]` from `source` `[rows, columns]`, of 16-bit values; the same."""


_kernels: list[Kernels | str] = []
_done_without = [0]  # elements; threads may count over each other
_lock = threading.Lock()


def compiled_kernels(element: Element, dtype: torch.dtype, device: torch.device, values: int) -> Kernels | None:
    """The compiled kernels, if they are to be used for so many values of this dtype on this device."""
    is_able = device.type == "cpu" and dtype in COMPILED_DTYPES and isinstance(element, TableElement)
    return _chosen(is_able, values)


def transposing_kernels(dtype: torch.dtype, device: torch.device, values: int) -> Kernels | None:
    """The compiled kernels, if they are to transpose so many values of this dtype on this device."""
    return _chosen(device.type == "cpu" and dtype.itemsize == 2, values)


def _chosen(is_able: bool, values: int) -> Kernels | None:
    wish = os.environ.get("MAPDSL_KERNELS", "auto")
    if wish not in ("auto", "torch", "compiled"):
        raise ConversionError("C505", f"MAPDSL_KERNELS is {wish!r}, not auto, torch or compiled")
    if wish == "torch" or not is_able or (wish == "auto" and not _is_worthwhile(values)):
        return None
    with _lock:
        if not _kernels:
            _kernels.append(_load())
    found = _kernels[0]
    if not isinstance(found, str):
        return found
    if wish == "compiled":
        raise ConversionError("C505", f"MAPDSL_KERNELS is compiled, and {found}")
    return None


def _is_worthwhile(values: int) -> bool:
    """Whether the compiled kernels pay for so many values, loading among it."""
    if _kernels:
        return values >= FEW
    _done_without[0] += values
    return values >= WORTHWHILE or _done_without[0] >= MANY


def _load() -> Kernels | str:
    """The compiled kernels, or why there are none."""
    if __name__ != "mapdsl.runtime.codecs.kernels":
        return "an adapter in one file, which needs torch alone, has no compiled kernels"
    if importlib.util.find_spec("numba") is None:
        return "numba is missing: pip install mapdsl[fast]"
    try:
        kernels: Kernels = importlib.import_module("mapdsl.runtime.codecs.compiled").CompiledKernels()
    except (ImportError, SystemError, AttributeError, RuntimeError, TypeError, OSError) as err:
        # What releases of numba raise that do not fit numpy, Python or the machine.
        warnings.warn(f"numba is installed and cannot be imported, so that codecs are slower: {err}", stacklevel=2)
        return f"numba cannot be imported: {err}"
    return kernels


def each(work: Callable[[T], object], items: Iterable[T], device: torch.device) -> None:
    """Do work on each item, on as many threads as torch would use for one operator; nothing of it is differentiated.

    That many operators on small tensors at once, each on one thread, cost less than all threads on one after another.
    Work may call this again: then it goes on on its own thread. Work for a device that is no CPU is queued by one.
    An error is raised when no thread is at work any more. A few items are not worth waking threads.
    """
    waiting = deque(items)
    _has_worked[0] = True
    is_inference = torch.is_inference_mode_enabled()

    def run() -> None:
        # What torch is told by `with` holds for one thread.
        with torch.inference_mode(is_inference), torch.no_grad():
            while waiting:
                try:
                    item = waiting.popleft()
                except IndexError:  # another thread took the last one
                    return
                work(item)

    alone = device.type != "cpu" or hasattr(_role, "is_worker")
    threads = 1 if alone else min(torch.get_num_threads(), len(waiting) // ITEMS_A_THREAD)
    if threads < 2:
        run()
        return
    pool = _pool(threads)
    running = [pool.submit(run) for _ in range(threads)]
    try:
        wait(running, return_when=FIRST_EXCEPTION)
    finally:
        waiting.clear()
        wait(running)
    for one in running:
        one.result()


_role = threading.local()
_has_worked = [False]
_pools: dict[int, ThreadPoolExecutor] = {}  # by their number of threads; at most one


def _pool(threads: int) -> ThreadPoolExecutor:
    """A pool of so many threads or more, which stays: new threads would have to touch new memory."""
    with _lock:
        if not any(size >= threads for size in _pools):
            _pools.clear()  # threads of a pool that nobody holds end
            before = torch.get_num_threads()
            _pools[before] = pool = ThreadPoolExecutor(before, "mapdsl-codecs", work_alone)
            all_marked = threading.Barrier(before, timeout=60)
            wait([pool.submit(all_marked.wait) for _ in range(before)])
            torch.set_num_threads(before)  # for threads that start later: the workers have said 1
        (pool,) = _pools.values()
        return pool


def work_alone() -> None:
    """Say that this thread is one of several that share work: it shares out none of its own, and has one of torch's."""
    _role.is_worker = True
    torch.set_num_threads(1)


def _begin_as_child() -> None:
    """The threads of a process do not live on in its children: one that is forked works on one thread.

    Torch's operators would wait for theirs for ever, once the parent has had work for them.
    """
    global _lock
    _lock = threading.Lock()
    _pools.clear()
    if _has_worked[0]:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_as_child)
