"""DTensors in a live job, in processes of their own; and which placements there are, against torch's."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from mapdsl.runtime.dtensors import strides_like
from mapdsl.runtime.placements import NoPlacementError, chunked, placements
from mapdsl.runtime.shares import Held, held_of, share, whole
from tests.helpers.dtensor_job import check
from tests.helpers.jobs import run_job

ROOT = Path(__file__).parent.parent

# --- in processes ---


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.heavy)])
def test_in_a_job(world: int, tmp_path: Path) -> None:
    run_job("tests.helpers.dtensor_job", check, world, tmp_path)


# --- what torch can say ---

PATTERNS = ["a", "(a b)", "(b a)", "(c a b)", "(a + a)", "(a b + a)", "(a + b)", "(2 a)", "(a c b)", "(c b + a)"]
HOW = ["evenly", "unevenly", "by ceil", "or copies"]


@st.composite
def cuts(draw: Any) -> tuple[str, dict[str, int], Any]:
    """A pattern with axes that meshes A and B cut, the meshes in order, and what is held of it where."""
    sizes = {axis: draw(st.integers(1, 6)) for axis in "abc"}
    ranks = {"A": draw(st.integers(2, 4)), "B": draw(st.integers(2, 3))}
    how = {mesh: draw(st.sampled_from(HOW)) for mesh in "AB"}
    meshes = draw(st.sampled_from(["A", "B", "AB", "BA"]))
    pattern = draw(st.sampled_from(PATTERNS))
    shares = {}
    for mesh, axis in zip("AB", "ab", strict=True):
        found = [share(sizes[axis], ranks[mesh], place, how[mesh]) for place in range(ranks[mesh])]
        assume(None not in found)
        shares[mesh] = found

    def held(at: dict[str, int]) -> tuple[Held, ...]:
        runs = {
            axis: shares[mesh][at[mesh]] if mesh in at else whole(sizes[axis])
            for mesh, axis in (("A", "a"), ("B", "b"))
        }
        return held_of(pattern, runs | {"c": whole(sizes["c"])})

    return pattern, {mesh: ranks[mesh] for mesh in meshes}, held


def positions(held: Held) -> list[int]:
    return [place for begin, end in held.runs for place in range(begin, end)]


def as_torch_cuts(size: int, meshes: dict[str, int], pieces: tuple[int, ...], at: tuple[int, ...]) -> list[int]:
    """The positions that torch gives a rank."""
    found = torch.arange(size)
    for count, ranks, place in zip(pieces, meshes.values(), at, strict=True):
        way = _StridedShard(0, split_factor=count) if count > 1 else Shard(0)
        found = found if not count else way._split_tensor(found, ranks, with_padding=False)[0][place]
    return found.tolist()


@settings(max_examples=150, deadline=None)
@given(cuts())
def test_placements_are_those_that_torch_has(cut: tuple[str, dict[str, int], Any]) -> None:
    """What is found is what torch makes of it; where nothing is, no strided shards give the same, or none in an order
    that torch can gather."""
    _, meshes, held = cut
    size = held({})[0].size
    everywhere = list(itertools.product(*map(range, meshes.values())))
    expected = [positions(held(dict(zip(meshes, at, strict=True)))[0]) for at in everywhere]
    try:
        found = placements(meshes, held)
    except NoPlacementError as problem:
        if not problem.after:
            for pieces in itertools.product(range(size + 1), repeat=len(meshes)):
                assert not all(
                    as_chunked(size, meshes, pieces, at) == one for at, one in zip(everywhere, expected, strict=True)
                ), pieces
        return
    pieces = tuple(along.pieces if along is not None else 0 for along in found.values())
    assert [as_torch_cuts(size, meshes, pieces, at) for at in everywhere] == expected


def as_chunked(size: int, meshes: dict[str, int], pieces: tuple[int, ...], at: tuple[int, ...]) -> list[int]:
    """The same without torch, which is slow."""
    found = list(range(size))
    for count, ranks, place in zip(pieces, meshes.values(), at, strict=True):
        if count:
            found = [found[n] for begin, end in chunked(len(found), count, ranks, place) for n in range(begin, end)]
    return found


@given(st.integers(0, 30), st.integers(1, 8), st.integers(1, 5))
def test_chunks_are_those_of_torch(size: int, pieces: int, ranks: int) -> None:
    for rank in range(ranks):
        assert as_chunked(size, {"A": ranks}, (pieces,), (rank,)) == as_torch_cuts(
            size, {"A": ranks}, (pieces,), (rank,)
        )


def test_what_is_cut_in_pieces_comes_last() -> None:
    """torch gathers `(e f)` wrongly where `tp` comes before `ep`, but for as many experts as ranks."""

    def held(at: dict[str, int], experts: int) -> tuple[Held, ...]:
        axes = {"e": share(experts, 2, at["ep"]) if "ep" in at else whole(experts)}
        axes["f"] = share(8, 2, at["tp"]) if "tp" in at else whole(8)
        return held_of("(e f)", axes)  # type: ignore[arg-type]

    assert placements({"ep": 2, "tp": 2}, lambda at: held(dict(at), 4)) == {"ep": (0, 1), "tp": (0, 2)}
    assert placements({"tp": 2, "ep": 2}, lambda at: held(dict(at), 2)) == {"tp": (0, 2), "ep": (0, 1)}
    with pytest.raises(NoPlacementError) as caught:
        placements({"tp": 2, "ep": 2}, lambda at: held(dict(at), 4))
    assert (caught.value.mesh, caught.value.after) == ("ep", "tp")

    def apart(at: Mapping[str, int]) -> tuple[Held, ...]:  # `e (j f)`
        experts, both = (
            share(size, 2, at[mesh]) if mesh in at else whole(size) for size, mesh in ((4, "ep"), (8, "tp"))
        )
        return held_of("e (3 f)", {"e": experts, "f": both})  # type: ignore[dict-item]

    assert placements({"tp": 2, "ep": 2}, apart) == {"tp": (1, 3), "ep": (0, 1)}


def test_strides_of_views() -> None:
    assert strides_like(torch.empty(2, 3).T, torch.Size((3, 8))) == (1, 3)
    assert strides_like(torch.empty(2, 3, 4), torch.Size((4, 3, 4))) == (12, 4, 1)
    assert strides_like(torch.empty(1, 1), torch.Size((4, 3))) == (3, 1)


def test_torch_distributed_is_not_imported_for_states_without_dtensors() -> None:
    code = """
import sys, torch
from tests.helpers.execution import map_of
adapter = map_of("mesh tp shards h\\nparam h\\nq [(h c) d] <-> q [(h c) d]\\n").adapter(None, h=4)
mine = adapter.shard({"q": torch.ones(8, 2)}, {"tp": 2}, {"tp": 1})
adapter.at({"tp": 2}, {"tp": 1}).to_hf(mine)
print("torch.distributed.tensor" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout == "False\n"
