"""The reference interpreter's elements: where each number of a piece lies, and moving it, one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mapdsl.compiler import ir
from mapdsl.compiler.shapes import Layout, Piece
from mapdsl.language import tree

if TYPE_CHECKING:
    from tests.helpers.reference import Reference

Values = dict[str, Any]
State = dict[str, Tensor]
LEFT, RIGHT = 0, 1


class ReferenceProblem(Exception):
    """The state does not fit the map; `code` as in the catalogue."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclass
class Match:
    """One match of a rule: values of the indices and positions of the enumerations that stay in names."""

    rule: ir.Rule
    layout: Layout
    values: Values
    holds: bool


def move(reference: Reference, match: Match, source: int, state: State, made: State) -> None:
    """Move every element of every piece of a match."""
    layout, rule, target = match.layout, match.rule, 1 - source
    named = [[list(reference._names(match, side, tensor)) for tensor in rule.sides[side]] for side in (LEFT, RIGHT)]
    if not layout.pieces:
        made[named[target][0][0][0]] = state[named[source][0][0][0]]
        return
    known = []
    for operand, shape in zip(named[source], layout.shapes[source], strict=True):
        assert shape is not None
        for name, _ in operand:
            if len(shape.dimensions) != state[name].ndim:
                raise ReferenceProblem("R606", name)
            known.append((shape, tuple(state[name].shape)))
    sizes = reference._sizes(match, known, {})
    for shape, found in known:
        if tuple(extent(d, sizes) for d in shape.dimensions) != found:
            raise ReferenceProblem("R606", str(found))
    dtype = state[named[source][0][0][0]].dtype
    for operand, shape in zip(named[target], layout.shapes[target], strict=True):
        assert shape is not None
        for name, _ in operand:
            made[name] = torch.zeros([extent(d, sizes) for d in shape.dimensions], dtype=dtype)
    for pair in layout.pieces:
        _move_piece(reference, match, source, pair, named, sizes, state, made)


def _move_piece(
    reference: Reference,
    match: Match,
    source: int,
    pair: tuple[Piece, Piece],
    named: list[list[list[tuple[str, Values]]]],
    sizes: Values,
    state: State,
    made: State,
) -> None:
    ends = []
    for side in (source, 1 - source):
        piece = pair[side]
        shape = match.layout.shapes[side][piece.tensor]
        assert shape is not None
        by_position = {_key(values): name for name, values in named[side][piece.tensor]}
        absorbed = list(named[side][piece.tensor][0][1])
        ends.append((piece, shape, by_position, absorbed))
    axes: dict[str, range] = {}
    for piece, _, _, absorbed in ends:
        for axis in absorbed:
            axes[axis] = reference._range(match.rule, axis, match.values)
        for axis in piece.axes:
            name = axis.rstrip("'")
            axes.setdefault(axis, range(int(name) if name.isdigit() else sizes[name]))
    starts = dict.fromkeys(axes, 0)
    for axis in axes:
        if axis in reference.map.indices and any(axis in absorbed for *_, absorbed in ends):
            starts[axis] = axes[axis].start
    seen: dict[tuple[str, tuple[int, ...]], Any] = {}
    for position in itertools.product(*axes.values()):
        chosen = dict(zip(axes, position, strict=True))
        counted = {a: n - starts[a] for a, n in chosen.items()}
        places = []
        for piece, shape, by_position, absorbed in ends:
            name = by_position[_key({a: chosen[a] for a in absorbed})]
            names = iter(piece.axes)
            path = iter(piece.path)
            place = tuple(_offset(d, names, path, counted, sizes) for d in shape.dimensions)
            places.append((name, place))
        (here, at), (there, to) = places
        value = state[here][at]
        if (there, to) in seen and not torch.equal(seen[there, to], value):
            raise ReferenceProblem("R602", here)
        seen[there, to] = value
        made[there][to] = value


def _key(values: Values) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(values.items()))


def _offset(
    node: tree.Dimension | tree.Product, names: Iterator[str], path: Iterator[int], position: Values, sizes: Values
) -> int:
    """The place along one dimension of an element of a piece; `names` gives its axes in order."""
    match node:
        case tree.Axis(size=1):
            return 0
        case tree.Axis() | tree.Pad():
            return int(position[next(names)])
        case tree.Sum(terms=terms):
            taken = next(path)
            return sum(extent(term, sizes) for term in terms[:taken]) + _offset(
                terms[taken], names, path, position, sizes
            )
        case tree.Product(factors=factors):
            place = 0
            for factor in factors:
                place = place * extent(factor, sizes) + _offset(factor, names, path, position, sizes)
            return place
    raise AssertionError(node)


def extent(node: tree.Dimension | tree.Product, sizes: Mapping[str, int]) -> int:
    match node:
        case tree.Axis(name=str(name)):
            return sizes[name]
        case tree.Axis(size=int(size)):
            return size
        case tree.Pad(axis=axis):
            return extent(axis, sizes)
        case tree.Sum(terms=terms):
            return sum(extent(term, sizes) for term in terms)
        case tree.Product(factors=factors):
            total = 1
            for factor in factors:
                total *= extent(factor, sizes)
            return total
    raise AssertionError(node)


def axes_of_dimension(node: tree.Dimension | tree.Product) -> set[str]:
    return {axis.name for axis in ir.axes_of(tree.Shape((node,), span=node.span)) if axis.name}  # type: ignore[arg-type]
