"""Where every element belongs, by the plain reading of a rule: slow, and made in another way than compiled adapters.

A piece of a tensor becomes an array with one dimension an axis, those that live in names first. The piece on the other
side is the same array with its axes in another order, and so each element is told where it goes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mapdsl.compiler import ir
from mapdsl.compiler.shapes import Layout, Piece, name_axes
from mapdsl.language import tree

# A tensor of a match: its place on its side, and the positions of the axes that its name absorbs.
Place = tuple[int, tuple[tuple[str, int], ...]]
Tensors = Mapping[Place, Tensor]


class Placement:
    """The pieces of one match of a rule, under the sizes of all axes."""

    def __init__(self, rule: ir.Rule, layout: Layout, indices: dict[str, ir.Index], sizes: Mapping[str, int]) -> None:
        self.rule, self.layout, self.indices, self.sizes = rule, layout, indices, sizes

    def moved(self, tensors: Tensors, wanted: Mapping[Place, tuple[int, ...]], source: int) -> dict[Place, Tensor]:
        """The tensors of the other side, of the `wanted` shapes. Elements are given as integers."""
        if self.layout.is_rename:
            ((_, tensor),) = tensors.items()
            return dict.fromkeys(wanted, tensor)
        dtype = next(iter(tensors.values())).dtype
        made = {place: torch.zeros(shape, dtype=dtype) for place, shape in wanted.items()}
        for pair in self.layout.pieces:
            axes, array = self.gather(tensors, pair[source], source)
            self.scatter(made, pair[1 - source], 1 - source, axes, array)
        return made

    def gather(self, tensors: Tensors, piece: Piece, side: int) -> tuple[list[str], Tensor]:
        """A piece as an array, and its axes in order."""
        absorbed = self.absorbed(piece, side)
        views = [self.view(tensors[place], piece, side) for place in self.places(piece, side, tensors)]
        counts = [self.sizes[axis] for axis in absorbed]
        return [*absorbed, *piece.axes], torch.stack(views).reshape([*counts, *views[0].shape])

    def scatter(self, made: Tensors, piece: Piece, side: int, axes: list[str], array: Tensor) -> None:
        """Write an array to its places; axes that it lacks are copies, those that only it has are equal throughout."""
        absorbed = self.absorbed(piece, side)
        wanted = [*absorbed, *piece.axes]
        for axis in [axis for axis in axes if axis not in wanted]:
            array, axes = array.select(axes.index(axis), 0), [a for a in axes if a != axis]
        shared = [axis for axis in wanted if axis in axes]
        array = array.permute([axes.index(axis) for axis in shared])
        for number, axis in enumerate(wanted):
            if axis not in axes:
                array = array.unsqueeze(number)
        for place in self.places(piece, side, made):
            position = dict(place[1])
            part = array
            for axis in absorbed:
                part = part[position[axis] if axis in axes else 0]
            self.view(made[place], piece, side).copy_(part)

    def absorbed(self, piece: Piece, side: int) -> list[str]:
        """The axes that the names of a piece's tensor absorb."""
        template = self.rule.sides[side][piece.tensor].template
        return [a for a in name_axes(template, self.indices) if a in self.layout.in_names[side]]

    def places(self, piece: Piece, side: int, tensors: Tensors) -> list[Place]:
        """The tensors that a piece lies in, in order of the positions."""
        absorbed = self.absorbed(piece, side)
        positions = itertools.product(*(range(self.sizes[axis]) for axis in absorbed))
        places = [(piece.tensor, tuple(sorted(zip(absorbed, p, strict=True)))) for p in positions]
        return [place for place in places if place in tensors]

    def view(self, tensor: Tensor, piece: Piece, side: int) -> Tensor:
        """The part of a tensor that a piece is, one dimension an axis of the shape."""
        shape = self.layout.shapes[side][piece.tensor]
        assert shape is not None  # a rule with pieces has all shapes
        at, path = 0, list(piece.path)
        for dimension in shape.dimensions:
            tensor, at = self._cut(tensor, at, dimension, path)
        return tensor

    def _cut(self, tensor: Tensor, at: int, part: tree.Dimension | tree.Product, path: list[int]) -> tuple[Tensor, int]:
        match part:
            case tree.Axis(size=1):
                return tensor.select(at, 0), at
            case tree.Pad(axis=axis):
                return tensor.narrow(at, 0, self._size(axis)), at + 1
            case tree.Sum(terms=terms):
                term = path.pop(0)
                before = sum(self._size(t) for t in terms[:term])
                return self._cut(tensor.narrow(at, before, self._size(terms[term])), at, terms[term], path)
            case tree.Product(factors=factors):
                sizes = [self._size(factor) for factor in factors]
                tensor = tensor.unflatten(at, sizes)  # type: ignore[no-untyped-call]
                for factor in factors:
                    tensor, at = self._cut(tensor, at, factor, path)
                return tensor, at
        return tensor, at + 1

    def _size(self, part: tree.Dimension | tree.Product) -> int:
        match part:
            case tree.Axis(name=str(name)):
                return self.sizes[name]
            case tree.Axis(size=int(size)):
                return size
            case tree.Product(factors=factors):
                return math.prod(self._size(factor) for factor in factors)
            case tree.Sum(terms=terms):
                return sum(self._size(term) for term in terms)
            case tree.Pad(axis=axis):
                return self._size(axis)
        raise AssertionError(part)
