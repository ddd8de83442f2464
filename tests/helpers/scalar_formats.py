"""Number formats one number at a time, in Python's own integers and floats: what the codecs are held against.

Products of a code and a scale have at most 32 bits, so a Python float holds them exactly; `rounded` then does what the
codecs promise, a float32 and from it the working dtype, both to nearest even.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable

import torch
from torch import Tensor


def single(value: float) -> float:
    """The float32 nearest to a number, infinite beyond the largest."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def pattern(value: float, dtype: torch.dtype) -> int:
    """The bits of a number that was rounded to float32 and from there to `dtype`; -1 for a NaN."""
    if math.isnan(value):
        return -1
    word = int(struct.unpack("<I", struct.pack("<f", single(value)))[0])
    if dtype == torch.float32:
        return word
    if dtype == torch.bfloat16:
        return (word + 0x7FFF + (word >> 16 & 1)) >> 16
    try:
        return int(struct.unpack("<H", struct.pack("<e", single(value)))[0])
    except OverflowError:
        return 0xFC00 if value < 0 else 0x7C00


def patterns(values: Iterable[float], dtype: torch.dtype) -> Tensor:
    """`pattern` of each, int64."""
    return torch.tensor([pattern(value, dtype) for value in values])


def found(values: Tensor) -> Tensor:
    """The bits of decoded values as `patterns` has them, flat."""
    integers = {2: torch.int16, 4: torch.int32}[values.element_size()]
    words = values.contiguous().view(integers).long().flatten() & ((1 << 8 * values.element_size()) - 1)
    return torch.where(values.flatten().isnan(), -1, words)


def minifloat(code: int, exponent: int, mantissa: int, bias: int) -> float:
    """A finite number of sign, exponent and mantissa bits."""
    sign, power, fraction = (
        code >> exponent + mantissa & 1,
        code >> mantissa & (1 << exponent) - 1,
        code % (1 << mantissa),
    )
    if power:
        size = math.ldexp((1 << mantissa) + fraction, power - bias - mantissa)
    else:
        size = math.ldexp(fraction, 1 - bias - mantissa)
    return -size if sign else size


def e4m3(code: int) -> float:
    """OCP FP8 E4M3: one NaN of each sign, no infinity."""
    return math.nan if code & 0x7F == 0x7F else minifloat(code, 4, 3, 7)


def e5m2(code: int) -> float:
    """OCP FP8 E5M2: IEEE's specials."""
    if code & 0x7F == 0x7C:
        return -math.inf if code >> 7 else math.inf
    return math.nan if code & 0x7F > 0x7C else minifloat(code, 5, 2, 15)


def e2m1(code: int) -> float:
    """OCP FP4 E2M1, no specials."""
    return minifloat(code, 2, 1, 1)


def e8m0(byte: int) -> float:
    """A bare exponent."""
    return math.nan if byte == 255 else math.ldexp(1.0, byte - 127)


def signed(code: int, bits: int) -> int:
    """Two's complement."""
    return code - (1 << bits) if code >> bits - 1 else code


def product(value: float, factor: float) -> float:
    """A float32 product; nothing is added to what a Python float says of zeros, infinities and NaNs."""
    return single(value * factor)


def elements(element: str, byte: int) -> list[float]:
    """The numbers in a byte, the low bits first; `i4` and `i8` in words are offset by half their range."""
    match element:
        case "f8e4m3":
            return [e4m3(byte)]
        case "f8e5m2":
            return [e5m2(byte)]
        case "f4e2m1":
            return [e2m1(byte & 15), e2m1(byte >> 4)]
        case "i8":
            return [float(signed(byte, 8))]
        case "i8 in words":
            return [float(byte - 128)]
        case "i4 in words":
            return [float((byte & 15) - 8), float((byte >> 4) - 8)]
    raise ValueError(element)
