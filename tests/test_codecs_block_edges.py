"""Block-scaled codecs at their edges: shapes of scales, `meta`, complements in files, the element `same`, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from test_codecs_block_scaled import (
    BESIDE,
    ELEMENTS,
    KEY,
    PAYLOAD,
    SCALE,
    WORKING,
    assert_round_trip,
    assert_same,
    codec,
    random_bytes,
)
from torch import Tensor

from mapdsl.runtime.codecs.base import Encoded
from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.codecs.formats import integer_dtype, quiet_nan_bits
from mapdsl.runtime.codecs.kept import Kept
from mapdsl.runtime.errors import ConversionError


@pytest.mark.parametrize(
    ("block", "squeeze", "shape", "expected"),
    [
        ((128, 128), False, (576, 7168), (5, 56)),
        ((1, 32), False, (3, 64), (3, 2)),
        ((None, None), True, (3, 64), ()),
        ((None, None), False, (4, 3, 64), (4, 1, 1)),
        ((None, None), True, (4, 3, 64), (4,)),
        ((1, None), True, (3, 64), (3,)),
        ((1, None), False, (3, 64), (3, 1)),
        ((1, None), True, (1, 64), (1,)),
        ((128, 128), False, (200,), (2,)),
        ((128, 128), False, (), ()),
        ((128, 128), False, (0, 7), (0, 1)),
    ],
)
def test_shapes_of_scales(
    block: tuple[int | None, int | None], squeeze: bool, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    one = codec("f8e4m3", block, squeeze=squeeze)
    assert one.stored(KEY, shape)[BESIDE] == (torch.float32, expected)
    back = one.encode(KEY, torch.ones(shape))
    assert back.parts[BESIDE].shape == expected
    assert torch.equal(one.decode(KEY, back.parts, torch.float32), torch.ones(shape))


@pytest.mark.parametrize("element", [*ELEMENTS, "same"])
def test_meta_tensors_give_shapes_and_dtypes(element: str) -> None:
    one = codec(element, (1, 32), scale_dtypes=("f8e8m0",))
    real = one.encode(KEY, torch.ones(3, 64, dtype=torch.bfloat16)).parts
    assert {name: (part.dtype, tuple(part.shape)) for name, part in real.items()} == one.stored(KEY, (3, 64))
    meta = {name: part.to("meta") for name, part in real.items()}
    values, kept = one.decode(KEY, meta), one.keep(KEY, meta)
    assert values.is_meta
    assert (values.dtype, values.shape) == (torch.bfloat16, (3, 64))
    for back in (one.encode(KEY, values), one.encode(KEY, values, kept)):
        assert all(part.is_meta for part in back.parts.values())
        assert {name: (part.dtype, tuple(part.shape)) for name, part in back.parts.items()} == one.stored(KEY, (3, 64))


def test_tables_first_made_under_a_meta_device_are_real() -> None:
    from mapdsl.runtime.codecs import elements

    elements.element_named.cache_clear()
    elements.power_table.cache_clear()
    with torch.device("meta"):
        one = codec("f4e2m1", (1, 32), scale_dtypes=("f8e8m0",))
        parts = {
            KEY: torch.full((2, 16), 0x22, dtype=torch.int8, device="cpu"),
            BESIDE: torch.full((2, 1), 127, dtype=torch.uint8, device="cpu").view(torch.float8_e8m0fnu),
        }
        assert one.decode(KEY, parts).tolist() == [[1.0] * 32] * 2
        assert_round_trip(one, parts, torch.bfloat16)


def test_kept_survives_a_safetensors_file() -> None:
    for element, dtype in (("f8e5m2", torch.bfloat16), ("f4e2m1", torch.float16), ("same", torch.bfloat16)):
        one = codec(element, (1, 32), scale_dtypes=("f8e8m0",))
        payload = random_bytes((64, 64), 9)
        parts = {
            KEY: payload.view(torch.float16 if element == "same" else PAYLOAD[element]),
            BESIDE: random_bytes((64, 4 if element == "f4e2m1" else 1 if element == "same" else 2), 10).view(
                SCALE["f8e8m0"]
            ),
        }
        kept = one.keep(KEY, parts, dtype)
        assert len(kept.codes)
        read = Kept.from_tensors(load(save(kept.to_tensors())), kept.to_meta())
        back = one.encode(KEY, one.decode(KEY, parts, dtype), read)
        assert back.edited == 0
        for name, part in back.parts.items():
            assert_same(part, parts[name])


def test_same_is_a_tensor_with_a_scale_beside_it() -> None:
    """Gemma's `per_expert_scale`: folded in when read, and not lost when written."""
    one = BlockScaled("g", "same", (None, None), "{stem}.per_expert_scale", squeeze=True)
    payload = torch.randn(3, 5, 7).bfloat16()
    parts = {"e.down": payload, "e.per_expert_scale": torch.tensor([0.3, 1.0, -2.7]).bfloat16()}
    values, kept = one.decode("e.down", parts), one.keep("e.down", parts)
    assert torch.equal(values, (payload.float() * parts["e.per_expert_scale"].float()[:, None, None]).bfloat16())
    for name, part in one.encode("e.down", values, kept).parts.items():
        assert_same(part, parts[name])
    values[2, 0, 0] = 99.0
    values[2, 1, 1] = 1.01
    back = one.encode("e.down", values, kept)
    assert back.parts["e.per_expert_scale"][:2].tolist() == parts["e.per_expert_scale"][:2].tolist()
    assert one.decode("e.down", back.parts)[2].tolist() == values[2].tolist()
    plain = one.encode("e.down", values).parts
    assert plain["e.per_expert_scale"].tolist() == [1.0, 1.0, 1.0]
    assert_same(plain["e.down"], values)


