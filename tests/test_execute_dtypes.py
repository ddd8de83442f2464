"""Dtypes through a round trip: those that the map states, those that reading found, and groups in mixed formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mapdsl.compiler.laws import rule_law
from mapdsl.runtime.errors import ConversionError
from tests.helpers.execution import assert_same, map_of, on_meta
from tests.test_execute_codecs import FP4, FP8, bf16, fp8

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def values(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """Values that need all bits of their dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def trip(text: str, state: dict[str, Tensor], start: str = "left", **options: Any) -> dict[str, Tensor]:
    """The state of the other side, once coming back from it has given every byte again."""
    a = map_of(text).adapter({})
    if start == "left":
        made = a.read(state, **options)
        assert_same(a.write(made, quantization=True), state, "left, right, left")
        assert_same(map_of(text).adapter({}).read(on_meta(state), **options), on_meta(made), "on meta")
    else:
        made = a.write(state, **options)
        assert_same(a.read(made), state, "right, left, right")
    return made


# --- dtypes that the map states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("text", ["x [a b] <-> y [a b] as f32\n", "x [a b] <-> y [b a] as f32\n"])
def test_a_tensor_with_a_dtype_on_the_right_comes_back_in_its_own(text: str, dtype: torch.dtype) -> None:
    assert trip(text, {"x": values(4, 3, dtype=dtype)})["y"].dtype == F32


@pytest.mark.parametrize(
    "text",
    [
        "x as f32 <-> y as f32\n",
        "x [a b] as f32 <-> y [b a] as f32\n",
        "x [a b] as f32|bf16 <-> y [b a] as bf16|f32\n",
        "{j:x|z} [b] as f32 <-> y [j b] as f32\n",
    ],
)
def test_a_dtype_that_both_sides_state_is_not_rounded_between(text: str) -> None:
    checked = map_of(text).checked
    law = rule_law(checked.map.rules[0], checked.layouts[0])
    assert {grade.grade for grade in (law.left, law.left_bare, law.right) if grade} == {"bit"}
    left = {"x": values(3)} | ({"z": values(3) + 1} if "{j" in text else {})
    if "[a b]" in text:
        left = {"x": values(4, 3)}
    made = trip(text, left)
    assert made["y"].dtype == F32
    assert_same(trip(text, made, "right"), left, "from the right")


def test_a_narrower_tensor_goes_through_a_wider_dtype() -> None:
    left = {"a.k": values(3, dtype=F16), "a.q": values(3, dtype=BF16)}
    made = trip("a.q [x] as bf16 + a.k [x] as f16 <-> y [(x + x)] as f32\n", left)
    assert made["y"].dtype == F32


def test_blocks_are_decoded_to_the_dtype_that_the_other_side_states() -> None:
    stored = fp8("x.weight", 4, 6)
    made = trip(FP8 + "x.weight as fp8 <-> y as f32\n", stored)
    wide = map_of(FP8 + "x.weight as fp8 <-> y\n").adapter({}).read(stored, dtype=F32)
    assert_same(made, wide, "no rounding to bf16 before")


def test_without_a_complement_the_caller_says_the_dtype() -> None:
    a = map_of("x <-> y as f32\n").adapter({})
    right = {"y": values(3)}
    assert a.write(right)["x"].dtype == BF16
    assert_same(a.write(right, dtype=F32), {"x": right["y"]}, "asked")


def test_of_a_dtype_on_the_right_the_bare_grade_is_lossy() -> None:
    checked = map_of("x <-> y as f32\n").checked
    law = rule_law(checked.map.rules[0], checked.layouts[0])
    assert law.left is not None
    assert law.left_bare is not None
    assert (law.left.grade, law.left_bare.grade) == ("bit", "lossy")


def test_another_checkpoint_forgets_the_dtypes_of_the_one_before() -> None:
    a = map_of("x <-> y as f32  optional\nw <-> w\n").adapter({})
    a.read({"x": values(3), "w": values(1)})
    a.read({"w": values(1)})
    assert a.write({"y": values(3), "w": values(1)})["x"].dtype == BF16


# --- constants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float64, torch.int64])
@pytest.mark.parametrize("start", ["left", "right"])
def test_a_constant_comes_back_in_the_dtype_that_it_was_found_in(dtype: torch.dtype, start: str) -> None:
    there, here = ("c [3]", "_") if start == "left" else ("_", "c [3]")
    state = {"w": values(2), "c": torch.zeros(3, dtype=dtype)}
    assert_same(trip(f"w <-> w\n{there} <-> {here} = 0\n", state, start), {"w": state["w"]}, "the other side")


def test_of_a_constant_the_bare_grade_is_of_its_value() -> None:
    for text, bare in (("c [3] <-> _ = 0\n", "value"), ("c [3] as f32 <-> _ = 0\n", "bit, guarded")):
        checked = map_of("w <-> w\n" + text).checked
        law = rule_law(checked.map.rules[1], checked.layouts[1])
        assert law.left is not None
        assert law.left_bare is not None
        assert (law.left.grade, law.left_bare.grade) == ("bit, guarded", bare)


