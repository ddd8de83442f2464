"""What every node of the syntax tree can do: it cannot be changed, and is equal to what says the same."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from mapdsl.language import tree
from mapdsl.language.source import Source, Span

HERE, THERE = Span(Source("a.map", "a"), 0, 1), Span(Source("b.map", "b"), 0, 1)


def test_equal_nodes_say_the_same() -> None:
    one = tree.Lookup(tree.Name("x", span=HERE), tree.Number(1, span=HERE), span=HERE)
    same = tree.Lookup(tree.Name("x", span=THERE), tree.Number(1, span=THERE), span=THERE)
    assert one == same
    assert hash(one) == hash(same)
    assert one != replace(one, index=tree.Number(2, span=HERE))


def test_nodes_of_other_kinds_are_not_equal() -> None:
    assert tree.Text("x", span=HERE) != tree.Name("x", span=HERE)
    assert tree.Text("x", span=HERE) != "x"
    assert len({tree.Text("x", span=HERE), tree.Name("x", span=HERE), tree.Name("x", span=THERE)}) == 2


def test_nodes_cannot_be_changed() -> None:
    name = tree.Name("x", span=HERE)
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'path'"):
        name.path = "y"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError, match="cannot delete field 'path'"):
        del name.path
    assert name.path == "x"


def test_fields_by_place_by_name_and_by_default() -> None:
    hole = tree.EnumHole("j", spellings=("a", "b"), span=HERE)
    assert (hole.name, hole.spellings, hole.repeat, hole.span) == ("j", ("a", "b"), False, HERE)
    assert [field.name for field in fields(hole)] == ["span", "name", "spellings", "repeat"]
    match replace(hole, repeat=True):
        case tree.EnumHole(name, spellings, True):
            assert (name, spellings) == ("j", ("a", "b"))
        case other:
            pytest.fail(repr(other))


def test_repr_is_without_spans() -> None:
    assert repr(tree.Axis("x", span=HERE)) == "Axis(name='x', size=None, repeat=False)"


def test_nodes_go_through_pickle() -> None:
    rule = tree.Rule((), "<->", (), optional=True, span=HERE)
    assert pickle.loads(pickle.dumps(rule)) == rule
