"""Random parts of tensors, and what links say of them, element by element."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from mapdsl.runtime.links import Link, Ranges, Region, Side, joined_axes
from mapdsl.runtime.traced import Traced, Whole

Place = tuple[int, ...]


def counted(shape: Sequence[int]) -> Tensor:
    """A tensor whose elements are their own places."""
    return torch.arange(math.prod(shape)).reshape(tuple(shape))


def origins(region: Region, shape: Sequence[int]) -> Tensor:
    """The places, in a tensor of a shape, of a region's elements."""
    steps = strides(shape)
    base = sum(place * step for place, step in zip(region.at, steps, strict=True))
    lines = []
    for factors in region.dims:
        line = [0]
        for size, dim, step in factors:
            apart = 0 if dim < 0 else step * steps[dim]
            line = [outer + n * apart for outer in line for n in range(size)]
        lines.append(line)
    found = [base + sum(one) for one in itertools.product(*lines)]
    return torch.tensor(found, dtype=torch.int64).reshape(region.shape)


def strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def place_of(flat: int, shape: Sequence[int]) -> Place:
    """Where the element of a number is."""
    return tuple(flat // step % size for step, size in zip(strides(shape), shape, strict=True))


# --- parts of one shape in two tensors ---


@dataclass(frozen=True)
class Cut:
    """How axes of known sizes lie in a tensor: their order, which share a dimension, and what lies before and behind
    them at each level of a dimension, as of sums. `extra` dimensions have one place chosen.
    """

    order: tuple[int, ...]
    groups: tuple[tuple[tuple[int, int, int], ...], ...]
    extra: tuple[tuple[int, int, int], ...]

    def whole_shape(self, sizes: Sequence[int]) -> list[int]:
        shape = []
        for group in self.groups:
            size = 1
            for axis, before, behind in reversed(group):
                size = before + sizes[axis] * size + behind
            shape.append(size)
        for dim, size, _ in self.extra:
            shape.insert(dim, size)
        return shape

    def part(self, whole: Any, sizes: Sequence[int]) -> Any:
        """The part of a tensor, real or traced, that has the axes as its dimensions."""
        for dim, _, place in reversed(self.extra):
            whole = whole.select(dim, place)
        dim = 0
        for group in self.groups:
            if not group:
                whole = whole.unflatten(dim, (1,)).select(dim, 0)
                continue
            for number, (axis, before, _) in enumerate(group):
                inner = self._inner(group[number + 1 :], sizes)
                whole = whole.narrow(dim, before, sizes[axis] * inner)
                if number < len(group) - 1:
                    whole = whole.unflatten(dim, (sizes[axis], inner))
                dim += 1
        return whole.permute(*(self.order.index(axis) for axis in range(len(sizes)))) if sizes else whole

    def _inner(self, group: Sequence[tuple[int, int, int]], sizes: Sequence[int]) -> int:
        size = 1
        for axis, before, behind in reversed(group):
            size = before + sizes[axis] * size + behind
        return size


@st.composite
def cuts(draw: st.DrawFn, count: int) -> Cut:
    order = draw(st.permutations(range(count)))
    groups: list[list[tuple[int, int, int]]] = []
    for axis in order:
        padding = draw(st.sampled_from([(0, 0), (0, 0), (0, 0), (1, 0), (0, 2), (2, 1)]))
        if groups and draw(st.booleans()):
            groups[-1].append((axis, *padding))
        else:
            groups.append([(axis, *padding)])
    extra = []
    if draw(st.integers(0, 3)) == 0:
        size = draw(st.integers(1, 3))
        extra.append((draw(st.integers(0, len(groups))), size, draw(st.integers(0, size - 1))))
    return Cut(tuple(order), tuple(map(tuple, groups)), tuple(extra))


class Case(NamedTuple):
    """A link, and the places of its elements in both tensors, in the order of the part they have in common."""

    link: Link
    shapes: dict[Side, list[int]]
    places: dict[Side, Tensor]

    def pairs(self) -> set[tuple[int, int]]:
        source, target = self.places["source"].reshape(-1), self.places["target"].reshape(-1)
        return set(zip(source.tolist(), target.tolist(), strict=True))


@st.composite
def cases(draw: st.DrawFn, *, empty: bool = True) -> Case:
    """A link of two random parts of one shape; the target may have copies of it."""
    least = 0 if empty and draw(st.integers(0, 9)) == 0 else 1
    sizes = draw(st.lists(st.integers(least, 4), min_size=0, max_size=4))
    # A dimension of the common part may be several axes, cut otherwise on the two sides.
    joined = draw(st.booleans()) and len(sizes) > 1
    start = draw(st.integers(0, len(sizes) - 2)) if joined else 0
    ways: dict[Side, Cut] = {"source": draw(cuts(len(sizes))), "target": draw(cuts(len(sizes)))}
    copies = draw(st.integers(1, 3)) if draw(st.integers(0, 4)) == 0 else 0
    shapes: dict[Side, list[int]] = {}
    places: dict[Side, Tensor] = {}
    traced: dict[Side, Traced] = {}
    for side, cut in ways.items():
        shape = cut.whole_shape(sizes)
        lead = copies if side == "target" else 0
        shapes[side] = [*([lead] if lead else []), *shape]
        real, blank = counted(shapes[side]), Traced.all_of(Whole(side, tuple(shapes[side])))
        if lead:
            parts = [cut.part(real[n], sizes) for n in range(lead)]
            places[side] = torch.stack(parts)
            traced[side] = _under_copies(cut, blank, sizes)
        else:
            places[side], traced[side] = cut.part(real, sizes), cut.part(blank, sizes)
        if joined:
            first = start + bool(lead)
            places[side], traced[side] = places[side].flatten(first, first + 1), traced[side].flatten(first, first + 1)
    if copies:
        places["source"] = places["source"].expand(places["target"].shape)
    source, target = traced["source"].region, traced["target"].region
    link = Link("source", source.at, "target", target.at, joined_axes(source, target))
    return Case(link, shapes, places)


def _under_copies(cut: Cut, whole: Traced, sizes: Sequence[int]) -> Traced:
    """The part of a tensor whose first dimension stays."""
    part = cut.part(whole.select(0, 0), sizes)
    region = Region(part.region.at, (whole.region.dims[0], *part.region.dims))
    return Traced(whole.whole, region)


# --- links, position by position ---


def positions(ranges: Ranges) -> Iterator[Place]:
    return itertools.product(*(range(*span) for span in ranges))


def place_at(link: Link, side: Side, position: Place) -> Place:
    """Where a position of the axes is in the tensor of a side."""
    place = list(link.at(side))
    for number, (dim, step) in zip(position, link.along(side), strict=True):
        if dim >= 0:
            place[dim] += number * step
    return tuple(place)


def flat_at(case: Case, side: Side, position: Place) -> int:
    place = place_at(case.link, side, position)
    shape = case.shapes[side]
    assert all(0 <= one < size for one, size in zip(place, shape, strict=True)), (place, shape)
    return sum(one * step for one, step in zip(place, strides(shape), strict=True))


def in_box(place: Place, box: Sequence[tuple[int, int]]) -> bool:
    return all(begin <= one < end for one, (begin, end) in zip(place, box, strict=True))


@st.composite
def boxes(draw: st.DrawFn, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    found = []
    for size in shape:
        begin = draw(st.integers(0, size))
        found.append((begin, draw(st.integers(begin, size))) if draw(st.booleans()) else (0, size))
    return tuple(found)


@st.composite
def parts_of(draw: st.DrawFn, ranges: Ranges) -> Ranges:
    """Some positions, at least one of each axis."""
    found = []
    for begin, end in ranges:
        first = draw(st.integers(begin, end - 1))
        found.append((first, draw(st.integers(first + 1, end))))
    return tuple(found)
