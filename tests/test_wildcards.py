"""Rules that read their names off a state: `else` under a guard, and indices without an upper bound."""

from __future__ import annotations

import pytest
import torch

from mapdsl.language.source import Source
from mapdsl.map import Map
from mapdsl.runtime.errors import ConversionError

GUARDED = """
map t: hf <-> native
param W = vision ?? 0
vision.{..} <-> model.vision.{..} else where W > 0
"""
DROPPED = """
map t: hf <-> native
param L = layers
param M = mtp
index x >= M
layers.{HOLE}.{..} -> _ else
a <-> b
"""


def load(text: str) -> Map:
    return Map(Source("t.map", text))


def state(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(1) for name in names}


def test_an_else_rule_carries_nothing_where_its_guard_does_not_hold() -> None:
    guarded = load(GUARDED)
    assert list(guarded.adapter({"vision": 1}).from_hf(state("vision.a.b"))) == ["model.vision.a.b"]
    with pytest.raises(ConversionError, match=r"R603.*vision\.a\.b"):
        guarded.adapter({"vision": 0}).from_hf(state("vision.a.b"))
    assert guarded.adapter({"vision": 0}).to_hf({}) == {}


def test_a_guarded_else_rule_keeps_its_names_from_a_wider_one() -> None:
    """An index's range is part of a name, a guard is not: the narrower rule takes the name, or nothing does."""
    both = load(GUARDED + "{..} <-> {..} else\n")
    assert set(both.adapter({"vision": 1}).from_hf(state("vision.a", "b"))) == {"model.vision.a", "b"}
    assert set(both.adapter({"vision": 0}).from_hf(state("b"))) == {"b"}
    with pytest.raises(ConversionError, match=r"R603.*vision\.a"):
        both.adapter({"vision": 0}).from_hf(state("vision.a", "b"))


@pytest.mark.parametrize(
    ("hole", "first"), [("x", 1), ("L+x", 5), ("x+L", 5), ("1+x", 2), ("L+x+2", 7), ("x+L+2", 7), ("1+L+x+1", 7)]
)
def test_an_index_without_an_upper_bound_is_read_off_its_name(hole: str, first: int) -> None:
    adapter = load(DROPPED.replace("HOLE", hole)).adapter({"layers": 4, "mtp": 1})
    dropped = state(f"layers.{first}.w", f"layers.{first + 9}.w.v")
    assert list(adapter.from_hf(state("a") | dropped)) == ["b"]
    with pytest.raises(ConversionError, match=rf"R603.*layers\.{first - 1}\.w"):
        adapter.from_hf(state("a", f"layers.{first - 1}.w"))


@pytest.mark.parametrize("hole", ["2*x+1", "x+x", "2*x", "L-x"])
def test_an_index_without_an_upper_bound_can_only_be_shifted(hole: str) -> None:
    found = load(DROPPED.replace("HOLE", hole)).check()
    assert "N112" in [one.code for one in found]


def test_the_template_of_has_is_checked_as_others_are() -> None:
    text = "map x: a <-> b\nparam p = has({..}.x.{..}.y) ?? false\nz <-> w where p\n"
    assert [diagnostic.code for diagnostic in Map(Source("x.map", text)).check()] == ["K207"]
