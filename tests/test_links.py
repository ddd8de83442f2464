"""Which elements of two tensors are the same: held against tensors whose elements are their own places."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mapdsl.runtime.links import (
    Along,
    Axis,
    Link,
    Region,
    boxes_of,
    common,
    elements,
    joined_axes,
    whole_box,
    whole_region,
)
from mapdsl.runtime.traced import Traced, Whole
from tests.helpers.links import (
    Case,
    boxes,
    cases,
    counted,
    flat_at,
    in_box,
    origins,
    parts_of,
    place_at,
    place_of,
    positions,
)

MANY = settings(max_examples=100)
SIDES = st.sampled_from(["source", "target"])

# --- views ---


@st.composite
def steps(draw: st.DrawFn, shape: Sequence[int]) -> tuple[str, tuple[Any, ...]]:
    """A view to make of a tensor of a shape, with its arguments."""
    kinds = ["unsqueeze", "permute", "expand", *(["narrow", "select", "unflatten", "flatten"] if shape else [])]
    kind = draw(st.sampled_from(kinds))
    dim = draw(st.integers(0, max(len(shape) - 1, 0)))
    if kind == "unsqueeze":
        return kind, (draw(st.integers(0, len(shape))),)
    if kind == "permute":
        return kind, tuple(draw(st.permutations(range(len(shape)))))
    if kind == "expand":
        return kind, (draw(st.integers(1, 3)), *shape)
    if kind == "flatten":
        return kind, (dim, draw(st.integers(dim, len(shape) - 1)))
    if kind == "select":
        return ("select", (dim, draw(st.integers(0, shape[dim] - 1)))) if shape[dim] else ("flatten", (dim, dim))
    if kind == "narrow":
        start = draw(st.integers(0, shape[dim]))
        return kind, (dim, start, draw(st.integers(0, shape[dim] - start)))
    sizes, left = [], shape[dim]
    for _ in range(draw(st.integers(1, 3))):
        sizes.append(draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0])) if left else 3)
        left //= sizes[-1]
    return kind, (dim, (*sizes, left))


def is_separable(found: Tensor) -> bool:
    """Whether places are a sum of what each dimension gives."""
    first = found[(0,) * found.ndim]
    total = first.clone().expand(found.shape).clone()
    for dim in range(found.ndim):
        line = found[tuple(slice(None) if n == dim else 0 for n in range(found.ndim))] - first
        total += line.reshape([-1 if n == dim else 1 for n in range(found.ndim)])
    return torch.equal(total, found)


@MANY
@given(st.data())
def test_chains_of_views_know_where_every_element_comes_from(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 6) if data.draw(st.booleans()) else st.integers(1, 6), max_size=3))
    real, traced = counted(shape), Traced.all_of(Whole("w", tuple(shape)))
    for _ in range(data.draw(st.integers(1, 6))):
        kind, arguments = data.draw(steps(real.shape))
        if math.prod(real.shape) > 500:
            break
        made = real.permute(arguments) if kind == "permute" else getattr(real, kind)(*arguments)
        try:
            traced = getattr(traced, kind)(*arguments)
        except ValueError:
            # What a joined dimension has of two tensors' dimensions cannot be cut across.
            factors = traced.region.dims[arguments[0]]
            assert len(factors) > 1, (kind, arguments)
            assert kind == "narrow" or not is_separable(made), (kind, arguments)
            continue
        real = made
        assert tuple(traced.shape) == tuple(real.shape) == traced.region.shape, (kind, arguments)
        assert traced.numel() == real.numel()
        if real.numel():
            assert torch.equal(origins(traced.region, shape), real), (kind, arguments)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.data())
def test_indices_and_reshape_are_those_of_tensors(shape: list[int], data: st.DataObject) -> None:
    real, traced = counted(shape), Traced.all_of(Whole("w", tuple(shape)))
    places = tuple(data.draw(st.one_of(st.integers(0, size - 1), st.just(slice(None)))) for size in shape)
    assert torch.equal(origins(traced[places].region, shape), real[places])
    assert torch.equal(origins(traced[places[0]].region, shape), real[places[0]])
    flat = (math.prod(shape),)
    assert torch.equal(origins(traced.reshape(flat).region, shape), real.reshape(flat))
    assert torch.equal(origins(traced.reshape(flat).reshape(shape).region, shape), real)
    rows = real.flatten(1)
    assert torch.equal(origins(traced.flatten(1, len(shape) - 1).T.region, shape), rows.T)


def test_scalars_have_one_element() -> None:
    scalar = Traced.all_of(Whole("w", ()))
    assert scalar.numel() == 1
    assert scalar.reshape((1, 1)).shape == (1, 1)
    assert scalar.reshape(()).shape == ()
    (axis,) = joined_axes(scalar.expand(3).region, whole_region((3,)))
    assert axis.size == 3 and axis.source.dim == -1


def test_parts_of_copies_and_of_joined_dimensions() -> None:
    copies, real = Traced.all_of(Whole("w", (3,))).expand(4, 3), counted((3,)).expand(4, 3)
    assert torch.equal(origins(copies.select(0, 2).region, (3,)), real[2])
    assert torch.equal(origins(copies.narrow(0, 1, 2).region, (3,)), real[1:3])
    joined = Traced.all_of(Whole("w", (2, 3))).permute(1, 0).flatten(0, 1)
    assert torch.equal(origins(joined.narrow(0, 2, 4).region, (2, 3)), counted((2, 3)).T.reshape(-1)[2:6])
    with pytest.raises(ValueError, match="not a view"):
        joined.narrow(0, 1, 2)


# --- links ---


@MANY
@given(cases())
def test_axes_join_each_element_to_its_own(case: Case) -> None:
    link = case.link
    everything = list(positions(link.everything))
    assert len(everything) == case.places["target"].numel()
    found = {(flat_at(case, "source", one), flat_at(case, "target", one)) for one in everything}
    assert found == case.pairs()


@MANY
@given(cases(), SIDES, st.data())
def test_positions_within_a_box(case: Case, side: Any, data: st.DataObject) -> None:
    """Each that is in the box, once; also among those of some ranges."""
    link, box = case.link, data.draw(boxes(case.shapes[side]))
    ranges = link.everything
    if case.places["target"].numel() and data.draw(st.booleans()):
        ranges = data.draw(parts_of(ranges))
    parts = link.within(side, box, ranges)
    found = [one for part in parts for one in positions(part)]
    assert len(found) == len(set(found))
    assert set(found) == {one for one in positions(ranges) if in_box(place_at(link, side, one), box)}
    assert all(begin < end for part in parts for begin, end in part)
    if box == whole_box(case.shapes[side]) and case.places["target"].numel():
        assert parts == [ranges]
    if ranges == link.everything:
        assert link.within(side, box) == parts


@MANY
@given(cases(empty=False), SIDES, st.data())
def test_where_positions_are(case: Case, side: Any, data: st.DataObject) -> None:
    """The smallest box around them, and the runs of each dimension."""
    link = case.link
    ranges = data.draw(parts_of(link.everything))
    places = [place_at(link, side, one) for one in positions(ranges)]
    columns = list(zip(*places, strict=True))
    box = link.box(side, ranges)
    assert box == tuple((min(column), max(column) + 1) for column in columns)
    runs = link.runs(side, ranges)
    assert [[n for begin, end in one for n in range(begin, end)] for one in runs] == [sorted(set(c)) for c in columns]
    for one in runs:  # neighbours are one run
        assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(one))


@MANY
@given(cases(empty=False))
def test_views_are_what_one_stride_a_dimension_gives(case: Case) -> None:
    """Of a source whose strides are anything: the dimensions of the target's part need one each."""
    link = case.link
    everything = list(positions(link.everything))
    offsets = {
        place_at(link, "target", one): sum(1000**n * p for n, p in enumerate(place_at(link, "source", one)))
        for one in everything
    }
    columns = [sorted(set(column)) for column in zip(*offsets, strict=True)]
    base = offsets[tuple(column[0] for column in columns)]
    ends = [offsets[tuple(c[1 if n == dim else 0] for n, c in enumerate(columns))] if len(column) > 1 else base
            for dim, column in enumerate(columns)]  # fmt: skip
    is_view = all(
        value == base + sum((end - base) * c.index(p) for end, c, p in zip(ends, columns, place, strict=True))
        for place, value in offsets.items()
    )
    assert link.is_view == is_view, link


