"""Sizes of axes from shapes: `(h c + g c + g c) d` against `(384, 64)` with h and g known gives c and d.

No torch here: the checks on checkpoint headers use it too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

# A dimension as a polynomial: monomials of a coefficient and the axes multiplied, sorted.
Monomial = tuple[int, tuple[str, ...]]
Polynomial = tuple[Monomial, ...]

_WORDS = re.compile(r"[A-Za-z_]\w*|\d+|[()+]")


class SizeError(ValueError):
    """A shape that a pattern does not fit.

    `code` is X305 where a size does not divide, X304 where the shape does not tell a size, R606 otherwise.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def axis_sizes(pattern: str, shape: Sequence[int], known: Mapping[str, int]) -> dict[str, int]:
    """The size of every axis of `pattern`, given the sizes of its dimensions and those known beforehand.

    Raises SizeError, restating pattern, shape and known sizes, where they contradict each other or where an axis cannot
    be found: at most one axis of a dimension may be unknown once the others are.
    """
    return _Solver([Sized("", pattern, shape)], known).run()


def joint_sizes(tensors: Sequence[Sized], known: Mapping[str, int]) -> dict[str, int]:
    """The size of every axis of some tensors that share axes; the SizeError names the tensor that does not fit."""
    return _Solver(tensors, known).run()


class Sized(NamedTuple):
    """A tensor to read sizes off: its name, the pattern that it fits, its shape."""

    name: str
    pattern: str
    shape: Sequence[int]


Size = int | range
"""The size of an axis, or the positions of it that a rank holds."""


def counted(sizes: Mapping[str, Size]) -> Mapping[str, int]:
    """Sizes of axes as numbers."""
    if any(type(size) is range for size in sizes.values()):
        return {axis: len(size) if isinstance(size, range) else size for axis, size in sizes.items()}
    return sizes  # type: ignore[return-value]


class _Solver:
    """Finds sizes, one dimension after the other; `origins` are the tensors that they were read off."""

    def __init__(self, tensors: Sequence[Sized], known: Mapping[str, int]) -> None:
        self.tensors = tensors
        self.sizes = dict(known)
        self.origins: dict[str, Sized] = {}

    def run(self) -> dict[str, int]:
        parsed = [(tensor, parse_pattern(tensor.pattern)) for tensor in self.tensors]
        for tensor, dimensions in parsed:
            if len(dimensions) != len(tensor.shape):
                raise self._error("R606", f"expected {len(dimensions)} dimensions, found {len(tensor.shape)}", tensor)
        pending = [(tensor, place, dim) for tensor, dimensions in parsed for place, dim in enumerate(dimensions)]
        progress = True
        while pending and progress:
            left = [dimension for dimension in pending if not self._settles(*dimension)]
            progress, pending = len(left) < len(pending), left
        if pending:
            raise self._error("X304", f"two axes of dimension {pending[0][1]} are unknown", pending[0][0])
        return {a: self.sizes[a] for _, dims in parsed for polynomial in dims for _, axes in polynomial for a in axes}

    def _settles(self, tensor: Sized, place: int, polynomial: Polynomial) -> bool:
        """Check a dimension of which all is known, or find the one axis that is not."""
        unknown = {axis for _, axes in polynomial for axis in axes if axis not in self.sizes}
        size = tensor.shape[place]
        if len(unknown) > 1:
            return False
        if not unknown:
            if (wanted := evaluate(polynomial, self.sizes)) != size:
                raise self._error("R606", f"expected {wanted} in dimension {place}, found {size}", tensor)
            return True
        (axis,) = unknown
        try:
            self.sizes[axis] = _solve(polynomial, size, axis, self.sizes)
        except SizeError as problem:
            raise self._error(problem.code, str(problem), tensor) from None
        self.origins[axis] = tensor
        return True

    def _error(self, code: str, message: str, tensor: Sized) -> SizeError:
        """An error with pattern, shape, and the sizes that the tensor's axes have, those read off others apart."""
        own = list(dict.fromkeys(re.findall(r"[A-Za-z_]\w*", tensor.pattern)))
        own = [axis for axis in own if axis in self.sizes and self.origins.get(axis) is not tensor]
        given = [f"{axis}={self.sizes[axis]}" for axis in own if axis not in self.origins]
        read: dict[str, list[str]] = {}
        for axis in own:
            if axis in self.origins:
                read.setdefault(self.origins[axis].name, []).append(f"{axis}={self.sizes[axis]}")
        words = [", ".join(given), *(f"{', '.join(sizes)} as in {name}" for name, sizes in read.items())]
        known = " and ".join(filter(None, words))
        name = f"{tensor.name}: " if tensor.name else ""
        fits = f"[{tensor.pattern}] against {list(tensor.shape)}{f' with {known}' if known else ''}"
        return SizeError(code, f"{name}{message}: {fits}")


