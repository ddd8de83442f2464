"""Sizes of axes from shapes: `(h c + g c + g c) d` against `(384, 64)` with h and g known gives c and d.

No torch here: the checks on checkpoint headers use it too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

# A dimension as a polynomial: monomials of a coefficient and the axes multiplied, sorted.
Monomial = tuple[int, tuple[str, ...]]
Polynomial = tuple[Monomial, ...]

_WORDS = re.compile(r"[A-Za-z_]\w*|\d+|[()+]")


class SizeError(ValueError):
    """A shape that a pattern does not fit. `code` is X305 where a size does not divide, R606 otherwise."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def axis_sizes(pattern: str, shape: Sequence[int], known: Mapping[str, int]) -> dict[str, int]:
    """The size of every axis of `pattern`, given the sizes of its dimensions and those known beforehand.

    Raises SizeError, restating pattern, shape and known sizes, where they contradict each other or where an axis cannot
    be found: at most one axis of a dimension may be unknown once the others are.
    """
    dimensions = parse_pattern(pattern)
    context = _context(pattern, shape, known)
    if len(dimensions) != len(shape):
        raise SizeError("R606", f"expected {len(dimensions)} dimensions, found {len(shape)}: {context}")
    sizes = dict(known)
    open_dimensions = dict(enumerate(dimensions))
    progress = True
    while open_dimensions and progress:
        progress = False
        for place, polynomial in list(open_dimensions.items()):
            unknown = {axis for _, axes in polynomial for axis in axes if axis not in sizes}
            if len(unknown) > 1:
                continue
            if unknown:
                axis = unknown.pop()
                sizes[axis] = _solve(polynomial, shape[place], axis, sizes, context)
            elif evaluate(polynomial, sizes) != shape[place]:
                wanted = evaluate(polynomial, sizes)
                raise SizeError("R606", f"expected {wanted} in dimension {place}, found {shape[place]}: {context}")
            del open_dimensions[place]
            progress = True
    if open_dimensions:
        place = min(open_dimensions)
        raise SizeError("R606", f"two axes of dimension {place} are unknown: {context}")
    return {axis: sizes[axis] for polynomial in dimensions for _, axes in polynomial for axis in axes}


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


def _solve(polynomial: Polynomial, size: int, axis: str, sizes: Mapping[str, int], context: str) -> int:
    """The one unknown axis of a dimension, which stands in it linearly."""
    if not _is_linear(polynomial, axis):
        raise SizeError("R606", f"`{axis}` is multiplied by itself: {context}")
    without = tuple(m for m in polynomial if axis not in m[1])
    rest = evaluate(without, sizes)
    factor = evaluate(tuple(m for m in polynomial if axis in m[1]), {**sizes, axis: 1})
    if factor <= 0 or size < rest or (size - rest) % factor:
        raise SizeError("X305", f"{size} {f'less {rest} ' if rest else ''}does not divide by {factor}: {context}")
    return (size - rest) // factor


def _context(pattern: str, shape: Sequence[int], known: Mapping[str, int]) -> str:
    axes = dict.fromkeys(re.findall(r"[A-Za-z_]\w*", pattern))
    mentioned = [f"{axis}={known[axis]}" for axis in axes if axis in known]
    given = f" with {', '.join(mentioned)}" if mentioned else ""
    return f"[{pattern}] against {list(shape)}{given}"