@MANY
@given(cases(empty=False))
def test_renames_are_parts_that_do_not_move(case: Case) -> None:
    link, shapes = case.link, case.shapes
    pairs = [(place_of(a, shapes["source"]), place_of(b, shapes["target"])) for a, b in case.pairs()]
    stays = all(a == b for a, b in (map(_without_zeros, pair) for pair in pairs))
    is_in_order = torch.equal(case.places["target"].reshape(-1), torch.arange(math.prod(shapes["target"])))
    if link.is_rename:
        assert stays
    if shapes["source"] == shapes["target"] and is_in_order and stays:
        assert link.is_rename
    assert not link._replace(copy=True).is_rename


def _without_zeros(place: Sequence[int]) -> tuple[int, ...]:
    """A place without the dimensions at its end in which it is the first."""
    return tuple(place[: max((n + 1 for n, one in enumerate(place) if one), default=0)])


def test_what_is_copied_is_no_rename() -> None:
    source = Traced.all_of(Whole("s", (4,))).expand(3, 4)
    link = Link("s", (0,), "t", (0, 0), joined_axes(source.region, whole_region((3, 4))))
    assert not link.is_rename and link.is_view
    assert [axis.source.dim for axis in link.axes] == [-1, 0]
    assert link.within("source", ((1, 3),)) == [((0, 3), (1, 3))]


