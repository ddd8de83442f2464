"""Casts and value changes: every 16-bit pattern, NaN payloads, overflow, edits, errors, `meta`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.formats import as_bits
from mapdsl.runtime.codecs.kept import Kept
from mapdsl.runtime.codecs.values import Add, Cast, NarrowCast, NegExp, Reversible
from mapdsl.runtime.errors import ConversionError

WORKING = [torch.bfloat16, torch.float32, torch.float16]
KEY = "layers.0.norm.weight"
CHANGES: list[Codec] = [Add("add", 1.0), Add("less", -0.1), NegExp("neg_exp")]


def every_pattern(dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32:
        bits = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=torch.Generator().manual_seed(4))
        return torch.cat([bits.to(torch.int32).view(dtype), every_pattern(torch.bfloat16).view(torch.bfloat16).float()])
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)


def assert_comes_back(one: Codec, stored: Tensor, dtype: torch.dtype) -> Kept:
    kept = one.keep(KEY, {KEY: stored}, dtype)
    back = one.encode(KEY, one.decode(KEY, {KEY: stored}, dtype), kept)
    assert back.edited == 0
    assert list(back.parts) == [KEY]
    assert back.parts[KEY].dtype == stored.dtype
    assert torch.equal(as_bits(back.parts[KEY]), as_bits(stored))
    return kept


@pytest.mark.parametrize("dtype", WORKING)
@pytest.mark.parametrize("stored", WORKING)
@pytest.mark.parametrize("one", CHANGES, ids=lambda one: one.name)
def test_changes_give_every_pattern_back(one: Codec, stored: torch.dtype, dtype: torch.dtype) -> None:
    kept = assert_comes_back(one, every_pattern(stored), dtype)
    assert kept.nbytes <= every_pattern(stored).nbytes
    assert_comes_back(one, every_pattern(stored)[: 64 * 9].view(64, 9).t(), dtype)


def test_add_is_a_float32_sum() -> None:
    stored = torch.randn(1000).bfloat16()
    assert torch.equal(Add("add", 1.0).decode(KEY, {KEY: stored}, torch.bfloat16), (stored.float() + 1).bfloat16())
    assert torch.equal(Add("add", 1.0).decode(KEY, {KEY: stored}, torch.float32), stored.float() + 1)


def test_neg_exp_is_the_models_formula() -> None:
    stored = torch.log(torch.arange(1, 65).float())
    decay = NegExp("neg_exp").decode(KEY, {KEY: stored}, torch.float32)
    torch.testing.assert_close(decay, -torch.exp(stored), rtol=2e-7, atol=0)
    back = NegExp("neg_exp").encode(KEY, decay).parts[KEY]
    torch.testing.assert_close(back, stored, rtol=2e-7, atol=1e-7)


def test_nans_pass_through_changes_bit_by_bit() -> None:
    nans = torch.tensor([0x7F81, -0x7F, 0x7FC0], dtype=torch.int16).view(torch.bfloat16)
    for one in CHANGES:
        values = one.decode(KEY, {KEY: nans}, torch.bfloat16)
        assert torch.equal(as_bits(values), as_bits(nans))
        assert torch.equal(as_bits(one.encode(KEY, values).parts[KEY]), as_bits(nans))


def test_few_elements_are_kept_of_norms_around_zero() -> None:
    stored = torch.zeros(4096)
    stored[7] = 1e-12
    kept = Add("add", 1.0).keep(KEY, {KEY: stored}, torch.float32)
    assert kept.where is not None
    assert kept.where.tolist() == [7]
    assert_comes_back(Add("add", 1.0), stored, torch.float32)


def test_edited_elements_are_written_anew_and_counted_where_they_are_rounded() -> None:
    stored = torch.full((8,), 2.0**-12).bfloat16()
    one = Add("add", 1.0)
    values, kept = one.decode(KEY, {KEY: stored}, torch.float32), one.keep(KEY, {KEY: stored}, torch.float32)
    values[2] = 1.5
    values[3] = 1.0 + 2.0**-1 + 2.0**-20
    back = one.encode(KEY, values, kept)
    assert back.edited == 1
    assert back.parts[KEY].tolist() == [2.0**-12, 2.0**-12, 0.5, 0.5, *[2.0**-12] * 4]
    assert back.parts[KEY].dtype == torch.bfloat16


def test_a_kept_element_is_not_put_back_under_an_edit() -> None:
    stored = torch.full((64,), 0.5)
    stored[0] = 1e-12
    one = Add("add", 1.0)
    kept = one.keep(KEY, {KEY: stored}, torch.float32)
    values = one.decode(KEY, {KEY: stored}, torch.float32)
    values[0] = 3.0
    assert one.encode(KEY, values, kept).parts[KEY][0] == 2.0


def test_without_a_complement_the_tensors_dtype_is_stored() -> None:
    for dtype in WORKING:
        back = Add("add", 1.0).encode(KEY, torch.ones(3, dtype=dtype))
        assert {KEY: (back.parts[KEY].dtype, (3,))} == Add("add", 1.0).stored(KEY, (3,), dtype)
        assert back.parts[KEY].tolist() == [0.0] * 3


@pytest.mark.parametrize(("narrow", "wide"), [("bf16", torch.float32), ("f16", torch.float32)])
def test_widened_and_narrowed_is_bit(narrow: str, wide: torch.dtype) -> None:
    one = Cast("narrow", narrow)
    stored = every_pattern(one.dtype)
    values = one.decode(KEY, {KEY: stored}, wide)
    assert values.dtype == wide
    assert torch.equal(as_bits(one.encode(KEY, values).parts[KEY]), as_bits(stored))
    assert_comes_back(one, stored, one.dtype)


def test_a_lossy_cast_keeps_nothing() -> None:
    one = Cast("f32", "f32")
    kept = one.keep(KEY, {KEY: torch.randn(100)}, torch.bfloat16)
    assert kept.nbytes == 0
    back = one.encode(KEY, torch.full((100,), 0.3).bfloat16(), kept).parts[KEY]
    assert back.dtype == torch.float32
    assert torch.equal(back, torch.full((100,), 0.3).bfloat16().float())


def code_of(call: Callable[[], object], text: str) -> str:
    with pytest.raises(ConversionError, match=text) as caught:
        call()
    return caught.value.code


def test_a_cast_that_overflows_names_the_element() -> None:
    values = torch.tensor([[1.0, math.inf], [math.nan, 7e4]])
    assert (
        code_of(lambda: Cast("h", "f16").encode(KEY, values), rf"{KEY}: element \[1, 1\] is 70000.0, .*f16") == "D403"
    )
    values[1, 1] = -3.4e38
    assert code_of(lambda: Cast("b", "bf16").encode(KEY, values), r"element \[1, 1\]") == "D403"
    assert Cast("b", "bf16").encode(KEY, values[:1]).parts[KEY].tolist() == [[1.0, math.inf]]


def test_a_positive_decay_is_refused() -> None:
    values = torch.tensor([-1.0, -0.0, math.nan, 0.5])
    assert (
        code_of(lambda: NegExp("neg_exp").encode(KEY, values), rf"{KEY}: element \[3\] is 0.5, which .*neg_exp")
        == "D403"
    )


def test_errors_of_reading() -> None:
    cast = Cast("f32", "f32")
    integers = torch.ones(3, dtype=torch.int32)
    assert code_of(lambda: cast.decode(KEY, {}), f"{KEY} is missing") == "R605"
    assert code_of(lambda: cast.decode(KEY, {KEY: torch.ones(3).half()}), f"{KEY} is f16, the map says f32") == "C504"
    assert code_of(lambda: CHANGES[0].decode(KEY, {KEY: integers}), f"{KEY} is i32") == "C504"
    assert code_of(lambda: CHANGES[0].encode(KEY, integers), "not i32") == "C504"
    with pytest.raises(ValueError, match="codec e: a cast is to"):
        Cast("e", "f8e4m3")
    with pytest.raises(ValueError, match="codec e: a narrow cast is to"):
        NarrowCast("e", "f32")


@pytest.mark.parametrize("one", [*CHANGES, Cast("f32", "f32")], ids=lambda one: one.name)
def test_foreign_complements(one: Codec) -> None:
    kept = one.keep(KEY, {KEY: torch.ones(3)}, torch.float32)
    foreign = replace(kept, codec="x")
    damaged = replace(kept, codes=torch.ones(2), where=torch.tensor([5, 6]))
    values = -torch.ones(4)
    assert code_of(lambda: one.encode(KEY, values, kept), rf"{KEY}: .* of shape \[3\]") == "R607"
    assert code_of(lambda: one.encode(KEY, values[:3], foreign), "of codec x") == "R607"
    assert code_of(lambda: one.encode(KEY, values[:3], damaged), "damaged") == "R607"


def test_meta() -> None:
    for one in (*CHANGES, Cast("f32", "f32")):
        stored = torch.ones(3, 4, device="meta")
        values, kept = one.decode(KEY, {KEY: stored}), one.keep(KEY, {KEY: stored})
        assert (values.is_meta, values.dtype, values.shape) == (True, torch.bfloat16, (3, 4))
        for back in (one.encode(KEY, values), one.encode(KEY, values, kept)):
            assert back.parts[KEY].is_meta
        assert one.encode(KEY, values, kept).parts[KEY].dtype == torch.float32
        assert one.logical_shape((3, 4)) == (3, 4)


def test_complements_survive_a_file() -> None:
    stored = every_pattern(torch.bfloat16)
    for one in CHANGES:
        kept = one.keep(KEY, {KEY: stored}, torch.float16)
        read = Kept.from_tensors(load(save(kept.to_tensors())), kept.to_meta())
        back = one.encode(KEY, one.decode(KEY, {KEY: stored}, torch.float16), read)
        assert torch.equal(as_bits(back.parts[KEY]), as_bits(stored))


def test_decoded_memory_is_its_own() -> None:
    for one in (*CHANGES, Cast("f32", "f32")):
        stored = torch.full((3,), -1.0)
        one.decode(KEY, {KEY: stored}, torch.float32).zero_()
        assert stored.tolist() == [-1.0] * 3
        values = torch.full((3,), -1.0)
        one.encode(KEY, values).parts[KEY].zero_()
        assert values.tolist() == [-1.0] * 3


@pytest.mark.parametrize("codec", [Add("a", 1.0), NarrowCast("n", "f8e5m2")], ids=["add", "e5m2"])
def test_strips_are_put_together(codec: Reversible, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept in a strip, in any order of positions, comes back in it; edits are counted in all of them."""
    monkeypatch.setattr("mapdsl.runtime.codecs.values.STRIP_ELEMENTS", 64)
    values = (torch.arange(1000) % 64 / 64).to(torch.bfloat16 if isinstance(codec, Add) else torch.float8_e5m2)
    if isinstance(codec, Add):
        values[::97] = 1e-3  # lost beside 1
    else:
        values.view(torch.uint8)[::97] = 0x7D  # a NaN that is not written
    stored = values.view(10, 100)
    kept = codec.keep("x", {"x": stored})
    assert kept.where is not None and len(kept.where) > 3
    order = torch.randperm(len(kept.where))
    shuffled = replace(kept, where=kept.where[order], codes=kept.codes.view(-1)[order])
    logical = codec.decode("x", {"x": stored})
    for one in (kept, shuffled):
        back = codec.encode("x", logical, one)
        assert back.edited == 0 and torch.equal(as_bits(back.parts["x"]), as_bits(stored))
    out = torch.empty_like(stored)
    assert codec.encode("x", logical, kept, out=out).parts["x"] is out and torch.equal(as_bits(out), as_bits(stored))


@pytest.mark.parametrize("codec", [Cast("c", "f16"), NarrowCast("n", "f8e4m3")], ids=["f16", "e4m3"])
def test_what_overflows_in_a_later_strip_is_named(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mapdsl.runtime.codecs.values.STRIP_ELEMENTS", 64)
    values = torch.ones(10, 100)
    values[7, 31] = 1e9
    with pytest.raises(ConversionError, match=r"element \[7, 31\] is 1000000000.0, which overflows"):
        codec.encode("x", values)
