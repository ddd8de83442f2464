"""What `mapdsl check` says of meshes: which axes they cut, and where a map speaks of ranks."""

from __future__ import annotations

import pytest

from mapdsl.language.diagnostics import MapError
from tests.helpers.execution import map_of

HEAD = "param L\nparam E\nindex i < L\nindex e < E\nindex 1 <= b < L\n"


def codes(text: str) -> list[str]:
    try:
        found = map_of(HEAD + text).check()
    except MapError as problem:
        found = list(problem.diagnostics)
    return [f"{one.code}: {one.message}" for one in found if one.code != "L701"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mesh tp shards j\na.{j:x|y} [d] <-> b [j d]\n", "P455: the positions of `j` are spelled in names"),
        ("index k < i\nmesh ep shards k\na.{i}.{k} [d] <-> b.{i} [k d]\n", "P455: the range of `k` is not fixed"),
        ("a.{i} [d] <-> b.{local i} [d]\n", "P455: `local` stands before an index that a mesh cuts"),
        ("mesh pp shards b\na.{b} [d] <-> c.{local b} [d]\n", "P455: `{local b}` counts from 0, but `b` does not"),
        ("mesh pp shards i\na.{i}.{n:*} [d] <-> c.{local i}.{n:*} [d]\n", "P455: a name with a wildcard cannot count"),
        ("mesh pp shards i\na.{i} [d] <-> b.{i} [d] where rank(tp) == 0\n", "N111: no param or index `tp`"),
        ("mesh pp shards i\na.{i} [d] <-> b.{i} [d] where rank(L) == 0\n", "N113: `rank` asks for a mesh of the map"),
        ("mesh pp shards i\na.{i} [d] <-> b.{i} [d] where pp == 0\n", "N113: `pp` is a mesh, no number"),
        ("mesh tp shards L\na [L d] <-> b [pad(L, 2*rank(tp)) d]\n", "P455: all ranks pad to one size"),
        ("index k < L // size(tp)\nmesh tp shards f\na.{k} [f] <-> b.{k} [f]\n", "P455: `size` stands in guards and"),
        ("mesh ep shards e, y\na.{e} [y d] <-> b [e y d]\n", "P452: `ep` cuts two axes of this tensor, `e` and `y`"),
        ("mesh tp shards f, h\na [f h] <-> b\n", "P452: `tp` cuts two axes of this tensor, `f` and `h`"),
        ("mesh tp shards f\na <-> b\n", "X307: in a map with a mesh every tensor needs a shape"),
        ("mesh ep shards e\nr [e d] <-> q\na.{e} [d] <-> b.{e} [d]\n", "L708: `e` is cut here too, though nothing"),
    ],
)
def test_what_meshes_cannot_say(text: str, message: str) -> None:
    assert any(found.startswith(message) for found in codes(text)), codes(text)


@pytest.mark.parametrize(
    "text",
    [
        "mesh pp shards i\na.{i} [d] <-> b.{local i} [d] where rank(pp) == 0 and size(pp) > 1\n",
        "mesh tp shards L\na [L d] <-> b [pad(L, 2*size(tp)) d]\nmesh ep shards e\nc.{e} [d] <-> c [e d]\n",
        "mesh tp shards f\na [f] <-> b\nold.{..} -> _ else\n",
        "mesh ep shards e\na.{e} [d f] <-> b.{e}\nexperts.weight [e f d] <-> experts.weight\n",
    ],
)
def test_what_meshes_can_say(text: str) -> None:
    assert codes(text) == []
