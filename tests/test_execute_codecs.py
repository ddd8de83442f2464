"""Rules with storage formats executed: what is decoded, what is moved as it is stored, what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mapdsl.compiler.laws import rule_law
from mapdsl.runtime.errors import ConversionError
from tests.helpers.execution import assert_same, map_of, on_meta

FP8 = 'codec fp8 = block_scaled(f8e4m3, block=2x2, scale="{stem}.scale", scale_dtype=f8e8m0|f32)\n'
FP4 = 'codec fp4 = block_scaled(f4e2m1, block=1x2, packed=i8, scale="{stem}.scale", scale_dtype=f8e8m0)\n'
EACH = 'codec each = block_scaled(f8e4m3, block=*x*, scale="{key}_scale", squeeze=true)\n'


def adapter(text: str, config: Mapping[str, Any] | None = None) -> Any:
    return map_of(text).adapter(config or {})


def fp8(
    name: str, *shape: int, scale: str = "", seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A payload of random bytes, NaNs and -0.0 among them, and scales that are no powers of two."""
    made = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    payload = torch.randint(0, 256, shape, generator=made, dtype=torch.uint8).view(torch.float8_e4m3fn)
    grid = (*shape[:-2], -(-shape[-2] // 2), -(-shape[-1] // 2))
    scales = torch.rand(grid, generator=made) + 0.3
    scale_name = scale or name.rpartition(".")[0] + ".scale"
    return {name: payload, scale_name: scales if dtype == torch.float32 else scales.to(dtype)}


def bf16(*shape: int) -> Tensor:
    return torch.randint(0, 2**15, shape, dtype=torch.int16).view(torch.bfloat16)


def test_one_codec_on_both_sides_moves_payload_and_companions_undecoded() -> None:
    a = adapter(
        FP8 + 'codec b = block_scaled(f8e4m3, block=2x2, scale="{key}_s")\nx.weight as fp8 <-> y.weight as fp8\n'
    )
    stored = fp8("x.weight", 5, 7)
    found = a.read(stored)
    assert_same(found, {"y.weight": stored["x.weight"], "y.scale": stored["x.scale"]}, "moved")
    assert_same(a.write(found, quantization=True), stored, "moved back")
    assert_same(a.write(found), stored, "there is no other format to write")
    assert_same(a.read(on_meta(stored)), on_meta(found), "on meta")


STACK = """
param E = 3
index e < E
experts.{e}.w.weight [f d] as fp8|fp4|raw <-> stacked.weight [e f d] as fp8|raw
"""


def test_a_stack_of_blocks_is_moved_undecoded() -> None:
    a = adapter(FP8 + FP4 + STACK)
    stored: dict[str, Tensor] = {}
    for e in range(3):
        stored |= fp8(f"experts.{e}.w.weight", 5, 7)
    found = a.read(stored)
    assert set(found) == {"stacked.weight", "stacked.scale"}
    for e in range(3):
        assert_same({"w": found["stacked.weight"][e]}, {"w": stored[f"experts.{e}.w.weight"]}, "payload")
        assert_same({"s": found["stacked.scale"][e]}, {"s": stored[f"experts.{e}.w.scale"]}, "scales")
    assert_same(a.write(found, quantization=True), stored, "back")
    fresh = adapter(FP8 + FP4 + STACK)
    assert_same(fresh.write(found, quantization=True), stored, "undecoded without a complement too")
    assert_same(a.read(on_meta(stored)), on_meta(found), "on meta")


def test_unquantised_writing_decodes_where_the_map_allows_it() -> None:
    a = adapter(FP8 + FP4 + STACK)
    stored: dict[str, Tensor] = {}
    for e in range(3):
        stored |= fp8(f"experts.{e}.w.weight", 4, 6)
    plain = a.write(a.read(stored), quantization=False)
    assert set(plain) == {f"experts.{e}.w.weight" for e in range(3)}
    assert all(tensor.dtype == torch.bfloat16 for tensor in plain.values())


def test_a_codec_that_the_other_side_lacks_is_decoded() -> None:
    a = adapter(FP8 + FP4 + "x.weight [f d] as fp8|fp4|raw <-> y.weight as raw|fp8\n")
    made = torch.Generator().manual_seed(1)
    stored = {
        "x.weight": torch.randint(0, 256, (3, 2), generator=made, dtype=torch.uint8).view(torch.int8),
        "x.scale": torch.randint(120, 130, (3, 2), generator=made, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }
    found = a.read(stored)
    assert found["y.weight"].dtype == torch.bfloat16
    assert found["y.weight"].shape == (3, 4)
    assert_same(a.write(found, quantization=True), stored, "back")
    raw = {"x.weight": bf16(3, 4)}
    assert_same(a.write(a.read(raw), quantization=True), raw, "raw")


@pytest.mark.parametrize("shapes", ["[f d] [f d]", "[f d] [d f]"])
def test_what_was_read_as_it_is_stays_so(shapes: str) -> None:
    left, right = shapes.split("] ")
    text = FP8 + f"x.weight {left}] as fp8|raw <-> y.weight {right} as fp8|raw\n"
    stored = {"x.weight": bf16(4, 6)}
    a = adapter(text)
    found = a.read(stored)
    assert set(found) == {"y.weight"}
    assert_same(a.write(found, quantization=True), stored, "back")
    assert_same(adapter(text).write(found, quantization=True), stored, "back without a complement")


@pytest.mark.parametrize(
    ("rule", "left", "right"),
    [
        ("x as fp8 <-> y as fp8", "bit", "bit"),
        ("x as fp8|raw <-> y as fp8|raw", "bit", "bit"),
        ("x [f d] as fp8|raw <-> y [d f] as fp8|raw", "lossy", "lossy"),
        ("x [f d] as raw <-> y [d f] as raw", "bit", "bit"),
        ("{j:a|b}.w [f d] as fp8 <-> y [j f d] as fp8", "bit", "bit"),
        ("{j:a|b}.w [f d] as fp8 <-> y [f j d] as fp8", "lossy", "lossy"),
        ("x as fp8 <-> y", "bit", "lossy"),
        ("x <-> y as fp8", "lossy", "bit"),
        ("x as fp4 <-> y as raw|fp8", "bit", "lossy"),
    ],
)
def test_laws_of_codecs_on_both_sides(rule: str, left: str, right: str) -> None:
    checked = map_of(FP8 + FP4 + rule + "\n").checked
    law = rule_law(checked.map.rules[0], checked.layouts[0])
    assert law.left is not None
    assert law.right is not None
    assert (law.left.grade, law.right.grade) == (left, right)


def test_a_transpose_of_blocks_is_decoded_and_encoded_anew() -> None:
    text = FP8 + "x.weight [f d] as fp8 <-> x.weight [d f] as fp8\nplain [f d] as fp8 <-> plain [d f]\n"
    stored = fp8("x.weight", 4, 6)
    stored["x.weight"] = stored["x.weight"].float().nan_to_num(1.0).to(torch.float8_e4m3fn)
    stored |= {"plain": stored["x.weight"], "scale": stored["x.scale"]}
    found = adapter(text).read(stored)
    assert {name: list(t.shape) for name, t in found.items()} == {
        "x.weight": [6, 4],
        "x.scale": [3, 2],
        "plain": [6, 4],
    }
    again = adapter(text).write(found, quantization=True)
    error = (adapter(text).read(again)["plain"].float() - found["plain"].float()).abs()
    assert (error <= found["plain"].float().abs() / 8 + found["plain"].float().abs().max() / 400).all()


def test_a_codec_on_the_right_alone() -> None:
    a = adapter(FP8 + "x.weight [f d] <-> y.weight [d f] as fp8\n")
    right = fp8("y.weight", 4, 6)
    right["y.weight"] = right["y.weight"].float().nan_to_num(1.0).to(torch.float8_e4m3fn)
    left = a.write(right)
    assert left["x.weight"].dtype == torch.bfloat16
    assert left["x.weight"].shape == (6, 4)
    assert_same(a.read(left), right, "right, left, right, with what writing kept")
    assert set(adapter(FP8 + "x.weight [f d] <-> y.weight [d f] as fp8\n").read(left)) == {"y.weight", "y.scale"}


def test_experts_with_a_scale_each() -> None:
    text = EACH + "param E = 3\nindex e < E\nw.{e} [f d] <-> experts [e d f] as each\n"
    payload = torch.randint(0, 127, (3, 5, 7), dtype=torch.uint8).view(torch.float8_e4m3fn)
    right = {"experts": payload, "experts_scale": torch.rand(3) + 0.5}
    a = adapter(text)
    left = a.write(right)
    assert {name: list(t.shape) for name, t in left.items()} == {f"w.{e}": [7, 5] for e in range(3)}
    for e in range(3):
        wanted = (payload[e].float() * right["experts_scale"][e]).to(torch.bfloat16).T
        assert torch.equal(left[f"w.{e}"], wanted)
    assert_same(a.read(left), right, "back")


def test_a_squeezed_scale_is_not_stacked_undecoded() -> None:
    text = EACH + "param E = 2\nindex e < E\nw.{e} [f d] as each <-> experts [e f d] as each\n"
    stored: dict[str, Tensor] = {}
    for e in range(2):
        payload = torch.randint(0, 127, (3, 5), dtype=torch.uint8).view(torch.float8_e4m3fn)
        stored |= {f"w.{e}": payload, f"w.{e}_scale": torch.tensor(0.25 + e)}
    found = adapter(text).read(stored)
    assert found["experts"].shape == (2, 3, 5)
    assert found["experts_scale"].shape == (2,)
    again = adapter(text).write(found, quantization=True)
    for e in range(2):
        wanted, value = (s[f"w.{e}"].float() * s[f"w.{e}_scale"] for s in (stored, again))
        assert torch.allclose(value, wanted, rtol=1 / 8, atol=float(wanted.max()) / 400)
    one = adapter(text.replace("= 2", "= 1")).read({name: t for name, t in stored.items() if name.startswith("w.0")})
    assert one["experts_scale"].shape == (1,)


def test_value_changes_and_casts() -> None:
    a = adapter(
        "norm.weight as add(1) <-> norm.w\nA_log [h] as neg_exp <-> A\n"
        "bias as f32 <-> b as bf16\nhalf as add(-0.5) <-> h\n"
    )
    stored = {
        "norm.weight": torch.tensor([0.25, -1.0, 3.0], dtype=torch.bfloat16),
        "A_log": torch.tensor([0.0, 1.0, -3.0]),
        "bias": torch.tensor([1.5, -0.0]),
        "half": torch.tensor([2.0]),
    }
    found = a.read(stored, dtype=torch.float32)
    assert found["norm.w"].tolist() == [1.25, 0.0, 4.0]
    expected = -torch.tensor([0.0, 1.0, -3.0]).double().exp().float()
    assert torch.equal(found["A"], expected)
    assert found["b"].dtype == torch.bfloat16
    assert found["h"].tolist() == [1.5]
    assert_same(a.write(found, quantization=True), stored, "back")


def test_companions_are_respelled_with_their_payload() -> None:
    text = FP8 + "layers.{n:*}.w.weight as fp8|raw <-> l.{n:*}\naccept old.{n:*}.weight for layers.{n:*}.w.weight\n"
    a = adapter(text)
    stored = fp8("old.x.weight", 4, 4, scale="old.x.scale")
    found = a.read(stored)
    assert set(found) == {"l.x"}
    assert a.complement.spelled == {"layers.x.w.weight": "old.x.weight", "layers.x.w.scale": "old.x.scale"}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda s: s.pop("experts.1.w.scale"), "R605"),
        (lambda s: s.pop("experts.1.w.weight"), "R605"),
        (lambda s: s.update({"experts.1.w.weight": bf16(4, 6)}), "R6"),
        (lambda s: s.update({"experts.2.w.scale": torch.ones(2, 2)}), "R606"),
        (lambda s: s.update(fp8("experts.1.w.weight", 6, 4)), "R606"),
        (lambda s: s.update({"experts.0.w.scale": torch.ones(2, 3, dtype=torch.int32)}), "C504"),
    ],
)
def test_groups_that_do_not_fit(change: Any, code: str) -> None:
    stored: dict[str, Tensor] = {}
    for e in range(3):
        stored |= fp8(f"experts.{e}.w.weight", 4, 6)
    change(stored)
    with pytest.raises(ConversionError) as caught:
        adapter(FP8 + FP4 + STACK).read(stored)
    assert caught.value.code.startswith(code)
    assert "experts." in caught.value.message


def test_a_tied_tensor_has_its_companions_too() -> None:
    text = FP8 + "a.weight as fp8|raw <-> a\nb.weight as fp8|raw <-> _ = a.weight\n"
    stored = fp8("a.weight", 4, 4)
    stored |= {"b.weight": stored["a.weight"].clone(), "b.scale": stored["a.scale"].clone()}
    a = adapter(text)
    found = a.read(stored)
    assert set(found) == {"a"}
    assert_same(a.write(found, quantization=True), stored, "back")
    stored["b.scale"][0, 0] = 9.0
    with pytest.raises(ConversionError, match=r"R601.*b\.scale"):
        adapter(text).read(stored)