def test_what_has_gaps_is_no_rename() -> None:
    """Nothing moves, but it is not all of it: the first halves of pairs."""
    half = Traced.all_of(Whole("s", (6,))).unflatten(0, (3, 2)).select(1, 0)
    link = Link("s", (0,), "t", (0,), joined_axes(half.region, half.region))
    assert link.axes == (Axis(3, Along(0, 2), Along(0, 2)),)
    assert link.is_view and not link.is_rename


def test_two_dimensions_are_no_view_as_one() -> None:
    """Whatever their steps are."""
    axes = (Axis(2, Along(0, 2), Along(0, 2)), Axis(2, Along(1, 1), Along(0, 1)))
    assert not Link("s", (0, 0), "t", (0,), axes).is_view


def test_parts_of_different_shapes_have_no_axes() -> None:
    with pytest.raises(ValueError, match="no common cut"):
        joined_axes(whole_region((4,)), whole_region((6,)))


@given(st.data())
def test_boxes(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), max_size=3))
    one, other = data.draw(boxes(shape)), data.draw(boxes(shape))
    everywhere = [place_of(n, shape) for n in range(math.prod(shape))]
    both = [place for place in everywhere if in_box(place, one) and in_box(place, other)]
    shared = common(one, other)
    assert (shared is None) == (not both)
    assert shared is None or [place for place in everywhere if in_box(place, shared)] == both
    assert elements(one) == sum(in_box(place, one) for place in everywhere)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), max_size=3))
def test_boxes_of_runs(wanted: list[list[bool]]) -> None:
    """Put together at the places named, they are the elements wanted, in their order."""
    whole = counted([len(line) for line in wanted])
    runs = [[(n, n + 1) for n, is_in in enumerate(line) if is_in] for line in wanted]
    made = torch.full([len(line) for line in runs], -1)
    for box, at in boxes_of(runs):
        place = tuple(slice(n, n + end - begin) for n, (begin, end) in zip(at, box, strict=True))
        assert (made[place] == -1).all()
        made[place] = whole[tuple(slice(*span) for span in box)]
    expected = whole
    for dim, line in enumerate(runs):
        expected = expected.index_select(dim, torch.tensor([begin for begin, _ in line], dtype=torch.int64))
    assert torch.equal(made, expected)


def test_regions_have_the_shapes_of_their_dimensions() -> None:
    assert whole_region((2, 1, 0)).shape == (2, 1, 0)
    assert Region((), ()).shape == ()
