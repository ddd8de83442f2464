"""Every code under every scale: read as one number at a time is, in Python, and given back byte for byte."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.codecs.formats import as_bits
from mapdsl.runtime.codecs.group_int import GroupInt
from mapdsl.runtime.codecs.packed_int import PackedInt
from tests.helpers.scalar_formats import e4m3, e8m0, elements, found, patterns, product, signed, single
from tests.test_codecs_layouts import KEY, MXFP4, nvfp4, packed_int

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
ALL_BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)

# Denormal, least, largest, next to a power, zeros of both signs, negative, nowhere special.
HARD = [
    1.0,
    1 + 2.0**-23,
    2 - 2.0**-23,
    2.0**-126,
    2.0**-149,
    3e-40,
    3.4e38,
    0.0,
    -0.0,
    -0.3,
    1 / 3,
    7.3e-4,
    448.0,
    1e-35,
]


def hard_scales(dtype: torch.dtype) -> Tensor:
    """Finite scales of a float dtype: the hard ones, and each 1009th pattern."""
    every = torch.arange(-(1 << 15), 1 << 15, 1009).to(torch.int16)
    some = every.view(dtype) if dtype != torch.float32 else (every.int() << 16 | 0x5A5A).view(dtype)
    scales = torch.cat([torch.tensor(HARD).to(dtype), some])
    return scales[scales.isfinite()]


def assert_comes_back(codec: Codec, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The values, which have to give every part back."""
    values = codec.decode(KEY, parts, dtype)
    back = codec.encode(KEY, values, codec.keep(KEY, parts, dtype))
    assert back.edited == 0
    for name, part in parts.items():
        assert back.parts[name].dtype == part.dtype
        assert torch.equal(as_bits(back.parts[name]), as_bits(part.contiguous())), name
    return values


def all_codes(rows: int, dtype: torch.dtype) -> Tensor:
    return ALL_BYTES.repeat(rows, 1).view(dtype)


# --- scales that are powers of two: all 256 codes under all 256 scales ---


@dataclass(frozen=True)
class Powers:
    element: str
    codec: BlockScaled
    payload: torch.dtype
    scale: torch.dtype


def powers(element: str, payload: torch.dtype, scale: torch.dtype, packed: str = "i8") -> Powers:
    word = "u8" if scale == torch.uint8 else "f8e8m0"
    codec = BlockScaled("mx", element, (1, 32), scale="{key}_scale", scale_dtypes=(word,), packed=packed)
    return Powers(element, codec, payload, scale)