def test_a_constant_that_a_dtype_rounds_is_compared_as_rounded() -> None:
    for dtype in (F32, BF16, torch.float64):
        trip("w <-> w\nc [] <-> _ = 0.1\n", {"w": values(1), "c": torch.tensor(0.1, dtype=dtype)})
    with pytest.raises(ConversionError, match="R601"):
        trip("w <-> w\nc [] <-> _ = 0.1\n", {"w": values(1), "c": torch.tensor(0.1).double()})


def test_a_generated_tensor_comes_back_in_its_dtype() -> None:
    made = map_of("param t\nw <-> w\nf <-> _ = inv_freq(t, 4)\n").adapter({"t": 100})
    stored = made.write({"w": values(1)})
    assert stored["f"].dtype == F32
    stored["f"] = stored["f"].to(BF16)
    assert_same(made.write(made.read(stored)), stored, "left, right, left")


# --- groups in mixed formats ------------------------------------------------------------------------------------------

STACK = "param E = 3\nindex e < E\nx.{e}.weight [f d] as fp8|fp4|raw <-> y.w "


@pytest.mark.parametrize("plain", [0, 1, 2])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_some_experts_of_a_stack_may_be_stored_as_they_are(plain: int, dtype: torch.dtype) -> None:
    stored = {f"x.{plain}.weight": bf16(4, 6).to(dtype)}
    for e in {0, 1, 2} - {plain}:
        stored |= fp8(f"x.{e}.weight", 4, 6)
    made = trip(FP8 + FP4 + STACK + "[e d f]\n", stored)
    assert made["y.w"].dtype == dtype


@pytest.mark.parametrize("plain", [0, 1, 2])
def test_a_mixed_stack_is_decoded_where_both_sides_have_its_format(plain: int) -> None:
    stored = {f"x.{plain}.weight": bf16(4, 6)}
    for e in {0, 1, 2} - {plain}:
        stored |= fp8(f"x.{e}.weight", 4, 6)
    assert set(trip(FP8 + FP4 + STACK + "[e f d] as fp8|raw\n", stored)) == {"y.w"}


def two_formats() -> dict[str, Tensor]:
    stored = {**fp8("x.0.weight", 4, 6), **fp8("x.2.weight", 4, 6)}
    stored["x.1.weight"] = torch.arange(12, dtype=torch.int8).reshape(4, 3)
    stored["x.1.scale"] = torch.full((4, 3), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return stored


def test_a_stack_of_two_codecs_is_decoded() -> None:
    assert set(trip(FP8 + FP4 + STACK + "[e f d] as fp8|raw\n", two_formats())) == {"y.w"}
    assert set(trip(FP8 + FP4 + STACK + "[e d f]\n", two_formats())) == {"y.w"}


def test_a_mixed_stack_that_the_other_side_cannot_hold_is_refused() -> None:
    text = FP8 + FP4 + STACK.replace("|raw", "") + "[e f d] as fp4|fp8\n"
    with pytest.raises(ConversionError) as caught:
        map_of(text).adapter({}).read(two_formats())
    assert caught.value.code == "R606"
    for word in ("x.0.weight is stored as fp8", "x.1.weight of the same group as fp4", "`raw`"):
        assert word in caught.value.message


def test_plain_tensors_of_several_dtypes_are_refused() -> None:
    stored = {"x.0.weight": bf16(4, 6), "x.1.weight": bf16(4, 6).float(), **fp8("x.2.weight", 4, 6)}
    with pytest.raises(ConversionError, match=r"R606.*x\.1\.weight.*bfloat16.*float32"):
        map_of(FP8 + FP4 + STACK + "[e d f]\n").adapter({}).read(stored)


# --- copies on both sides ---------------------------------------------------------------------------------------------

COPIES = "param R = 2\nparam P = 3\nindex q < R\nindex p < P\nc [x repeat p y] <-> d.{repeat q} [y x]\n"


def test_each_side_has_copies_of_its_own() -> None:
    one = values(4, 5)
    made = trip(COPIES, {"c": one.unsqueeze(1).expand(4, 3, 5).contiguous()})
    assert_same(made, {"d.0": one.T.contiguous(), "d.1": one.T.contiguous()}, "the copies of the right")
    made["d.1"][2, 1] += 1
    with pytest.raises(ConversionError, match=r"R602.*d\.1.*\[.*2, 1\]"):
        map_of(COPIES).adapter({}).write(made)


def test_the_order_of_a_mixed_stack_changes_nothing() -> None:
    text = FP8 + FP4 + STACK + "[e d f] as fp8|fp4|raw\n"  # turned, so that no block stays whole
    for names in ("012", "021", "210"):
        stored = {}
        for name, tensor in two_formats().items():
            number = name.split(".")[1]
            stored[name.replace(f"x.{number}.", f"x.{names[int(number)]}.")] = tensor
        assert set(trip(text, stored)) == {"y.w"}
