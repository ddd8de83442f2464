"""Maps that include others: meshes of both, and variants that the including map decides between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mapdsl
from mapdsl.compiler.expand import expand, param_values
from mapdsl.compiler.sharding import Sharding

PART = """map part: a <-> b
param version
param V = words
mesh tp shards V, f
up [f d] <-> u where version == 1
up [d f] <-> u [f d] where version == 2
words [pad(V, 4*size(tp)) d] <-> w [V d]
"""


@pytest.fixture
def part(tmp_path: Path) -> Path:
    (tmp_path / "part.map").write_text(PART)
    return tmp_path


def load(folder: Path, text: str) -> Any:
    (folder / "whole.map").write_text(f"map whole: a <-> b\n{text}")
    return mapdsl.load(folder / "whole.map")


def test_a_mesh_of_both_maps_is_one(part: Path) -> None:
    """It cuts the axes of both; one that is cut by both is so once."""
    loaded = load(part, 'mesh pp shards g\nmesh tp shards h, f\nq [h d] <-> q\nout [d f] <-> o\ninclude "part.map"\n')
    assert loaded.check() == []
    meshes = {mesh.name: [axis.name for axis in mesh.axes] for mesh in loaded.checked.map.meshes}
    assert meshes == {"pp": ["g"], "tp": ["h", "f", "V"]}
    adapter = loaded.adapter(None, version=1, V=5)
    state = {"q": torch.zeros(4, 3), "out": torch.zeros(3, 6), "up": torch.zeros(6, 3), "words": torch.zeros(8, 3)}
    found = adapter.shard(state, {"tp": 2}, {"tp": 1}, side="a")
    assert {name: list(t.shape) for name, t in found.items()} == {
        "q": [2, 3],
        "out": [3, 3],
        "up": [3, 3],
        "words": [4, 3],
    }


def test_an_axis_that_both_cut_in_two_ways_is_an_error(part: Path) -> None:
    for text in ("mesh tp shards f by ceil", "mesh ep shards f"):
        found = load(part, f'{text}\ninclude "part.map"\n').check()
        assert [diagnostic.code for diagnostic in found] == ["P452"]


@pytest.mark.parametrize(("version", "shape"), [(1, [6, 3]), (2, [3, 6])])
def test_a_param_decides_between_variants(part: Path, version: int, shape: list[int]) -> None:
    loaded = load(part, f'include "part.map" with version = {version}\n')
    assert loaded.check() == []
    assert len(loaded.checked.map.rules) == len(loaded.checked.layouts) == 2
    made = loaded.adapter({"words": 5}).to_a({"u": torch.zeros(6, 3), "w": torch.zeros(5, 3)})
    assert list(made["up"].shape) == shape


def test_a_guard_of_the_maps_own_that_never_holds_is_an_error(part: Path) -> None:
    loaded = load(part, 'param n\nx <-> y where n < n\ninclude "part.map" with version = 1\n')
    assert [diagnostic.code for diagnostic in loaded.check()] == ["K208"]
    (part / "part.map").write_text(PART + "x [d] <-> y where version < version\n")
    assert [diagnostic.code for diagnostic in mapdsl.load(part / "part.map").check()] == ["K208"]


def test_a_padded_axis_divides_after_it_is_rounded_up(part: Path) -> None:
    checked = mapdsl.load(part / "part.map").checked
    expansion = expand(checked, param_values(checked, {"words": 5}, {"version": 1}))
    assert Sharding(expansion, {"tp": 4}).problems() == []