POWERS = {
    "MXFP8": powers("f8e4m3", torch.float8_e4m3fn, torch.float8_e8m0fnu),
    "MXFP8 as u8": powers("f8e4m3", torch.float8_e4m3fn, torch.uint8),
    "MXFP8 e5m2": powers("f8e5m2", torch.float8_e5m2, torch.float8_e8m0fnu),
    "DeepSeek-V4": powers("f4e2m1", torch.int8, torch.float8_e8m0fnu),
    "MXFP4": powers("f4e2m1", torch.uint8, torch.uint8, "u8"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", POWERS)
def test_every_code_under_every_power(name: str, dtype: torch.dtype) -> None:
    one = POWERS[name]
    codes = all_codes(256, one.payload)
    blocks = 256 * one.codec.storage.per // 32
    scale = ALL_BYTES[:, None].repeat(1, blocks).view(one.scale)
    values = assert_comes_back(one.codec, {KEY: codes, f"{KEY}_scale": scale}, dtype)
    row = [value for byte in range(256) for value in elements(one.element, byte)]
    assert torch.equal(found(values), patterns((product(v, e8m0(s)) for s in range(256) for v in row), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_of_gpt_oss(dtype: torch.dtype) -> None:
    parts = {
        f"{KEY}_blocks": ALL_BYTES.view(1, 1, 16, 16).repeat(2, 128, 1, 1),
        f"{KEY}_scales": ALL_BYTES.view(2, 128, 1).repeat(1, 1, 16),
    }
    values = assert_comes_back(MXFP4, parts, dtype)
    assert tuple(values.shape) == (2, 128, 512)
    row = [value for byte in range(256) for value in elements("f4e2m1", byte)]
    assert torch.equal(found(values), patterns((product(v, e8m0(s)) for s in range(256) for v in row), dtype))


# --- float scales ---

FLOATS = {
    "FP8": ("f8e4m3", torch.float8_e4m3fn),
    "FP8 e5m2": ("f8e5m2", torch.float8_e5m2),
    "int8": ("i8", torch.int8),
    "FP4": ("f4e2m1", torch.int8),
}


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FLOATS)
def test_every_code_under_hard_scales(name: str, scale_dtype: torch.dtype, dtype: torch.dtype, inverse: bool) -> None:
    element, payload = FLOATS[name]
    codec = BlockScaled("q", element, (1, None), scale="{key}_scale", inverse=inverse)
    scale = hard_scales(scale_dtype)[:, None]
    values = assert_comes_back(codec, {KEY: all_codes(len(scale), payload), f"{KEY}_scale": scale}, dtype)
    row = [value for byte in range(256) for value in elements(element, byte)]
    factors = [inverted(s) if inverse else s for s in scale.flatten().tolist()]
    assert torch.equal(found(values), patterns((product(v, s) for s in factors for v in row), dtype))


def inverted(scale: float) -> float:
    """The float32 reciprocal; a scale of zero stands for zeros."""
    return single(1 / scale) if scale else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_packed_integer_under_hard_scales(bits: int, dtype: torch.dtype) -> None:
    for scale_dtype in (torch.float32, torch.bfloat16, torch.float16):
        scale = hard_scales(scale_dtype)[:, None]
        codes = all_codes(len(scale), torch.int32)
        shape = torch.tensor([len(scale), 256 * 8 // bits])
        parts = {f"{KEY}_packed": codes, f"{KEY}_scale": scale, f"{KEY}_shape": shape}
        values = assert_comes_back(packed_int(f"i{bits}", None), parts, dtype)
        row = [value for byte in range(256) for value in elements(f"i{bits} in words", byte)]
        expected = patterns((product(v, s) for s in scale.flatten().tolist() for v in row), dtype)
        assert torch.equal(found(values), expected)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("whole", [1.0, 3.1e-5, 2.0**-126, 1.7e30])
def test_every_nvfp4_byte_under_every_scale(whole: float, dtype: torch.dtype, inverse: bool) -> None:
    scales = [byte for byte in range(256) if byte & 0x7F != 0x7F]
    parts = {
        KEY: all_codes(len(scales), torch.uint8),
        f"{KEY}_scale": ALL_BYTES[scales][:, None].repeat(1, 32).view(torch.float8_e4m3fn),
        f"{KEY}_scale_2": torch.tensor(whole),
    }
    values = assert_comes_back(nvfp4(global_inverse=inverse), parts, dtype)
    over = single(whole)
    factors = [single(e4m3(byte) / over if inverse else e4m3(byte) * over) for byte in scales]
    row = [value for byte in range(256) for value in elements("f4e2m1", byte)]
    assert torch.equal(found(values), patterns((product(v, s) for s in factors for v in row), dtype))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_byte_of_deepspeed(bits: int, dtype: torch.dtype, inverse: bool) -> None:
    """Bytes beyond the range of narrow integers too: they are read as what they are, and come back."""
    scale = hard_scales(torch.float32)
    shape = (len(scale), 1) if inverse else (1, len(scale))
    parts = {KEY: all_codes(len(scale), torch.int8), f"{KEY}_scale": scale.view(shape)}
    values = assert_comes_back(GroupInt("g", bits, len(scale), inverse=inverse), parts, dtype)
    factors = [inverted(s) if inverse else s for s in scale.tolist()]
    row = [float(signed(byte, 8)) for byte in range(256)]
    assert torch.equal(found(values), patterns((product(v, s) for s in factors for v in row), dtype))


# --- GPTQ and AWQ: every element under every zero point ---


def stream(numbers: list[int], bits: int) -> list[int]:
    """32-bit words of a stream of numbers, low bits first, as signed integers."""
    total = sum(number << place * bits for place, number in enumerate(numbers))
    words = [total >> 32 * word & 0xFFFFFFFF for word in range(len(numbers) * bits // 32)]
    return [signed(word, 32) for word in words]


AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # the nibble, counted from the lowest, that holds each of eight columns


def awq(numbers: list[int]) -> list[int]:
    """AutoAWQ's words of eight columns each."""
    words = []
    for start in range(0, len(numbers), 8):
        nibbles = [0] * 8
        for column, place in enumerate(AWQ_PLACES):
            nibbles[place] = numbers[start + column]
        words += stream(nibbles, 4)
    return words


def zero_points(layout: str, bits: int) -> tuple[PackedInt, dict[str, Tensor], list[float]]:
    """All elements down the rows (two groups), all zero points along the columns; the values expected, row by row."""
    codes, zeros = list(range(1 << bits)), list(range(1 << bits)) * (8 if bits == 2 else 4 if bits == 3 else 1)
    while len(codes) * bits % 32 or len(codes) < 32:
        codes = codes * 2
    columns, rows, half = len(zeros), len(codes), len(codes) // 2
    scale = hard_scales(torch.float16).repeat(2 * columns)[: 2 * columns].view(2, columns)
    stem = KEY.rpartition(".")[0]
    if layout == "awq":
        payload = torch.tensor([awq([code] * columns) for code in codes], dtype=torch.int32)
        packed_zeros = torch.tensor([awq(zeros)] * 2, dtype=torch.int32)
    else:
        payload = torch.tensor(stream(codes, bits), dtype=torch.int32)[:, None].repeat(1, columns)
        packed_zeros = torch.tensor([stream(zeros, bits)] * 2, dtype=torch.int32)
    offset = 1 if layout == "gptq" else 0
    codec = PackedInt(layout, "awq" if layout == "awq" else "gptq", bits, half, zero_offset=offset)
    parts = {f"{stem}.qweight": payload, f"{stem}.qzeros": packed_zeros, f"{stem}.scales": scale}
    group = [row // half for row in range(rows)]
    if layout != "awq":
        group = [1 - row % 2 for row in range(rows)]  # act-order: rows lie in any group
        parts[f"{stem}.g_idx"] = torch.tensor(group, dtype=torch.int32)
    expected = [
        product(float(code - zero - offset), factor)
        for code, place in zip(codes, group, strict=True)
        for zero, factor in zip(zeros, scale[place].tolist(), strict=True)
    ]
    return codec, parts, expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "bits"), [("awq", 4), *((v, b) for v in ("gptq", "gptq_v2") for b in (2, 3, 4, 8))])
def test_every_element_under_every_zero_point(layout: str, bits: int, dtype: torch.dtype) -> None:
    codec, parts, expected = zero_points(layout, bits)
    values = assert_comes_back(codec, parts, dtype)
    # (0 - 0) * a negative scale is -0.0 in both.
    assert torch.equal(found(values), patterns(expected, dtype))
    assert math.prod(values.shape) == len(expected)