@pytest.mark.parametrize("stored", WORKING)
@pytest.mark.parametrize("dtype", WORKING)
def test_same_brings_every_bit_pattern_back(stored: torch.dtype, dtype: torch.dtype) -> None:
    one = codec("same", (None, None), squeeze=True)
    payload = random_bytes((257, 64), 13).view(stored)
    for scale in (1.0, 0.37, 0.0, 2.0**-130):
        assert_round_trip(one, {KEY: payload, BESIDE: torch.tensor(scale)}, dtype)


def test_same_passes_nans_on_however_few() -> None:
    one = codec("same", (None, None), squeeze=True)
    for dtype in WORKING:
        nan = torch.tensor([quiet_nan_bits(dtype)[1]], dtype=integer_dtype(dtype.itemsize)).view(dtype)
        written = one.element.write(nan, torch.tensor([0.37]), dtype)
        assert written.isnan().all()
        assert written.signbit().all()


def refuse(code: str, text: str, parts: dict[str, Tensor], one: BlockScaled | None = None, **more: Any) -> None:
    one = one or codec("f8e4m3")
    for method in (one.decode, one.keep):
        with pytest.raises(ConversionError, match=text) as caught:
            method(KEY, parts, **more)
        assert caught.value.code == code


def test_errors_of_reading_name_the_stored_tensor() -> None:
    payload, scale = torch.ones(130, 7).to(torch.float8_e4m3fn), torch.ones(2, 1)
    refuse("R605", f"{BESIDE} is missing: {KEY} is stored as q", {KEY: payload})
    refuse("R605", f"{KEY} is missing", {BESIDE: scale})
    refuse("R606", rf"{BESIDE} has shape \[1, 1\], .*\[130, 7\], stored as q, needs \[2, 1\]",
           {KEY: payload, BESIDE: torch.ones(1, 1)})  # fmt: skip
    refuse("R606", rf"{BESIDE} has shape \[2, 2\]", {KEY: payload, BESIDE: torch.ones(2, 2)})
    refuse("C504", f"{KEY} is f8e5m2", {KEY: payload.view(torch.float8_e5m2), BESIDE: scale})
    refuse("C504", f"{BESIDE} is u8", {KEY: payload, BESIDE: scale.to(torch.uint8)})
    refuse("C504", "not i32", {KEY: payload, BESIDE: scale}, dtype=torch.int32)
    power = codec("f8e4m3", scale_dtypes=("f8e8m0",))
    refuse("C504", f"{BESIDE} is f32, the map says f8e8m0", {KEY: payload, BESIDE: scale}, power)
    refuse(
        "R606",
        rf"{KEY} has shape \[\]",
        {KEY: torch.tensor(1, dtype=torch.int8), BESIDE: scale},
        codec("f4e2m1", (1, 32)),
    )


def test_an_odd_row_cannot_be_packed() -> None:
    for call in (lambda: codec("f4e2m1", (1, 32)).encode(KEY, torch.ones(3, 5)),
                 lambda: codec("f4e2m1", (1, 32)).stored(KEY, (3, 5))):  # fmt: skip
        with pytest.raises(
            ConversionError, match=rf"{KEY}: the last dimension of \[3, 5\] is not a multiple of 2"
        ) as caught:
            call()
        assert caught.value.code == "D401"


