"""`zeros(f)`, a part of a tensor that the other side lacks: made, compared, refused where it says nothing."""

from __future__ import annotations

import pytest
import torch

from mapdsl.language.source import Source
from mapdsl.map import Map
from mapdsl.runtime.errors import ConversionError

ALONE = """map alone: hf <-> native
param F = f
index e < 2
{e}.up.B [F x] <-> B [e x (zeros(F) + F)]
"""


def of(text: str) -> Map:
    return Map(Source("x.map", text if text.startswith("map ") else f"map x: a <-> b\nparam F = f\n{text}\n"))


def test_the_other_half_is_made_of_zeros_and_not_written() -> None:
    stored = {f"{e}.up.B": torch.full((3, 2), e + 1, dtype=torch.bfloat16) for e in range(2)}
    adapter = of(ALONE).adapter({"f": 3})
    native = adapter.from_hf(stored)
    expected = torch.zeros(2, 2, 6, dtype=torch.bfloat16)
    expected[0, :, 3:], expected[1, :, 3:] = 1, 2
    assert torch.equal(native["B"], expected)
    assert {name: tensor.tolist() for name, tensor in adapter.to_hf(native).items()} == {
        name: tensor.tolist() for name, tensor in stored.items()
    }


@pytest.mark.parametrize("value", [1.0, -0.0, float("nan")])
def test_what_is_not_zero_there_is_refused(value: float) -> None:
    """-0.0 too: it would come back as 0.0."""
    native = {"B": torch.zeros(2, 2, 6)}
    native["B"][1, 0, 2] = value
    with pytest.raises(ConversionError, match=r"B: the part that the other side lacks .* at \[1, 0, 2\]") as refused:
        of(ALONE).adapter({"f": 3}).to_hf(native)
    assert refused.value.code == "R601"
    native["B"][1, 0, 2], native["B"][1, 0, 3] = 0.0, value
    assert set(of(ALONE).adapter({"f": 3}).to_hf(native)) == {"0.up.B", "1.up.B"}


def test_the_laws_say_that_zeros_are_compared() -> None:
    checked = of(ALONE).checked
    from mapdsl.compiler.laws import rule_law

    law = rule_law(checked.map.rules[0], checked.layouts[0])
    assert law.left is not None and law.right is not None
    assert (law.left.grade, law.right.grade, law.right.reason) == ("bit", "bit, guarded", "zeros, compared")


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("a [F] <-> b [(zeros(F))]", "X303"),
        ("a [F] <-> b [(F + 2 (zeros(F)))]", "X303"),
        ("a [F] <-> b [(zeros(F) + zeros(F))]", "X303"),
        ("a [F] <-> b [(zeros((F + F)) + F)]", "X303"),
        ("a.{j:q|k} [F] <-> b [(zeros(repeat j F) + j F)]", "X303"),
        ("_ <-> b [(zeros(F) + F)] = 1", "X303"),
        ("a [F] <-> b [(zeros(z) + F)]", "X304"),
        ("a [z] <-> b [(zeros(z y) + z)]", "X304"),
        ("a [F d] <-> b [(zeros(F) + F) x]", "X301"),
    ],
)
def test_zeros_that_say_nothing_are_refused(rule: str, code: str) -> None:
    found = of(rule).check()
    assert {diagnostic.code for diagnostic in found} == {code}


def test_an_axis_may_be_called_zeros() -> None:
    assert of("a [(zeros d)] <-> b [zeros d]\nparam zeros").check() == []
