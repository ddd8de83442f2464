"""Laws of the block-scaled codecs: every code under every scale, odd shapes, edits, new scales."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mapdsl.runtime.codecs import tiles
from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.codecs.elements import MiniFloat
from mapdsl.runtime.codecs.formats import as_bits, exact_cast
from mapdsl.runtime.codecs.kept import Kept
from mapdsl.runtime.codecs.scales import scale_values
from mapdsl.runtime.errors import ConversionError

WORKING = [torch.bfloat16, torch.float32, torch.float16]
ELEMENTS = ["f8e4m3", "f8e5m2", "f4e2m1"]
PAYLOAD = {"f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2, "f4e2m1": torch.int8}
SCALE = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f8e8m0": torch.float8_e8m0fnu}
KEY = "layers.0.w1.weight"
BESIDE = "layers.0.w1.scale"


def codec(element: str, block: tuple[int | None, int | None] = (128, 128), **more: Any) -> BlockScaled:
    return BlockScaled("q", element, block, **more)


def assert_same(left: Tensor, right: Tensor) -> None:
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert torch.equal(as_bits(left), as_bits(right))


def assert_round_trip(one: BlockScaled, parts: dict[str, Tensor], dtype: torch.dtype) -> Kept:
    kept = one.keep(KEY, parts, dtype)
    back = one.encode(KEY, one.decode(KEY, parts, dtype), kept)
    assert back.edited == 0
    assert list(back.parts) == list(one.stored(KEY, one.logical_shape(tuple(parts[KEY].shape))))
    for name, part in back.parts.items():
        assert_same(part, parts[name])
    return kept


def scales_of(dtype: str) -> Tensor:
    """Every e8m0 byte; for floats every finite exponent and sign with plain and random mantissas, 0 and denormals."""
    if dtype == "f8e8m0":
        return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e8m0fnu)
    if dtype != "f32":
        every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)[:: 8 if dtype == "bf16" else 16].view(SCALE[dtype])
        return every[every.isfinite()]
    mantissas = torch.randint(0, 1 << 23, (5,), generator=torch.Generator().manual_seed(3)).tolist()
    bits = [(e << 23) + m for e in range(255) for m in (0, 1, 0x400000, 0x7FFFFF, *mantissas)]
    return torch.tensor([b - (1 << 31) * s for b in bits for s in (0, 1)], dtype=torch.int32).view(torch.float32)


def every_byte(element: str, scales: Tensor, rows: int = 1) -> dict[str, Tensor]:
    """All 256 bytes under each scale, `rows` times over: blocks of `rows` x 256 bytes."""
    line = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(PAYLOAD[element])
    return {KEY: line.expand(len(scales) * rows, 256), BESIDE: scales[:, None]}


@pytest.mark.parametrize("dtype", WORKING)
@pytest.mark.parametrize("scale", SCALE)
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("rows", [1, 4], ids=["multiplied", "tabled"])
def test_every_code_under_every_scale_comes_back(element: str, scale: str, dtype: torch.dtype, rows: int) -> None:
    per = 2 if element == "f4e2m1" else 1
    one = codec(element, (rows, 256 * per), scale_dtypes=(scale,))
    parts = every_byte(element, scales_of(scale), rows)
    kept = assert_round_trip(one, parts, dtype)
    assert kept.nbytes <= parts[KEY].numel() + parts[BESIDE].nbytes


@pytest.mark.parametrize("dtype", WORKING)
@pytest.mark.parametrize("scale", SCALE)
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("rows", [1, 4], ids=["multiplied", "tabled"])
def test_values_are_float32_products_rounded_once(element: str, scale: str, dtype: torch.dtype, rows: int) -> None:
    per = 2 if element == "f4e2m1" else 1
    scales = scales_of(scale)
    parts = every_byte(element, scales, rows)
    values = codec(element, (rows, 256 * per), scale_dtypes=(scale,)).decode(KEY, parts, dtype)
    unscaled = codec(element, (None, None)).decode(KEY, {KEY: parts[KEY], BESIDE: torch.ones(1, 1)}, torch.float32)
    expected = (unscaled * scale_values(scales).repeat_interleave(rows)[:, None]).to(dtype)
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values.nan_to_num(), expected.nan_to_num())
    numbers = ~expected.isnan()
    assert torch.equal(values.signbit()[numbers], expected.signbit()[numbers])
    assert torch.equal(values.signbit()[~numbers], unscaled.signbit()[~numbers])


@pytest.mark.parametrize("dtype", WORKING)
@pytest.mark.parametrize("element", ELEMENTS)
def test_the_cheap_check_never_vouches_for_a_code_that_changes(element: str, dtype: torch.dtype) -> None:
    mini = codec(element).element
    assert isinstance(mini, MiniFloat)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(mini.dtype)
    if mini.holds_inf:
        codes = codes[[code for code in range(256) if code & 0x7F not in (0x7D, 0x7E)]]
    vouched = 0
    for factor in torch.cat([scale_values(scales_of("f32")), scale_values(scales_of("f8e8m0"))]):
        if mini.reproduces(codes, factor, dtype):
            vouched += 1
            again = mini.write(mini.read(codes, factor.view(1), dtype), factor, mini.dtype)
            assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8)), float(factor)
    assert vouched > (400 if dtype != torch.float16 else 50)


def test_ordinary_tensors_keep_their_scales_alone() -> None:
    payload = torch.randn(300, 200).to(torch.float8_e4m3fn)
    kept = codec("f8e4m3").keep(KEY, {KEY: payload, BESIDE: torch.full((3, 2), 1e-4)})
    assert kept.codes.numel() == 0
    assert kept.nbytes == 24


def test_nan_payloads_of_e5m2_are_kept_and_little_else() -> None:
    payload = torch.ones(256, 256).to(torch.float8_e5m2)
    payload.view(torch.uint8)[3, 5] = 0xFD
    parts = {KEY: payload, BESIDE: torch.ones(2, 2)}
    kept = assert_round_trip(codec("f8e5m2"), parts, torch.bfloat16)
    assert kept.where is not None
    assert kept.where.tolist() == [3 * 256 + 5]


def random_bytes(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def finite(scales: Tensor) -> Tensor:
    """Random bits without the scales that are refused: all but bare exponents must be finite."""
    if scales.dtype != SCALE["f8e8m0"]:
        scales[~scales.isfinite()] = 1.0
    return scales


sizes = st.sampled_from([1, 2, 3, 5, 7, 11, 13, 17, 31, 37])
block_sizes = st.one_of(st.none(), st.sampled_from([1, 2, 3, 4, 5, 8, 11, 16, 32]))
batches = st.lists(st.sampled_from([1, 2, 3]), max_size=2).map(tuple)


@settings(deadline=None, max_examples=300)
@given(
    element=st.sampled_from(ELEMENTS),
    shape=st.tuples(batches, st.one_of(st.tuples(sizes), st.tuples(sizes, sizes))).map(lambda pair: pair[0] + pair[1]),
    block=st.tuples(block_sizes, block_sizes),
    scale=st.sampled_from(sorted(SCALE)),
    squeeze=st.booleans(),
    strip=st.sampled_from([1, 7, 64, 1 << 18]),
    dtype=st.sampled_from(WORKING),
    seed=st.integers(0, 1 << 30),
)
def test_any_shape_of_any_bits(
    element: str,
    shape: tuple[int, ...],
    block: tuple[int | None, int | None],
    scale: str,
    squeeze: bool,
    strip: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Partial edges, batches, vectors, tall blocks cut into strips: as an element-by-element reading says."""
    per = 2 if element == "f4e2m1" else 1
    block = (block[0], block[1] and block[1] * per)
    one = codec(element, block, scale_dtypes=(scale,), squeeze=squeeze)
    payload = random_bytes(shape, seed).view(PAYLOAD[element])
    logical = one.logical_shape(shape)
    beside = one.stored(KEY, logical)[BESIDE][1]
    width = SCALE[scale].itemsize
    scales = finite(random_bytes((*beside, width), seed + 1).view(SCALE[scale]).view(beside))
    parts = {KEY: payload, BESIDE: scales}
    before, tiles.STRIP_ELEMENTS = tiles.STRIP_ELEMENTS, strip
    try:
        assert_round_trip(one, parts, dtype)
        values = one.decode(KEY, parts, dtype)
    finally:
        tiles.STRIP_ELEMENTS = before
    assert_same(values, by_index(one, payload, scales, dtype))