def test_a_foreign_complement_is_an_error() -> None:
    one = codec("f8e4m3")
    parts = {KEY: torch.ones(130, 7).to(torch.float8_e4m3fn), BESIDE: torch.zeros(2, 1)}
    values, kept = one.decode(KEY, parts), one.keep(KEY, parts)
    assert kept.where is None
    small = {KEY: parts[KEY][:10], BESIDE: torch.ones(1, 1)}
    others = [
        (one.keep(KEY, small), r"of shape \[10, 7\], the tensor of \[130, 7\]"),
        (BlockScaled("other", "f8e4m3", (128, 128)).keep(KEY, parts), "of codec other, not q"),
        (Kept("q", kept.dtype, kept.shape, kept.codes, None, {}), f"{BESIDE}: the complement holds no scale of"),
        (Kept("q", kept.dtype, kept.shape, kept.codes, None, {"scale": torch.ones(1, 2)}), "holds no scale of"),
        (Kept("q", kept.dtype, kept.shape, kept.codes[:3], None, kept.parts), "damaged"),
        (Kept("q", kept.dtype, kept.shape, kept.codes[0], torch.arange(7) + 904, kept.parts), "damaged"),
        (Kept("q", kept.dtype, kept.shape, kept.codes[0], torch.arange(6), kept.parts), "damaged"),
        (Kept("q", kept.dtype, kept.shape, kept.codes.view(torch.int8), None, kept.parts), "of i8 elements"),
    ]
    for foreign, text in others:
        with pytest.raises(ConversionError, match=text) as caught:
            one.encode(KEY, values, foreign)
        assert caught.value.code == "R607"


def test_a_complement_of_other_values_is_all_edits() -> None:
    one = codec("f8e4m3", (2, 2))
    first = {KEY: random_bytes((6, 6), 1).clamp(max=0x7E).view(torch.float8_e4m3fn), BESIDE: torch.full((3, 3), 0.1)}
    other = torch.randn(6, 6).bfloat16()
    back = one.encode(KEY, other, one.keep(KEY, first))
    assert back.edited == 9
    assert_same(back.parts[KEY], one.encode(KEY, other).parts[KEY])


@pytest.mark.parametrize("bad", [{"element": "f3"}, {"block": (0, 32)}, {"block": (1, 31)}, {"scale_dtypes": ("i8",)}])
def test_declarations_without_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"codec q|no block-scaled"):
        BlockScaled(**{"name": "q", "element": "f4e2m1", "block": (1, 32), **bad})


def test_names_and_recognition() -> None:
    one = BlockScaled("q", "f8e4m3", (128, 128), scale="{key}_scale_inv")
    assert one.companions(KEY) == {"scale": f"{KEY}_scale_inv"}
    assert one.recognises(KEY, torch.float8_e4m3fn, {f"{KEY}_scale_inv"}.__contains__)
    assert not one.recognises(KEY, torch.float8_e4m3fn, set().__contains__)
    assert one.claims(KEY, torch.float8_e4m3fn)
    assert not one.recognises(KEY, torch.bfloat16, {f"{KEY}_scale_inv"}.__contains__)
    assert codec("f8e4m3").companions("weight") == {"scale": "scale"}
    packed = BlockScaled("q", "f4e2m1", (1, 32), packed="u8", payload="{stem}.blocks")
    assert packed.names("a.w") == ["a.blocks", "a.scale"]
    assert packed.claims("a.w", torch.uint8)
    assert not packed.claims("a.w", torch.int8)
    encoded = packed.encode("a.w", torch.ones(2, 32))
    assert isinstance(encoded, Encoded)
    assert list(encoded.parts) == ["a.blocks", "a.scale"]


def test_views_and_parameters_are_read_as_they_are() -> None:
    one = codec("f4e2m1", (1, 32))
    bytes_ = random_bytes((33, 17), 21)[1:, 1:].view(torch.int8)
    parts = {KEY: bytes_, BESIDE: torch.rand(33, 1)[1:]}
    assert_round_trip(one, parts, torch.bfloat16)
    values = torch.nn.Parameter(torch.randn(64, 7).t()[:, 32:].contiguous().t())
    straight = one.encode(KEY, values.detach().t().contiguous())
    assert_same(one.encode(KEY, values.t()).parts[KEY], straight.parts[KEY])
    same = codec("same", (None, None))
    parameter = {KEY: torch.nn.Parameter(torch.ones(2, 2)), BESIDE: torch.nn.Parameter(torch.ones(1, 1))}
    results = [*same.encode(KEY, parameter[KEY]).parts.values(), same.decode(KEY, parameter)]
    assert not any(tensor.requires_grad for tensor in results)


def test_results_own_their_memory() -> None:
    one = codec("f8e4m3")
    parts = {KEY: torch.ones(4, 4).to(torch.float8_e4m3fn), BESIDE: torch.ones(1, 1)}
    kept = one.keep(KEY, parts)
    back = one.encode(KEY, one.decode(KEY, parts), kept)
    parts[BESIDE].zero_()
    assert kept.parts["scale"].item() == 1
    back.parts[BESIDE].zero_()
    assert kept.parts["scale"].item() == 1
