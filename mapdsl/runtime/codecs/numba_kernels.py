"""The inner loops of the block-scaled codecs, compiled: the bytes that torch's operators give, at the speed of memory.

Elements are computed, not looked up, so that a compiler can do sixteen at once; that is why all of this is branchless
arithmetic on 32-bit lanes. Tensors come as flat arrays and the distance between their rows.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import overload

NONE = np.uint32(0xFFFFFFFF)
CHUNK, _HALF = 16, 8  # codes in one vector: loops of just so many steps become a few instructions


_u8, _u16, _u32 = np.uint8, np.uint16, np.uint32
_i32, _f32 = np.int32, np.float32

_MAGNITUDE = _u32(0x7FFFFFFF)
_INFINITY = _u32(0x7F800000)
_QUIET_NAN = _u32(0x7FC00000)
_ZERO, _ONE, _FOUR, _SIXTEEN = _u32(0), _u32(1), _u32(4), _u32(16)
_BELOW_HALF = _u32(0x7FFF)
_INTEGERS = _f32(1.5 * 2**23)  # added to a small float, it rounds it to an integer that then lies in the lowest bits
_INTEGER_BITS = _u32(0x4B400000)


class Form(NamedTuple):
    """The numbers that tell one element from another; of 32 bits each.

    A code is `sign` and `magnitude`. Magnitudes below `normal` mean `((magnitude ^ flip) - offset) * step`; from there
    on they are the upper bits of a float32, after `shift` bits and `bias`; `infinity` is infinite, and those above
    `last_read` are NaN. Encoding, of floats, saturates at `last_written`; NaNs become `nan`, or saturate where there is
    none. Integers (`is_integer`) saturate at `low` and `high`. What a format has not is `NONE`.
    """

    sign: np.uint32
    sign_shift: np.uint32
    magnitude: np.uint32
    flip: np.uint32
    offset: np.int32
    step: np.float32
    normal: np.uint32
    shift: np.uint32
    bias: np.uint32
    infinity: np.uint32
    last_read: np.uint32
    last_written: np.uint32
    nan: np.uint32
    smallest_normal: np.uint32
    denormals: np.float32
    is_integer: np.uint32
    low: np.float32
    high: np.float32


# Other threads may run; dividing by zero gives infinity, as in torch.
compiled: Callable[[Any], Any] = njit(nogil=True, error_model="numpy")


def kept_on_disk(kernel: Any, *made_for: Any) -> Any:
    """A kernel of one signature, compiled; its machine code is kept between processes, in a file of its own.

    numba numbers the files of all kernels of one name, and where two processes compile at once, both may give a number
    to different kernels: the wrong one would be found there for good. So each has a name of its own. And numba looks
    whether the kernel's own file has changed, not whether this one has, whose functions are compiled into it.
    """
    what = repr((made_for, _source(), binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()))
    kernel.__qualname__ = f"{kernel.__name__}.{hashlib.sha256(what.encode()).hexdigest()[:16]}"
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(kernel)
    except RuntimeError:
        # There is no folder to keep it in that may be written to.
        return compiled(kernel)


@functools.cache
def _source() -> str:
    """A digest of this file, where it is one."""
    try:
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    except OSError:
        return ""


# --- one element ---


@compiled
def _bits(value: Any) -> Any:
    return np.float32(value).view(np.uint32)


@compiled
def _from_bits(bits: Any) -> Any:
    return np.uint32(bits).view(np.float32)


@compiled
def _value(code: Any, form: Any) -> Any:
    """The float32 of a code that lies in the lowest bits of a uint32; higher bits do not matter."""
    magnitude = _u32(code & form.magnitude)
    small = _f32(_i32(_i32(magnitude ^ form.flip) - form.offset)) * form.step
    value = _bits(small) if magnitude < form.normal else _u32(_u32(magnitude << form.shift) + form.bias)
    value = _INFINITY if magnitude == form.infinity else value
    value = _QUIET_NAN if magnitude > form.last_read else value
    return _from_bits(_u32(value | _u32(_u32(code & form.sign) << form.sign_shift)))


@compiled
def _product(value: Any, factor: Any) -> Any:
    """The bits of a product; a NaN is the plain one with the sign of the value."""
    bits = _bits(_f32(value * factor))
    sign = _u32(_bits(value) & _u32(~_MAGNITUDE))
    return _u32(_QUIET_NAN | sign) if _u32(bits & _MAGNITUDE) > _INFINITY else bits


@compiled
def _rounded(bits: Any) -> Any:
    """The bf16 nearest to a float32 that is no odd NaN, ties to even."""
    return _u16(_u32(_u32(bits + _u32(_BELOW_HALF + _u32(_u32(bits >> _SIXTEEN) & _ONE))) >> _SIXTEEN))


@compiled
def _nearest(quotient: Any, value: Any, form: Any) -> Any:
    """The code nearest to a quotient, ties to even, saturating; of NaN the one with the sign of `value`."""
    signed = _bits(quotient)
    bits = _u32(signed & _MAGNITUDE)
    half = _u32(_u32(_u32(_ONE << form.shift) >> _ONE) - _ONE)
    normal = _u32(_u32(bits + _u32(half + _u32(_u32(bits >> form.shift) & _ONE))) - form.bias) >> form.shift
    small = _u32(_bits(_f32(_from_bits(bits) + form.denormals)) - _bits(form.denormals))
    code = small if bits < form.smallest_normal else _u32(normal)
    code = min(code, form.last_written)
    if form.infinity != NONE:
        code = form.infinity if bits == _INFINITY else code
    is_nan = bits > _INFINITY
    if form.nan != NONE:
        code = form.nan if is_nan else code
        signed = _bits(value) if is_nan else signed
    else:
        code = form.last_written if is_nan else code
    return _u32(code | _u32(_u32(signed >> form.sign_shift) & form.sign))


@compiled
def _nearest_integer(quotient: Any, form: Any) -> Any:
    """The code of the integer nearest to a quotient, ties to even, saturating; of NaN, that of zero."""
    inside = min(max(quotient, form.low), form.high)
    inside = _f32(0.0) if quotient != quotient else inside
    integer = _u32(_bits(_f32(inside + _INTEGERS)) - _INTEGER_BITS)
    return _u32(_u32(_u32(integer + _u32(form.offset)) ^ form.flip) & form.magnitude)


def _loaded(values: Any, place: Any) -> Any:
    """A bf16 (of uint16 bits) or float32 (of uint32 bits) of a flat array, as float32."""
    raise NotImplementedError


@overload(_loaded)
def _load(values: Any, place: Any) -> Any:
    def from_bf16(values: Any, place: Any) -> Any:
        return _from_bits(_u32(_u32(values[place]) << _SIXTEEN))

    def from_float32(values: Any, place: Any) -> Any:
        return _from_bits(values[place])

    return from_bf16 if values.dtype == types.uint16 else from_float32


def _stored(bits: Any, values: Any) -> Any:
    """The bits of a float32 as an array holds them: all, or rounded to bf16."""
    raise NotImplementedError


@overload(_stored)
def _store(bits: Any, values: Any) -> Any:
    def as_bf16(bits: Any, values: Any) -> Any:
        return _rounded(bits)

    def as_float32(bits: Any, values: Any) -> Any:
        return bits

    return as_bf16 if values.dtype == types.uint16 else as_float32


# --- a tile of blocks ---


@compiled
def _read_one(codes: Any, place: Any, scale: Any, values: Any, form: Any, per: Any) -> Any:
    """Decode one byte: one code, or two, low nibble first."""
    byte = _u32(codes[place])
    values[place * per] = _stored(_product(_value(byte, form), scale), values)
    if per == 2:
        values[place * per + 1] = _stored(_product(_value(_u32(byte >> _FOUR), form), scale), values)


@compiled
def _write_one(codes: Any, place: Any, scale: Any, values: Any, form: Any, per: Any) -> Any:
    """Encode the value, or the two, of one byte."""
    byte = _code(_loaded(values, place * per), scale, form)
    if per == 2:
        byte = _u32(byte | _u32(_code(_loaded(values, place * per + 1), scale, form) << _FOUR))
    codes[place] = _u8(byte)


@compiled
def _code(value: Any, scale: Any, form: Any) -> Any:
    quotient = _f32(value / scale)
    return _nearest_integer(quotient, form) if form.is_integer != _ZERO else _nearest(quotient, value, form)


@compiled
def _convert_one(reading: Any, codes: Any, place: Any, scale: Any, values: Any, form: Any, per: Any) -> Any:
    if reading:
        _read_one(codes, place, scale, values, form, per)
    else:
        _write_one(codes, place, scale, values, form, per)


@compiled
def spread(factors: Any, band: Any, width: Any, scales: Any) -> Any:
    """Each factor of a row of blocks `width` times."""
    for group in range(factors.shape[1]):
        scale = factors[band, group]
        whole = width // _HALF
        for chunk in range(whole):
            first = group * width + chunk * _HALF
            some = scales[first : first + _HALF]
            for place in range(_HALF):
                some[place] = scale
        for place in range(group * width + whole * _HALF, (group + 1) * width):
            scales[place] = scale


@njit(nogil=True, error_model="numpy", inline="always")
def convert_row(
    reading: Any, codes: Any, values: Any, factors: Any, band: Any, width: Any, scales: Any, form: Any, per: Any
) -> Any:
    """Decode or encode one row of a band of blocks; `scales` holds its factors spread where `width` is no chunks."""
    groups = factors.shape[1]
    if width % CHUNK == 0:
        for group in range(groups):
            scale = factors[band, group]
            for first in range(group * width, (group + 1) * width, CHUNK):
                some, their = codes[first : first + CHUNK], values[first * per : (first + CHUNK) * per]
                for place in range(CHUNK):
                    _convert_one(reading, some, place, scale, their, form, per)
    else:
        for place in range(groups * width):
            _convert_one(reading, codes, place, scales[place], values, form, per)


@functools.cache
def converter(reading: bool, form: Any, per: int, bits: int) -> Any:
    """The kernel that decodes (`reading`) or encodes blocks of `height` x `width` bytes, `per` codes each, low first.

    `codes` are uint8, `values` those of bf16 (16 `bits`, uint16) or float32 (32, uint32), `factors` float32 `[bands,
    groups]`.
    """

    def convert(
        codes: Any, code_stride: Any, values: Any, value_stride: Any, factors: Any, height: Any, width: Any
    ) -> Any:
        bands, groups = factors.shape
        row_width = groups * width
        scales = np.empty(row_width, np.float32)
        for band in range(bands):
            if width % CHUNK != 0:
                spread(factors, band, width, scales)
            for row in range(band * height, (band + 1) * height):
                mine = codes[row * code_stride : row * code_stride + row_width]
                theirs = values[row * value_stride : row * value_stride + row_width * per]
                convert_row(reading, mine, theirs, factors, band, width, scales, form, per)

    return kept_on_disk(convert, reading, form, per, bits)


@functools.cache
def measurer(bits: int) -> Any:
    """The kernel that finds the largest magnitudes of blocks of values of so many bits."""

    def largest(values: Any, stride: Any, height: Any, width: Any, magnitudes: Any) -> Any:
        """The largest magnitudes, as bits (uint16 or uint32 `[bands, groups]`), of blocks of `height` x `width`."""
        bands, groups = magnitudes.shape
        sign = values.dtype.type(1) << values.dtype.type(8 * values.itemsize - 1)
        for band in range(bands):
            for row in range(band * height, (band + 1) * height):
                for group in range(groups):
                    start = row * stride + group * width
                    some = values[start : start + width]
                    found = magnitudes[band, group]
                    for place in range(width):
                        found = max(found, some[place] & ~sign)
                    magnitudes[band, group] = found

    return kept_on_disk(largest, bits)
