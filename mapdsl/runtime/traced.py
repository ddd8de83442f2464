"""Tensors that have no elements, but know where each of theirs comes from.

A conversion that runs on them moves nothing: it leaves links between the tensors that it takes and those that it puts.
They have those methods of a tensor that compiled adapters use to move axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mapdsl.runtime.links import Factor, Region, Shape, whole_region


class Whole:
    """A tensor as a whole: one that was taken, of a `name`, or one that is being made, and the parts that fill it.

    `zeros` are parts that have to be zeros.
    """

    __slots__ = ("name", "parts", "shape", "zeros")

    def __init__(self, name: str | None, shape: Shape) -> None:
        self.name = name
        self.shape = shape
        self.parts: list[Part] = []
        self.zeros: list[Region] = []


class Part(NamedTuple):
    """A part of a tensor that is being made comes from a part of another one; a `copy` must equal what is there."""

    place: Region
    traced: Traced
    copy: bool


class Traced:
    """A part of a tensor, as a view of it."""

    __slots__ = ("region", "shape", "whole")

    # What holds tensors against each other looks at these; there are no elements to differ.
    is_meta = True
    requires_grad = False
    dtype = None

    def __init__(self, whole: Whole, region: Region, shape: Shape | None = None) -> None:
        self.whole = whole
        self.region = region
        self.shape = region.shape if shape is None else shape

    @classmethod
    def all_of(cls, whole: Whole) -> Traced:
        """All of a tensor."""
        return cls(whole, whole_region(whole.shape), whole.shape)

    @classmethod
    def empty(cls, *shape: int) -> Traced:
        """All of a tensor that is to be made."""
        return cls.all_of(Whole(None, shape))

    def new_empty(self, *shape: int) -> Traced:
        """As of tensors."""
        return Traced.empty(*shape)

    def new_zeros(self, *shape: int) -> Traced:
        """As of tensors; what nothing fills is zeros."""
        return Traced.empty(*shape)

    def copy_(self, other: Traced, *, copy: bool = False) -> Traced:
        """Note that the elements of this part come from another."""
        self.whole.parts.append(Part(self.region, other, copy))
        return self

    def has_to_be_zeros(self) -> None:
        """Note that the other side lacks this part."""
        self.whole.zeros.append(self.region)

    def only_copy(self, dims: Sequence[int]) -> Traced:
        """The first of the copies along some dimensions."""
        found = self
        for dim in sorted(dims, reverse=True):
            found = found.select(dim, 0)
        return found

    def numel(self) -> int:
        """As of tensors."""
        return math.prod(self.shape)

    # --- views ---

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Traced:
        """As of tensors."""
        at, dims = self.region
        cut = _cut(dims[dim], sizes)
        shape = (*self.shape[:dim], *sizes, *self.shape[dim + 1 :])
        return Traced(self.whole, Region(at, (*dims[:dim], *cut, *dims[dim + 1 :])), shape)

    def flatten(self, start: int, end: int) -> Traced:
        """As of tensors, without a copy."""
        at, dims = self.region
        joined = _merged(factor for dim in dims[start : end + 1] for factor in dim)
        return Traced(self.whole, Region(at, (*dims[:start], joined, *dims[end + 1 :])))

    def reshape(self, shape: Sequence[int]) -> Traced:
        """As of tensors, without a copy."""
        flat = self.flatten(0, len(self.shape) - 1) if self.shape else self.unsqueeze(0)
        return flat.unflatten(0, tuple(shape))

    def narrow(self, dim: int, start: int, length: int) -> Traced:
        """As of tensors."""
        at, dims = self.region
        inner = math.prod(factor.size for factor in dims[dim][1:])
        if not length:
            return Traced(self.whole, Region(at, _with(dims, dim, (Factor(0, 0, 1),))))
        if not dims[dim]:  # of size one
            return self
        if start % inner or length % inner:
            raise ValueError(f"positions {start} to {start + length} of a dimension are not a view of one tensor")
        first = dims[dim][0]
        moved = _moved(at, first, start // inner)
        factors = (first._replace(size=length // inner), *dims[dim][1:])
        return Traced(self.whole, Region(moved, _with(dims, dim, _merged(f for f in factors if f.size != 1))))

    def select(self, dim: int, place: int) -> Traced:
        """As of tensors."""
        at, dims = self.region
        for factor in reversed(dims[dim]):
            place, inner = divmod(place, factor.size)
            at = _moved(at, factor, inner)
        return Traced(
            self.whole, Region(at, (*dims[:dim], *dims[dim + 1 :])), (*self.shape[:dim], *self.shape[dim + 1 :])
        )

    def __getitem__(self, places: int | tuple[int | slice, ...]) -> Traced:
        found: Traced = self
        dim = 0
        for place in places if isinstance(places, tuple) else (places,):
            if isinstance(place, int):
                found = found.select(dim, place)
            else:
                dim += 1
        return found

    def unsqueeze(self, dim: int) -> Traced:
        """As of tensors."""
        at, dims = self.region
        return Traced(self.whole, Region(at, (*dims[:dim], (), *dims[dim:])))

    def expand(self, *sizes: int) -> Traced:
        """As of tensors: more dimensions before the others, along which the elements are the same."""
        copies = sizes[: len(sizes) - len(self.shape)]
        dims = tuple((Factor(size, -1, 0),) for size in copies)
        return Traced(self.whole, Region(self.region.at, (*dims, *self.region.dims)), (*copies, *self.shape))

    def permute(self, *order: int) -> Traced:
        """As of tensors."""
        at, dims = self.region
        return Traced(
            self.whole, Region(at, tuple(dims[dim] for dim in order)), tuple(self.shape[dim] for dim in order)
        )

    @property
    def T(self) -> Traced:  # noqa: N802
        """As of tensors of two dimensions."""
        return self.permute(1, 0)


def _moved(at: Shape, factor: Factor, count: int) -> Shape:
    """Where a part begins after so many positions of a factor."""
    if not count or factor.dim < 0:  # copies are all at one place
        return at
    return (*at[: factor.dim], at[factor.dim] + count * factor.step, *at[factor.dim + 1 :])


def _with(
    dims: tuple[tuple[Factor, ...], ...], dim: int, factors: tuple[Factor, ...]
) -> tuple[tuple[Factor, ...], ...]:
    return (*dims[:dim], factors, *dims[dim + 1 :])


def _merged(factors: Iterator[Factor]) -> tuple[Factor, ...]:
    """Neighbours that follow each other are one factor."""
    found: list[Factor] = []
    for factor in factors:
        last = found[-1] if found else None
        if last is not None and last.dim == factor.dim and last.step == factor.step * factor.size:
            found[-1] = Factor(last.size * factor.size, factor.dim, factor.step)
        else:
            found.append(factor)
    return tuple(found)


def _cut(factors: tuple[Factor, ...], sizes: Sequence[int]) -> list[tuple[Factor, ...]]:
    """A dimension in dimensions of some sizes."""
    if 0 in sizes:  # there are no elements that could be anywhere
        return [() if size == 1 else (Factor(size, 0, 1),) for size in sizes]
    left = list(reversed(factors))
    found = []
    for size in sizes:
        own: list[Factor] = [] if size else [Factor(0, 0, 1)]
        while size > 1:
            factor = left.pop()
            inner = factor.size // size if factor.size > size else 1
            if (factor.size % size) if inner > 1 else (size % factor.size):
                raise ValueError(f"a dimension cannot be seen in sizes {tuple(sizes)}")
            if inner > 1:
                left.append(Factor(inner, factor.dim, factor.step))
            own.append(Factor(min(size, factor.size), factor.dim, factor.step * inner))
            size //= min(size, factor.size)
        found.append(tuple(own))
    return found


class Blank:
    """A tensor of which nothing is asked but that it be there: whatever is done with it, it stays that.

    A conversion that runs on it gives names alone, in a fraction of the time.
    """

    __slots__ = ("shape",)

    def __init__(self, shape: Shape) -> None:
        self.shape = shape  # of the whole tensor, whatever part of it this would be

    is_meta = True
    is_blank = True
    dtype = None

    def _itself(self, *_: object, **__: object) -> Blank:
        return self

    def has_to_be_zeros(self) -> None:
        """Nothing is looked at."""

    def only_copy(self, *_: object) -> Blank:
        """No copies are looked at."""
        return self

    unflatten = flatten = narrow = select = unsqueeze = permute = expand = __getitem__ = copy_ = new_empty = (
        new_zeros
    ) = _itself

    @property
    def T(self) -> Blank:  # noqa: N802
        """As of tensors."""
        return self


__all__ = ["Blank", "Part", "Traced", "Whole"]
