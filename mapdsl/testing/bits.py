"""Tensors as bit patterns: NaNs with payloads, -0.0, denormals, infinities, and everything else that bytes can be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float32, torch.float16)
PLAIN_DTYPES = (
    *FLOATS,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
)

# Quiet and signalling NaNs of both signs with payloads, -0.0, the smallest denormal, both infinities; for bytes that
# are codes or bare exponents: the ends of the range, and the code 8 in either nibble.
_SPECIALS = {
    torch.float64: (0x7FF8000000000001, -0xFFFFFFFFFFFFF, -(1 << 63), 1, 0x7FF << 52),
    torch.float32: (0x7FC00001, -0x7FFFFF, -(1 << 31), 1, 0x7F800000, -0x800000),
    torch.bfloat16: (0x7FC1, -0x7F, -(1 << 15), 1, 0x7F80, -0x80),
    torch.float16: (0x7E01, -0x3FF, -(1 << 15), 1, 0x7C00, -0x400),
    torch.float8_e4m3fn: (0x7F, 0xFF, 0x80, 0x01),
    torch.float8_e5m2: (0x7D, 0xFE, 0x80, 0x01, 0x7C),
    torch.float8_e8m0fnu: (0, 1, 127, 254, 255),
    torch.int8: (0x00, 0x08, 0x80, 0x88, 0xFF),
    torch.uint8: (0x00, 0x08, 0x80, 0x88, 0xFF),
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The same elements as integers, so that comparing them compares bytes."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every byte."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def finite(scales: Tensor) -> Tensor:
    """The same scales with one in the place of those that are refused: all but bare exponents must be finite."""
    if scales.dtype.is_floating_point and scales.dtype != torch.float8_e8m0fnu:
        return torch.where(scales.float().isfinite(), scales.float(), 1.0).to(scales.dtype)
    return scales


def random_bits(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random bytes of a dtype, up to a third of the elements replaced by special ones."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).bool()
    count = math.prod(shape)
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (-(-count * dtype.itemsize // 8),), generator=generator)
    elements = words.view(torch.uint8)[: count * dtype.itemsize].view(_INTEGERS[dtype.itemsize])
    specials = _SPECIALS.get(dtype, ())
    if specials and count:
        places = torch.randint(0, count, (1 + count // 3,), generator=generator)
        picks = torch.randint(0, len(specials), (len(places),), generator=generator)
        elements[places] = torch.tensor(specials, dtype=elements.dtype)[picks]
    return elements.view(dtype).reshape(shape)


def ordinary(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, *, negative: bool) -> Tensor:
    """Values that every float format can hold roughly: normally distributed, or none above zero."""
    values = torch.randn(shape, generator=generator)
    return (-values.abs() if negative else values).to(dtype)


def small_numbers(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Integers that every float dtype holds, and their parts over 8 ranks too."""
    return torch.randint(-100, 100, shape, generator=generator).to(dtype)
