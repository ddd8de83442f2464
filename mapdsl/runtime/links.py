"""Which elements of two tensors are the same: a link joins a part of one to a part of the other. No torch here.

Whatever a rule does but decode is a permutation of elements, in which every axis keeps one step in one dimension of
either tensor. So a few numbers tell where the elements of any box of one tensor lie in the other, without a list of
them: a rank's shard of one side can be found on the other side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from mapdsl.runtime.codecs.storage import Box
from mapdsl.runtime.shares import Run, merged

Shape = tuple[int, ...]
Ranges = tuple[tuple[int, int], ...]
"""The first position and the one behind the last, of each axis of a link."""

Side = Literal["source", "target"]


class Along(NamedTuple):
    """A dimension of a tensor, and how far apart in it neighbouring positions of an axis are; dimension -1: not there,
    all positions have the same elements.
    """

    dim: int
    step: int


class Axis(NamedTuple):
    """So many positions that lie along a dimension of the source and of the target."""

    size: int
    source: Along
    target: Along


class Link(NamedTuple):
    """The positions of some axes, from `source_at` on in one tensor, are those from `target_at` on in another.

    The elements of a `copy` are in the target already, and must equal what is there.
    """

    source: str
    source_at: Shape
    target: str
    target_at: Shape
    axes: tuple[Axis, ...]
    copy: bool = False

    def at(self, side: Side) -> Shape:
        """Where the part begins in the tensor of a side."""
        return self.source_at if side == "source" else self.target_at

    def along(self, side: Side) -> tuple[Along, ...]:
        """Where the axes lie in the tensor of a side."""
        return tuple(axis.source if side == "source" else axis.target for axis in self.axes)

    @property
    def everything(self) -> Ranges:
        """All positions."""
        return tuple((0, axis.size) for axis in self.axes)

    @property
    def is_rename(self) -> bool:
        """Whether the part begins where its tensors do, and no axis moves: of whole tensors just the names differ."""
        moved = any(axis.source != axis.target or axis.source.step != 1 for axis in self.axes)
        return not (moved or self.copy or any(self.source_at) or any(self.target_at))

    @property
    def is_view(self) -> bool:
        """Whether the part, as the target has it, is a view of the source: no dimension there needs two strides."""
        steps: dict[int, list[tuple[int, int, Along]]] = {}
        for axis in self.axes:
            if axis.size > 1:
                steps.setdefault(axis.target.dim, []).append((axis.target.step, axis.size, axis.source))
        for of_one in steps.values():
            of_one.sort(reverse=True)
            for (_, _, outer), (_, size, inner) in itertools.pairwise(of_one):
                if outer.dim != inner.dim or outer.step != size * inner.step:
                    return False
        return True

    def within(self, side: Side, box: Box, ranges: Ranges | None = None) -> list[Ranges]:
        """Those positions that lie in a box of the tensor of a side: as few products of ranges as make them up."""
        found = [self.everything if ranges is None else ranges]
        along, at = self.along(side), self.at(side)
        for dim, (begin, end) in enumerate(box):
            own = sorted((n for n, one in enumerate(along) if one.dim == dim), key=lambda n: -along[n].step)
            steps = [(n, along[n].step) for n in own]
            found = [part for one in found for part in _within(one, steps, begin - at[dim], end - at[dim])]
        return [one for one in found if all(begin < end for begin, end in one)]

    def box(self, side: Side, ranges: Ranges) -> Box:
        """The smallest box of the tensor of a side that has the positions of some ranges in it."""
        begins, ends = list(self.at(side)), [place + 1 for place in self.at(side)]
        for (begin, end), (dim, step) in zip(ranges, self.along(side), strict=True):
            if dim >= 0:
                begins[dim] += begin * step
                ends[dim] += (end - 1) * step
        return tuple(zip(begins, ends, strict=True))

    def runs(self, side: Side, ranges: Ranges) -> tuple[tuple[Run, ...], ...]:
        """The positions in each dimension of the tensor of a side that some ranges have."""
        found = [[(place, place + 1)] for place in self.at(side)]
        axes = zip(ranges, self.along(side), strict=True)
        for (begin, end), (dim, step) in sorted(axes, key=lambda one: one[1].step):
            if dim >= 0 and step == found[dim][0][1] - found[dim][0][0] and len(found[dim]) == 1:
                ((first, stop),) = found[dim]
                found[dim] = [(first + begin * step, stop + (end - 1) * step)]
            elif dim >= 0:
                shifts = [place * step for place in range(begin, end)]
                found[dim] = [(first + shift, stop + shift) for shift in shifts for first, stop in found[dim]]
        return tuple(merged(sorted(runs)) for runs in found)


def elements(box: Box) -> int:
    """How many elements a box has."""
    return math.prod(end - begin for begin, end in box)


def whole_box(shape: Iterable[int]) -> Box:
    """The box that is all of a tensor."""
    return tuple((0, size) for size in shape)


def boxes_of(runs: Sequence[Sequence[Run]]) -> Iterator[tuple[Box, Shape]]:
    """The boxes that runs in each dimension make, and where each begins where all of them are put together."""
    columns = []
    for column in runs:
        starts = [0, *itertools.accumulate(end - begin for begin, end in column)]
        columns.append(list(zip(column, starts, strict=False)))
    for cells in itertools.product(*columns):
        yield tuple(run for run, _ in cells), tuple(start for _, start in cells)


def common(one: Box, other: Box) -> Box | None:
    """What two boxes have in common; None for nothing."""
    found = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return found if all(begin < end for begin, end in found) else None


def _within(ranges: Ranges, steps: Sequence[tuple[int, int]], begin: int, end: int) -> Iterator[Ranges]:
    """Those positions of some ranges whose sum of steps, the longest first, is from `begin` to before `end`."""
    if not steps:
        if begin <= 0 < end:
            yield ranges
        return
    (axis, step), rest = steps[0], steps[1:]
    first, stop = ranges[axis]
    least = sum(ranges[n][0] * one for n, one in rest)
    most = sum((ranges[n][1] - 1) * one for n, one in rest)
    touched = range(max(first, -(-(begin - most) // step)), min(stop, (end - 1 - least) // step + 1))
    full = range(max(first, -(-(begin - least) // step)), min(stop, (end - 1 - most) // step + 1))
    if full:
        yield _with(ranges, axis, full.start, full.stop)
    for place in touched:
        if place not in full:
            yield from _within(_with(ranges, axis, place, place + 1), rest, begin - place * step, end - place * step)


def _with(ranges: Ranges, axis: int, begin: int, end: int) -> Ranges:
    return (*ranges[:axis], (begin, end), *ranges[axis + 1 :])


# --- making links ---


class Factor(NamedTuple):
    """So many positions, so far apart in a dimension of a tensor."""

    size: int
    dim: int
    step: int


Dims = tuple[tuple[Factor, ...], ...]
"""What each dimension of a part is made of, the slowest first."""


class Region(NamedTuple):
    """A part of a tensor: where it begins there, and its dimensions."""

    at: Shape
    dims: Dims

    @property
    def shape(self) -> Shape:
        """The shape of the part."""
        return tuple(math.prod(factor.size for factor in dim) for dim in self.dims)


@lru_cache(maxsize=4096)
def whole_region(shape: Shape) -> Region:
    """All of a tensor."""
    dims = (((Factor(size, dim, 1),) if size != 1 else ()) for dim, size in enumerate(shape))
    return Region((0,) * len(shape), tuple(dims))


def joined_axes(source: Region, target: Region) -> tuple[Axis, ...]:
    """The axes of a link between parts of one shape. The target may have more dimensions, which come first: copies."""
    lead = len(target.dims) - len(source.dims)
    found = [Axis(f.size, Along(-1, 0), Along(f.dim, f.step)) for dim in target.dims[:lead] for f in dim]
    for mine, theirs in zip(source.dims, target.dims[lead:], strict=True):
        found += _paired(list(mine), list(theirs))
    return tuple(_merged(found))


def _paired(source: list[Factor], target: list[Factor]) -> Iterator[Axis]:
    """The factors of one dimension on both sides, cut until each has its counterpart."""
    source.reverse()
    target.reverse()
    while source and target:
        one, other = source.pop(), target.pop()
        size = math.gcd(one.size, other.size) if one.size != other.size else one.size
        if size not in (one.size, other.size):
            raise ValueError(f"{one.size} and {other.size} positions have no common cut")
        for factor, rest in ((one, source), (other, target)):
            if factor.size != size:
                rest.append(Factor(factor.size // size, factor.dim, factor.step))
        yield Axis(size, _outer(one, size), _outer(other, size))


def _outer(factor: Factor, size: int) -> Along:
    """The outermost positions of a factor."""
    return Along(factor.dim, factor.step * (factor.size // size if size else 1))


def _merged(axes: list[Axis]) -> Iterator[Axis]:
    """Neighbours that follow each other on both sides are one axis."""
    for _, group in itertools.groupby(axes, key=lambda axis: (axis.source.dim, axis.target.dim)):
        found: list[Axis] = []
        for axis in group:
            last = found[-1] if found else None
            if last and all(a.step == b.step * axis.size for a, b in zip(last[1:], axis[1:], strict=True)):
                found[-1] = Axis(last.size * axis.size, axis.source, axis.target)
            else:
                found.append(axis)
        yield from found


__all__ = [
    "Along",
    "Axis",
    "Box",
    "Dims",
    "Factor",
    "Link",
    "Ranges",
    "Region",
    "Side",
    "boxes_of",
    "common",
    "elements",
    "joined_axes",
    "whole_box",
    "whole_region",
]
