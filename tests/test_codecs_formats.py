"""Number formats of the codecs, against torch's own conversions and against arithmetic in rationals."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from mapdsl.runtime.codecs.elements import MiniFloat, element_named
from mapdsl.runtime.codecs.formats import as_bits, bits_differ, exact_cast, holds_nan
from mapdsl.runtime.codecs.scales import scale_values, written_powers, written_scale

ALL_BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
ALL_HALVES = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def mini(name: str) -> MiniFloat:
    element = element_named(name, "i8")
    assert isinstance(element, MiniFloat)
    return element


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(("name", "dtype"), [("f8e4m3", torch.float8_e4m3fn), ("f8e5m2", torch.float8_e5m2)])
def test_fp8_values_are_torchs(name: str, dtype: torch.dtype) -> None:
    mine = mini(name).read(ALL_BYTES.view(dtype)[:, None], ones(256, 1), torch.float32)[:, 0]
    theirs = ALL_BYTES.view(dtype).float()
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert torch.equal(mine.signbit(), ALL_BYTES >= 128)
    finite = ~theirs.isnan()
    assert torch.equal(as_bits(mine)[finite], as_bits(theirs)[finite])


def test_fp4_values_low_nibble_first_and_code_8_is_negative_zero() -> None:
    mine = mini("f4e2m1").read(ALL_BYTES.view(torch.int8)[:, None], ones(256, 1), torch.float32)
    table = E2M1 + [-value for value in E2M1]
    for byte in range(256):
        assert mine[byte].tolist() == [table[byte & 15], table[byte >> 4]]
    assert as_bits(mine[0x80]).tolist() == [0, -(1 << 31)]


def nearest_code(value: float, values: list[float]) -> int:
    """Round to nearest, ties to the even code, in rationals."""
    return min(range(len(values)), key=lambda code: (abs(Fraction(values[code]) - Fraction(value)), code % 2))


@pytest.mark.parametrize("name", ["f8e4m3", "f8e5m2", "f4e2m1"])
def test_rounding_is_to_nearest_even_and_saturates(name: str) -> None:
    """All codes, all midpoints, and the float32 right below and right above each, of both signs."""
    element = mini(name)
    values = [v for v in (E2M1 if name == "f4e2m1" else ALL_BYTES[:128].view(element.dtype).tolist()) if v < math.inf]
    points = torch.tensor(values + [(a + b) / 2 for a, b in pairwise(values)] + [3e38, 2.0**-140])
    below, above = (torch.nextafter(points, torch.tensor(end)) for end in (0.0, math.inf))
    points = torch.cat([points, below, above])
    expected = [nearest_code(value, values) for value in points.tolist()]
    negative = 8 if name == "f4e2m1" else 128
    for sign, offset in ((1, 0), (-1, negative)):
        pairs = (points * sign).repeat_interleave(element.per)
        codes = element.write(pairs, ones(1), element.dtype).view(torch.uint8)
        shift = 1 if element.per == 1 else 17
        assert codes.tolist() == [(code + offset) * shift for code in expected]


@pytest.mark.parametrize("name", ["f8e4m3", "f8e5m2"])
def test_rounding_agrees_with_torch_on_many_floats(name: str) -> None:
    element = mini(name)
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    values = bits.view(torch.float32)
    values = values[values.abs() <= element.largest]
    assert len(values) > 100_000
    mine = element.write(values, ones(1), element.dtype)
    assert torch.equal(mine.view(torch.uint8), values.to(element.dtype).view(torch.uint8))


def test_e8m0_byte_0_is_a_denormal_and_255_is_nan() -> None:
    """OCP MX v1.0: 2**-127 and NaN; NeMo Automodel reads 0 and infinity."""
    for stored in (ALL_BYTES, ALL_BYTES.view(torch.float8_e8m0fnu)):
        values = scale_values(stored)
        assert values[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
        assert values[255].isnan()


def test_e8m0_scale_is_the_next_power_of_two() -> None:
    for largest in (448.0, 6.0):
        for exponent in range(-100, 100):
            exact = torch.tensor([largest * 2.0**exponent])
            below, above = (torch.nextafter(exact, torch.tensor(end)) for end in (0.0, math.inf))
            found = torch.cat([exact, below, above])
            written = written_powers(found, found / largest, 0, "up")
            assert written.tolist() == [exponent + 127, exponent + 127, exponent + 128]


def test_scale_of_zeros_is_one_and_tiny_scales_stay_normal() -> None:
    ratios = torch.tensor([0.0, 2.0**-149, 1.0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert written_scale(ratios, dtype).float().tolist() == [1.0, torch.finfo(dtype).tiny, 1.0]
    assert written_powers(ratios, ratios, 0, "up").tolist() == [127, 1, 127]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slices", [1, 7])
def test_widening_and_narrowing_keeps_every_bit(dtype: torch.dtype, slices: int) -> None:
    """NaN payloads and signs too, which torch's own casts change, differently in vectors and in tails."""
    every = ALL_HALVES.view(dtype)
    for part in every.chunk(slices):
        wide = exact_cast(part, torch.float32)
        assert torch.equal(as_bits(exact_cast(wide, dtype)), as_bits(part))
        assert torch.equal(wide.isnan(), part.isnan())
    plain = every.float().to(dtype)
    assert not torch.equal(as_bits(plain), as_bits(every)), "torch keeps NaNs by now: exact_cast could go"


def test_narrowed_nan_never_becomes_infinity() -> None:
    nans = torch.tensor([0x7F800001, -0x7FFFFF, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = exact_cast(nans, dtype)
        assert narrow.isnan().all()
        assert narrow.signbit().tolist() == [False, True, False]


def test_casts_round_as_torch_does() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(2)) * 1e-5
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(exact_cast(values, dtype), values.to(dtype))


def test_bit_predicates() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        numbers = torch.tensor([1.0, -math.inf, math.inf, -0.0], dtype=dtype)
        assert not holds_nan(numbers)
        assert holds_nan(torch.cat([numbers, torch.tensor([-math.nan], dtype=dtype)]))
        assert not bits_differ(numbers, numbers.clone())
        assert bits_differ(numbers, torch.tensor([1.0, -math.inf, math.inf, 0.0], dtype=dtype))
    assert holds_nan(torch.tensor([0x7F81], dtype=torch.int16).view(torch.bfloat16))
    assert not holds_nan(torch.empty(0))
