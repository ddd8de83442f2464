"""Compiled kernels on torch's tensors: `pip install mapdsl[fast]` installs the compiler, numba."""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mapdsl.runtime.codecs import numba_kernels, numba_transpose
from mapdsl.runtime.codecs.elements import Integer, MiniFloat, TableElement
from mapdsl.runtime.codecs.numba_kernels import NONE, Form

_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


class CompiledKernels:
    """See `mapdsl.runtime.codecs.kernels.Kernels`."""

    def decode(
        self, element: TableElement, codes: Tensor, factors: Tensor, values: Tensor, height: int, width: int
    ) -> None:
        """Write the values of a tile."""
        kernel = _kernel(numba_kernels.converter, True, form_of(element), element.per, 8 * values.element_size())
        _run(kernel, *_rows(codes), *_rows(values), factors.contiguous().numpy(), height, width)

    def decode_transposed(
        self, element: TableElement, codes: Tensor, factors: Tensor, out: Tensor, height: int, width: int
    ) -> bool:
        """Write the values of a tile to `out` `[columns, rows]`; False where it cannot."""
        edge = numba_transpose.EDGE
        if out.dtype != torch.bfloat16 or out.shape[0] % edge or out.shape[1] % edge or not _is_of_words(out):
            return False
        kernel = _kernel(numba_transpose.transposing_decoder, form_of(element), element.per)
        _run(kernel, *_rows(codes), *_words(out), factors.contiguous().numpy(), height, width)
        return True

    def encode(
        self, element: TableElement, values: Tensor, factors: Tensor, codes: Tensor, height: int, width: int
    ) -> None:
        """Write the codes of a tile."""
        kernel = _kernel(numba_kernels.converter, False, form_of(element), element.per, 8 * values.element_size())
        _run(kernel, *_rows(codes), *_rows(values), factors.contiguous().numpy(), height, width)

    def largest(self, values: Tensor, bands: int, groups: int, height: int, width: int) -> Tensor:
        """The largest magnitude of each block, float32 `[bands, groups]`; NaNs are the largest."""
        flat, stride = _rows(values)
        found = np.zeros((bands, groups), flat.dtype)
        _run(_kernel(numba_kernels.measurer, 8 * values.element_size()), flat, stride, height, width, found)
        bits = torch.from_numpy(found.astype(np.int32, copy=False))
        return (bits << 16 if values.dtype == torch.bfloat16 else bits).view(torch.float32)

    def transpose(self, source: Tensor, out: Tensor) -> bool:
        """Write `out` `[columns, rows]` from `source` `[rows, columns]`, of 16-bit values; False where it cannot."""
        edge = numba_transpose.EDGE
        rows, columns = (size - size % edge for size in source.shape)
        if not (rows and columns and _is_of_words(source) and _is_of_words(out)):
            return False
        kernel = _kernel(numba_transpose.transposer)
        _run(kernel, *_words(source[:rows, :columns]), *_words(out[:columns, :rows]), rows, columns)
        out[columns:].copy_(source[:, columns:].T)
        out[:columns, rows:].copy_(source[rows:, :columns].T)
        return True


_lock = threading.Lock()


def _kernel(make: Callable[..., Any], *made_for: Any) -> Any:
    """The one kernel made for something: were each thread to make its own, each would be compiled."""
    with _lock:
        return make(*made_for)


def _run(kernel: Any, *arguments: Any) -> None:
    """Run a kernel, compiled where it has not been; that it cannot be kept on a full disk does no harm."""
    try:
        kernel(*arguments)
    except OSError:
        kernel(*arguments)


@functools.cache
def form_of(element: TableElement) -> Form:
    """What the kernels have to know of an element."""
    if isinstance(element, Integer):
        return _integer_form(element)
    assert isinstance(element, MiniFloat)
    return _float_form(element)


def _float_form(element: MiniFloat) -> Form:
    mantissa, count = element.mantissa_bits, len(element.magnitudes)
    bits = element.exponent_bits + mantissa
    bias = 2 ** (element.exponent_bits - 1) - 1
    step = 2.0 ** (1 - bias - mantissa)
    finite = [code for code in range(count) if math.isfinite(element.magnitudes[code])]
    numbers = [code for code in range(count) if not math.isnan(element.magnitudes[code])]
    infinity = element.magnitudes.index(math.inf) if element.holds_inf else NONE
    return _form(
        sign=1 << bits,
        sign_shift=31 - bits,
        magnitude=count - 1,
        step=step,
        normal=1 << mantissa,
        shift=23 - mantissa,
        bias=127 - bias << 23,
        infinity=infinity,
        last_read=numbers[-1],
        last_written=finite[-1],
        nan=count - 1 if element.holds_nan else NONE,
        smallest_normal=128 - bias << 23,
        denormals=2.0**23 * step,
    )


def _integer_form(element: Integer) -> Form:
    """Integers may be narrower than the bits that hold them: all of those are read, and few values are written."""
    codes = 2 ** (8 // element.per)
    return _form(
        magnitude=codes - 1,
        flip=0 if element.offset else codes // 2,
        offset=element.offset or codes // 2,
        step=1.0,
        normal=codes,
        is_integer=1,
        low=element.low,
        high=element.high,
    )


def _form(**given: float) -> Form:
    """A form of these numbers, each in the dtype that the kernels need; what is not given is 0 or `NONE`."""
    blank = {"infinity": NONE, "last_read": NONE, "last_written": NONE, "nan": NONE}
    dtypes: dict[str, Any] = {
        "offset": np.int32,
        "step": np.float32,
        "denormals": np.float32,
        "low": np.float32,
        "high": np.float32,
    }
    return Form(**{name: dtypes.get(name, np.uint32)(given.get(name, blank.get(name, 0))) for name in Form._fields})


def _rows(tensor: Tensor) -> tuple[np.ndarray, int]:
    """A tensor `[rows, columns]`, whose columns lie together, as a flat array of its bits and the distance of rows."""
    rows, columns = tensor.shape
    stride = tensor.stride(0) if rows > 1 else columns
    flat = tensor.as_strided(((rows - 1) * stride + columns,), (1,))
    return flat.view(_UNSIGNED[tensor.element_size()]).numpy(), stride


def _is_of_words(tensor: Tensor) -> bool:
    """Whether the rows of a tensor of 16-bit values lie so that they can be read in words of four, the first lowest."""
    stride, per = tensor.stride(0), numba_transpose.PER_WORD
    return sys.byteorder == "little" and not (stride % per or tensor.storage_offset() % per or tensor.data_ptr() % 8)


def _words(tensor: Tensor) -> tuple[np.ndarray, int]:
    """Such a tensor as a flat array of uint64 and the distance of rows in words."""
    rows, columns = tensor.shape
    flat = tensor.as_strided(((rows - 1) * tensor.stride(0) + columns,), (1,))
    return flat.view(torch.uint64).numpy(), tensor.stride(0) // numba_transpose.PER_WORD