def by_index(one: BlockScaled, payload: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The slow reading: the block of each element by integer division."""
    unscaled = BlockScaled("u", one.element.name, (None, None), squeeze=True).decode
    shape = one.logical_shape(tuple(payload.shape))
    flat = unscaled("w", {"w": payload.flatten(), "scale": torch.ones(())}, torch.float32).view(shape)
    batch, last = shape[:-2], shape[-2:]
    blocks = [block or size for size, block in zip(last, one.storage.block[2 - len(last) :], strict=True)]
    grid = scales.view(*batch, *(-(-size // block) for size, block in zip(last, blocks, strict=True)))
    factors = scale_values(grid)
    for axis, (size, block) in enumerate(zip(last, blocks, strict=True), start=len(batch)):
        factors = factors.index_select(axis, torch.arange(size) // block)
    product = flat * factors
    values = product.to(dtype)
    quiet = torch.copysign(torch.full_like(values, math.nan), exact_cast(flat, dtype))
    return torch.where(product.isnan(), quiet, values)


@settings(deadline=None, max_examples=60)
@given(
    rows=sizes, columns=sizes, height=block_sizes, width=block_sizes, element=st.sampled_from(ELEMENTS),
    strip=st.sampled_from([1, 64, 1 << 18]), data=st.data(),
)  # fmt: skip
def test_edited_blocks_are_counted_and_the_others_untouched(
    rows: int, columns: int, height: int | None, width: int | None, element: str, strip: int, data: st.DataObject
) -> None:
    per = 2 if element == "f4e2m1" else 1
    one = codec(element, (height, width and width * per), squeeze=False)
    payload = random_bytes((rows, columns), rows * columns)
    payload = torch.where(payload & 0x7C == 0x7C, 3, payload).view(PAYLOAD[element])
    logical = one.logical_shape((rows, columns))
    scales = torch.full(one.stored(KEY, logical)[BESIDE][1], 0.37)
    parts = {KEY: payload, BESIDE: scales}
    values, kept = one.decode(KEY, parts), one.keep(KEY, parts)
    picks = data.draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, columns * per - 1)), max_size=3))
    blocks = set()
    for row, column in picks:
        values[row, column] = 1234.5  # no code times 0.37 is that
        blocks.add((row // (height or rows), column // (width * per if width else columns * per)))
    before, tiles.STRIP_ELEMENTS = tiles.STRIP_ELEMENTS, strip
    try:
        back = one.encode(KEY, values, kept)
    finally:
        tiles.STRIP_ELEMENTS = before
    assert back.edited == len(blocks)
    assert {tuple(place) for place in (back.parts[BESIDE] != scales).nonzero().tolist()} == blocks
    again = one.decode(KEY, back.parts)
    for row in range(rows):
        for column in range(columns):
            if (row // (height or rows), column // (width or columns)) not in blocks:
                assert as_bits(back.parts[KEY])[row, column] == as_bits(payload)[row, column]
    for row, column in picks:
        assert again[row, column].item() == pytest.approx(1234.5, rel=0.13)


def test_an_edit_that_the_kept_scale_can_express_keeps_the_scale() -> None:
    parts = {KEY: torch.ones(4, 4).to(torch.float8_e4m3fn), BESIDE: torch.full((1, 1), 0.5)}
    values, kept = codec("f8e4m3").decode(KEY, parts), codec("f8e4m3").keep(KEY, parts)
    values[1, 2] = 3.0
    back = codec("f8e4m3").encode(KEY, values, kept)
    assert back.edited == 0
    assert back.parts[BESIDE].tolist() == [[0.5]]
    assert torch.equal(codec("f8e4m3").decode(KEY, back.parts), values)


def test_an_edit_that_the_kept_scale_can_express_keeps_it_beside_kept_codes() -> None:
    """Also where codes are kept, a few or all of them, and one of these is what was edited."""
    one = codec("f8e5m2", (None, None))
    for kept_codes in (1, 64):
        payload = torch.ones(8, 8).to(torch.float8_e5m2)
        payload.view(torch.uint8).view(-1)[:kept_codes] = 0x7D
        parts = {KEY: payload, BESIDE: torch.full((1, 1), 0.5)}
        values, kept = one.decode(KEY, parts), one.keep(KEY, parts)
        assert (kept.where is None) == (kept_codes == 64)
        values[0, 0] = 3.0
        back = one.encode(KEY, values, kept)
        assert back.edited == 0
        assert torch.equal(as_bits(back.parts[KEY]).view(-1)[1:], as_bits(payload).view(-1)[1:])
        assert one.decode(KEY, back.parts)[0, 0] == 3.0


@pytest.mark.parametrize("returned", WORKING)
@pytest.mark.parametrize("dtype", WORKING)
@pytest.mark.parametrize("bytes_", [range(256), [0xFF], [0x7F]], ids=["all", "-nan", "nan"])
def test_values_cast_after_decoding_still_get_their_bytes(
    bytes_: list[int], dtype: torch.dtype, returned: torch.dtype
) -> None:
    """One NaN alone, too: torch casts it otherwise than among many."""
    one = codec("f8e4m3", (1, None))
    parts = {
        KEY: torch.tensor([list(bytes_)], dtype=torch.uint8).view(torch.float8_e4m3fn),
        BESIDE: torch.full((1, 1), 0.1),
    }
    kept = one.keep(KEY, parts, dtype)
    back = one.encode(KEY, exact_cast(one.decode(KEY, parts, dtype), returned), kept)
    assert back.edited == 0
    assert_same(back.parts[KEY], parts[KEY])


def test_a_zero_scale_gives_zeros_and_its_bytes_back() -> None:
    parts = {KEY: random_bytes((4, 16), 5).view(torch.int8), BESIDE: torch.zeros(4, 1)}
    one = codec("f4e2m1", (1, 32))
    assert (one.decode(KEY, parts) == 0).all()
    assert_round_trip(one, parts, torch.bfloat16)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("scale", SCALE)
def test_new_scales_use_the_whole_range(element: str, scale: str) -> None:
    block = (1, 32) if element == "f4e2m1" else (16, 16)
    one = codec(element, block, scale_dtypes=(scale,))
    mini = one.element
    assert isinstance(mini, MiniFloat)
    values = torch.randn(48, 64, generator=torch.Generator().manual_seed(7)) * (10 if scale == "f16" else 0.02)
    back = one.encode(KEY, values)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in back.parts.items()} == one.stored(KEY, (48, 64))
    again = one.decode(KEY, back.parts, torch.float32)
    step = 2.0 ** {"f8e4m3": -4, "f8e5m2": -3, "f4e2m1": -2}[element]
    ratio = largest_by_block(values, block) / mini.largest
    written = scale_values(back.parts[BESIDE])
    if scale == "f32":
        assert torch.equal(written, ratio)
    elif scale == "f8e8m0":
        assert torch.equal(written, torch.exp2(torch.ceil(torch.log2(ratio))))
    slack = written.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1) * mini.smallest
    assert ((again - values).abs() <= values.abs() * (step + 2**-7) + slack).all()


def largest_by_block(values: Tensor, block: tuple[int, int]) -> Tensor:
    rows, columns = values.shape
    return values.view(rows // block[0], block[0], columns // block[1], block[1]).abs().amax((1, 3))


def test_fp8_encoding_divides_by_the_scale() -> None:
    """Multiplying by the reciprocal gives other codes."""
    values = torch.randn(256, 256, generator=torch.Generator().manual_seed(11))
    back = codec("f8e4m3", (None, None), squeeze=True).encode(KEY, values)
    scale = back.parts[BESIDE]
    assert_same(back.parts[KEY], (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn))
    assert not torch.equal(as_bits(back.parts[KEY]), as_bits((values * (1 / scale)).to(torch.float8_e4m3fn)))


def test_zeros_encode_with_scale_one_and_keep_their_signs() -> None:
    values = torch.tensor([[0.0, -0.0] * 16])
    for element in ELEMENTS:
        one = codec(element, (1, 32))
        back = one.encode(KEY, values)
        assert back.parts[BESIDE].tolist() == [[1.0]]
        assert_same(one.decode(KEY, back.parts, torch.float32), values)


@pytest.mark.parametrize("element", ["f8e4m3", "f8e5m2"])
def test_a_nan_stays_one_and_leaves_its_block_alone(element: str) -> None:
    values = torch.tensor([[math.nan, 1.0, -2.0, -math.nan]])
    one = codec(element, (1, 4))
    again = one.decode(KEY, one.encode(KEY, values).parts, torch.float32)
    assert again.isnan().tolist() == [[True, False, False, True]]
    assert torch.equal(again.signbit(), values.signbit())
    assert again[0, 1:3].tolist() == pytest.approx([1.0, -2.0], rel=1e-6)


def test_infinities_where_the_format_has_them() -> None:
    values = torch.tensor([[math.inf, 1.0, -math.inf, 2.0]])
    one = codec("f8e5m2", (1, 4))
    again = one.decode(KEY, one.encode(KEY, values).parts, torch.float32)
    assert again[0, [0, 2]].tolist() == [math.inf, -math.inf]
    assert again[0, [1, 3]].tolist() == pytest.approx([1.0, 2.0], rel=1e-6)


@pytest.mark.parametrize(
    ("element", "bad", "text"),
    [("f8e4m3", math.inf, "inf"), ("f4e2m1", math.nan, "nan"), ("f4e2m1", -math.inf, "-inf")],
)
def test_what_a_format_cannot_hold_is_an_error_that_names_the_first(element: str, bad: float, text: str) -> None:
    values = torch.ones(2, 5, 64)
    values[1, 3, 41] = values[1, 4, 0] = bad
    with pytest.raises(ConversionError, match=rf"{KEY}: element \[1, 3, 41\] is {text}, which {element}") as caught:
        codec(element, (1, 32)).encode(KEY, values)
    assert caught.value.code == "D403"


def test_a_nan_in_an_unedited_block_of_fp4_is_no_error() -> None:
    scales = torch.tensor([[255, 127]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    parts = {KEY: random_bytes((1, 32), 3).view(torch.int8), BESIDE: scales}
    one = codec("f4e2m1", (1, 32), scale_dtypes=("f8e8m0",))
    values, kept = one.decode(KEY, parts), one.keep(KEY, parts)
    values[0, 40] = 5.5
    back = one.encode(KEY, values, kept)
    assert back.edited == 1
    assert back.parts[KEY][0, :16].tolist() == parts[KEY][0, :16].tolist()
    values[0, 3] = 1.0
    with pytest.raises(ConversionError, match=r"element \[0, 0\] is nan"):
        one.encode(KEY, values, kept)
