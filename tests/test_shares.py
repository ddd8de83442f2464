"""Shares of dimensions against brute force: a list of all positions, from which each rank picks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mapdsl.runtime.shares import Held, joined, nested, share, whole

SIZES = st.sampled_from([0, 1, 2, 3, 5, 7])
AXES = "abc"


def positions(held: Held) -> list[int]:
    return [place for begin, end in held.runs for place in range(begin, end)]


@pytest.mark.parametrize("size", [0, 1, 2, 6, 7, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 12, 14])
def test_shares_of_an_axis(size: int, ranks: int) -> None:
    everything = list(range(size))
    for how in ("unevenly", "by ceil"):
        held = [share(size, ranks, rank, how) for rank in range(ranks)]
        assert [place for one in held if one for place in positions(one)] == everything
        assert sum(one is not None for one in held) == ranks
    sizes = [one.local_size for rank in range(ranks) if (one := share(size, ranks, rank, "unevenly"))]
    assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1
    even = [share(size, ranks, rank) for rank in range(ranks)]
    if size % ranks:
        assert even == [None] * ranks
    else:
        assert [one.local_size for one in even if one] == [size // ranks] * ranks
    copies = [share(size, ranks, rank, "or copies") for rank in range(ranks)]
    if size and size < ranks and ranks % size == 0:
        assert [positions(one) for one in copies if one] == [[rank * size // ranks] for rank in range(ranks)]
    else:
        assert copies == even


def test_by_ceil_is_what_torch_chunks() -> None:
    torch = pytest.importorskip("torch")
    for size, ranks in itertools.product(range(1, 14), range(1, 6)):
        chunks = [chunk.tolist() for chunk in torch.arange(size).chunk(ranks)]
        chunks += [[] for _ in range(ranks - len(chunks))]
        assert [positions(share(size, ranks, rank, "by ceil") or whole(0)) for rank in range(ranks)] == chunks


DIMENSIONS = st.recursive(
    st.sampled_from(AXES),
    lambda inner: st.tuples(st.sampled_from("*+"), st.lists(inner, min_size=1, max_size=3)),
    max_leaves=5,
)


def brute(dimension: Any, sizes: dict[str, int], held: dict[str, Held]) -> list[bool]:
    """Whether each position is held."""
    if isinstance(dimension, str):
        return [place in positions(held[dimension]) for place in range(sizes[dimension])]
    kind, parts = dimension
    found = [brute(part, sizes, held) for part in parts]
    if kind == "+":
        return [one for part in found for one in part]
    return [all(combination) for combination in itertools.product(*found)]


def computed(dimension: Any, held: dict[str, Held]) -> Held:
    if isinstance(dimension, str):
        return held[dimension]
    kind, parts = dimension
    found = [computed(part, held) for part in parts]
    if kind == "+":
        return joined(found)
    result = whole(1)
    for part in found:
        result = nested(result, part)
    return result


RANKS = st.tuples(st.integers(1, 4), st.integers(0, 3))


@given(DIMENSIONS, st.tuples(SIZES, SIZES, SIZES), st.tuples(RANKS, RANKS, RANKS))
def test_dimensions(dimension: Any, drawn: tuple[int, ...], shares: tuple[tuple[int, int], ...]) -> None:
    sizes = dict(zip(AXES, drawn, strict=True))
    drawn_shares = zip(AXES, shares, strict=True)
    held = {axis: share(sizes[axis], ranks, rank % ranks, "unevenly") for axis, (ranks, rank) in drawn_shares}
    known = {axis: one for axis, one in held.items() if one is not None}
    assume(computed(dimension, known).size <= 2000)
    expected = brute(dimension, sizes, known)
    found = computed(dimension, known)
    assert found.size == len(expected) and found.local_size == sum(expected)
    assert positions(found) == [place for place, is_held in enumerate(expected) if is_held]
    assert all(one[1] < other[0] for one, other in itertools.pairwise(found.runs))
    assert found.is_whole == all(expected)