def shape_of(pattern: str, sizes: Mapping[str, int]) -> tuple[int | None, ...]:
    """The shape that a pattern has under sizes; None for a dimension with an unknown axis."""
    shape: list[int | None] = []
    for polynomial in parse_pattern(pattern):
        known = all(axis in sizes for _, axes in polynomial for axis in axes)
        shape.append(evaluate(polynomial, sizes) if known else None)
    return tuple(shape)


PartialShape = tuple["int | None", ...]


def either_shape(one: PartialShape | None, other: PartialShape | None) -> PartialShape | None:
    """What is known of a shape that two tensors have, or that only one of them says."""
    if one is None or other is None or len(one) != len(other):
        return other if one is None else one
    return tuple(mine if mine is not None else theirs for mine, theirs in zip(one, other, strict=True))


def unsolved_axes(patterns: Sequence[str], known: set[str]) -> set[str]:
    """The axes that the dimensions of some tensors, all of known size, do not determine."""
    found = set(known)
    dimensions = [polynomial for pattern in patterns for polynomial in parse_pattern(pattern)]
    progress = True
    while progress:
        progress = False
        for polynomial in dimensions:
            unknown = {axis for _, axes in polynomial for axis in axes if axis not in found}
            if len(unknown) == 1 and _is_linear(polynomial, *unknown):
                found |= unknown
                progress = True
    return {axis for polynomial in dimensions for _, axes in polynomial for axis in axes} - found


@lru_cache(maxsize=4096)
def parse_pattern(pattern: str) -> tuple[Polynomial, ...]:
    """The dimensions of a pattern, each as a polynomial in its axes."""
    words = _WORDS.findall(pattern)
    dimensions = []
    place = 0
    while place < len(words):
        polynomial, place = _factor(words, place)
        dimensions.append(polynomial)
    return tuple(dimensions)


def _factor(words: list[str], place: int) -> tuple[Polynomial, int]:
    word = words[place]
    if word.isdigit():
        return ((int(word), ()),), place + 1
    if word != "(":
        return ((1, (word,)),), place + 1
    total: Polynomial = ()
    product: Polynomial = ((1, ()),)
    place += 1
    while words[place] != ")":
        if words[place] == "+":
            total, product, place = total + product, ((1, ()),), place + 1
            continue
        factor, place = _factor(words, place)
        product = tuple((a * b, tuple(sorted(x + y))) for a, x in product for b, y in factor)
    return total + product, place + 1


def evaluate(polynomial: Polynomial, sizes: Mapping[str, int]) -> int:
    """The size of a dimension whose axes are all known."""
    total = 0
    for coefficient, axes in polynomial:
        for axis in axes:
            coefficient *= sizes[axis]
        total += coefficient
    return total


def _is_linear(polynomial: Polynomial, axis: str) -> bool:
    return all(axes.count(axis) < 2 for _, axes in polynomial)


def _solve(polynomial: Polynomial, size: int, axis: str, sizes: Mapping[str, int]) -> int:
    """The one unknown axis of a dimension, which stands in it linearly."""
    if not _is_linear(polynomial, axis):
        raise SizeError("X304", f"`{axis}` is multiplied by itself")
    without = tuple(m for m in polynomial if axis not in m[1])
    rest = evaluate(without, sizes)
    factor = evaluate(tuple(m for m in polynomial if axis in m[1]), {**sizes, axis: 1})
    if factor <= 0 or size < rest or (size - rest) % factor:
        raise SizeError("X305", f"{size} {f'less {rest} ' if rest else ''}does not divide by {factor}")
    return (size - rest) // factor
