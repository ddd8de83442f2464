"""Number formats as bits: names of dtypes, and casts that keep every NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from mapdsl.runtime.codecs.storage import DTYPES
from mapdsl.runtime.codecs.tiles import STRIP_ELEMENTS, strips

DTYPE_BY_NAME: dict[str, torch.dtype] = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f8e4m3": torch.float8_e4m3fn,
    "f8e5m2": torch.float8_e5m2,
    "f8e8m0": torch.float8_e8m0fnu,
    "i8": torch.int8,
    "u8": torch.uint8,
    "i32": torch.int32,
    "i64": torch.int64,
}

# By safetensors' spelling, as in headers.
DTYPE_BY_SPELLING = {DTYPES[word]: dtype for word, dtype in DTYPE_BY_NAME.items()}

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_INTEGER_BY_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Elements that are looked at together: of a tile all, also where a byte has two.
_AT_ONCE = 2 * STRIP_ELEMENTS

# Explicit mantissa bits of the IEEE-like formats, which have a sign bit first and NaNs at the highest exponent.
_MANTISSA_BITS = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10, torch.float8_e5m2: 2}


def dtype_name(dtype: torch.dtype) -> str:
    """The language's word for a dtype: `bf16`, `f8e4m3`; torch's own where the language has none."""
    words = {found: word for word, found in DTYPE_BY_NAME.items()}
    return words.get(dtype, str(dtype).removeprefix("torch."))


def integer_dtype(itemsize: int) -> torch.dtype:
    """The integer dtype of 1, 2, 4 or 8 bytes that stands for a value's bits."""
    return _INTEGER_BY_SIZE[itemsize]


def as_bits(tensor: Tensor) -> Tensor:
    """The same memory seen as integers of the same width, so that `==` compares bits (-0.0, NaN payloads)."""
    return tensor.view(_INTEGER_BY_SIZE[tensor.element_size()])


def bits_differ(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one dtype and shape differ in any bit; eight times faster than asking `!=` for `any`."""
    return bool((as_bits(left) ^ as_bits(right)).view(torch.uint8).max()) if left.numel() else False


def quiet_nan_bits(dtype: torch.dtype) -> tuple[int, int]:
    """The bits of the plain quiet NaN of a float dtype, positive and negative, as signed integers."""
    width, mantissa = dtype.itemsize * 8, _MANTISSA_BITS[dtype]
    positive = ((1 << (width - mantissa)) - 1) << (mantissa - 1)
    return positive, positive - (1 << (width - 1))


def holds_nan(tensor: Tensor) -> bool:
    """Whether a float tensor holds a NaN."""
    return _largest_magnitude(tensor) > _infinity(tensor.dtype)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or NaN. A bare exponent (e8m0) may be NaN: that is one of its codes."""
    if not tensor.dtype.is_floating_point or tensor.dtype == torch.float8_e8m0fnu:
        return True
    # e4m3 has no infinity, and one NaN of each sign.
    limit = 0x7F if tensor.dtype == torch.float8_e4m3fn else _infinity(tensor.dtype)
    return _largest_magnitude(tensor) < limit


def _infinity(dtype: torch.dtype) -> int:
    """The bits of infinity in an IEEE-like format."""
    width, mantissa = dtype.itemsize * 8, _MANTISSA_BITS[dtype]
    return ((1 << (width - 1 - mantissa)) - 1) << mantissa


def _largest_magnitude(tensor: Tensor) -> int:
    """The largest bits without the sign: magnitudes are ordered as their bits are, and integers compared faster."""
    if tensor.is_meta or not tensor.numel():
        return -1
    magnitude = (1 << (tensor.element_size() * 8 - 1)) - 1
    some = strips(tuple(tensor.shape), _AT_ONCE)
    return max(int((as_bits(tensor[strip]) & magnitude).max()) for strip in some)


def exact_cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round f32, bf16 or f16 to nearest even; of NaNs a wider dtype keeps sign and payload, a narrower one their top.

    torch's own casts turn every NaN into one (bf16) or quieten it (f16), differently in vectors and in tails.
    """
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if holds_nan(tensor):
        nan = tensor.isnan()
        as_bits(result)[nan] = _nan_bits(tensor[nan], dtype)
    return result


def _nan_bits(nans: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits, in `dtype`, of the NaNs of a one-dimensional tensor."""
    kept = _MANTISSA_BITS[nans.dtype]
    wanted, width = _MANTISSA_BITS[dtype], dtype.itemsize * 8
    payload = as_bits(nans).long() & ((1 << kept) - 1)
    payload = payload << (wanted - kept) if wanted >= kept else payload >> (kept - wanted)
    # A payload that lived in the lost bits alone would read as infinity.
    payload = torch.where(payload == 0, 1 << (wanted - 1), payload)
    exponent = ((1 << (width - 1 - wanted)) - 1) << wanted
    # -2**(width - 1) is the sign bit, as the signed integer of that width.
    signed = torch.where(nans.signbit(), -(1 << (width - 1)), 0)
    return (payload + exponent + signed).to(_INTEGER_BY_SIZE[dtype.itemsize])


def round_product(values: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """`values * factors` in float32, rounded to `dtype`; a NaN product is the plain one with the sign of the value.

    The sign says nothing, but it is the same on every device, so that codes of either sign come back.
    """
    product = values * factors
    result = product.to(dtype)
    if holds_nan(product):
        nan = product.isnan()
        positive, negative = quiet_nan_bits(dtype)
        signs = torch.where(values.signbit().expand_as(nan), negative, positive)
        as_bits(result)[nan] = signs[nan].to(integer_dtype(dtype.itemsize))
    return result
