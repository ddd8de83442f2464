"""A map under one config, cut over ranks: whether every axis divides, and no share cuts a block that has one scale."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from mapdsl.compiler import ir
from mapdsl.compiler.expand import Expansion, Match, alone, pads_of
from mapdsl.compiler.shapes import name_axes
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic, error
from mapdsl.language.source import Span
from mapdsl.runtime.part_shares import CutError, cut_parts
from mapdsl.runtime.place import uneven
from mapdsl.runtime.shares import Held, How, Ranks, all_ranks, clipped, joined, nested, share, whole


def how(axis: tree.MeshAxis) -> How:
    """How a mesh shares an axis out."""
    if axis.uneven:
        return "unevenly"
    if axis.by_ceil:
        return "by ceil"
    return "or copies" if axis.copies else "evenly"


@dataclass(frozen=True)
class Counted:
    """A side's tensors: how many are divided, each of them or as experts are, and how many every rank holds."""

    divided: int
    whole: int


@dataclass
class Sharding:
    """What some numbers of ranks, by mesh, make of a map's tensors. MapError, N113, for a mesh that the map has not."""

    expansion: Expansion
    ranks: Ranks
    _axes: dict[str, tuple[str, tree.MeshAxis]] = field(init=False, repr=False)
    _pads: dict[str, tree.Pad] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        meshes = {mesh.name: mesh for mesh in self.expansion.map.meshes}
        for name in self.ranks:
            if name not in meshes:
                known = ", ".join(f"`{mesh}`" for mesh in meshes)
                raise error("N113", f"the map has no mesh `{name}`", help=f"it has {known or 'none'}")
        self._pads = {pad.axis.name or "": pad for pad in pads_of(self.expansion.map)}
        self._axes = {axis.name: (name, axis) for name, mesh in meshes.items() for axis in mesh.axes}

    def problems(self) -> list[Diagnostic]:
        """P453 for each axis that does not divide, P454 for each tensor with a block that is cut."""
        found: dict[tuple[object, ...], Diagnostic] = {}
        for number, rule in enumerate(self.expansion.map.rules):
            for match in self._different(number):
                sizes = self.expansion.sizes(match)
                for side in ("left", "right"):
                    shapes = self.expansion.checked.layouts[number].shapes[side == "right"]
                    for tensor, shape in zip(rule.side(side), shapes, strict=True):
                        for problem in self._of_tensor(tensor, shape, sizes) if shape is not None else ():
                            # An axis is told of once, a block with each tensor.
                            where = problem.spans[:1] if problem.code == "P454" else ()
                            found.setdefault((problem.message, where), problem)
        return [*self._of_names(), *found.values()]

    def unknown(self) -> list[str]:
        """The axes to be cut whose sizes neither the config nor the map says, in the order of the map."""
        said = {*self.expansion.params, *self.expansion.map.indices}
        said |= {name for rule in self.expansion.map.rules for name in rule.enumerations}
        return [name for name in self._axes if self._ranks_of(name) > 1 and name not in said]

    def count(self, side: str) -> Counted:
        """How many tensors of a side are divided over the ranks that are given; those of wildcards are not counted."""
        divided = total = 0
        for number in range(len(self.expansion.map.rules)):
            shapes = self.expansion.checked.layouts[number].shapes[side == "right"]
            tensors = self.expansion.map.rules[number].side(side)
            are_divided = [self._is_divided(tensor, shape) for tensor, shape in zip(tensors, shapes, strict=True)]
            for match in self.expansion.matches(number):
                for named in self.expansion.names(match, side):
                    total += 1
                    divided += are_divided[named.place]
        return Counted(divided, total - divided)

    def held(self, dimension: tree.Dimension | tree.Product, sizes: Mapping[str, int], rank: Ranks) -> Held | None:
        """What one rank, by its places in the meshes, holds of a dimension.

        None where a size is not known, or an axis does not divide.
        """
        match dimension:
            case tree.Pad(axis=axis):
                return self._of_padding(axis.name or "", sizes, rank)
            case tree.Axis(size=int(size)):
                return whole(size)
            case tree.Axis(name=name):
                return self._of_axis(name or "", sizes, rank)
            case tree.Sum(terms=terms):
                parts = [self.held(term, sizes, rank) for term in terms]
                known = [part for part in parts if part is not None]
                return joined(known) if len(known) == len(parts) else None
            case tree.Product(factors=factors):
                found: Held | None = whole(1)
                for factor in factors:
                    inner = self.held(factor, sizes, rank)
                    found = None if found is None or inner is None else nested(found, inner)
                return found

    def holds(self, index: str, value: int, rank: Ranks) -> bool:
        """Whether a rank holds what has this value of an index in its name."""
        bounds = self._bounds(index) if self._ranks_of(index) > 1 else None
        if bounds is None:
            return True
        held = self._of_axis(index, {index: bounds[1] - bounds[0]}, rank)
        return held is not None and any(begin <= value - bounds[0] < end for begin, end in held.runs)

    def divides(self, dimension: tree.Dimension) -> bool:
        """Whether an axis of a dimension is divided."""
        return bool(self._cut_axes(dimension))

    # --- within ---

    def _is_divided(self, tensor: ir.Tensor, shape: tree.Shape | None) -> bool:
        in_name = name_axes(tensor.template, self.expansion.map.indices)
        in_shape = shape is not None and self._cut_axes(*shape.dimensions)
        return bool(in_shape) or any(self._ranks_of(axis) > 1 for axis in in_name)

    def _cut_axes(self, *dimensions: tree.Dimension) -> list[str]:
        """The axes of some dimensions that are divided, each once."""
        axes = {axis.name or "" for one in dimensions for axis in ir.axes_of(tree.Shape((one,), span=one.span))}
        return sorted(name for name in axes if self._ranks_of(name) > 1)

    def _ranks_of(self, axis: str) -> int:
        return self.ranks.get(self._axes[axis][0], 1) if axis in self._axes else 1

    def _of_axis(self, name: str, sizes: Mapping[str, int], rank: Ranks) -> Held | None:
        size, count = sizes.get(name), self._ranks_of(name)
        if size is None:
            return None
        if count == 1:
            return whole(size)
        if name in self._pads:  # it is rounded up, then cut
            held = self._of_padding(name, sizes, rank)
            return None if held is None else Held(size, clipped(held.runs, size))
        mesh, axis = self._axes[name]
        return share(size, count, rank.get(mesh, 0), how(axis))

    def _of_padding(self, name: str, sizes: Mapping[str, int], rank: Ranks) -> Held | None:
        """What is held of an axis with its padding."""
        size = sizes.get(name)
        if size is None:
            return None
        values = {**self.expansion.params, **alone(self.expansion.map)}
        values |= {f"size({mesh})": count for mesh, count in self.ranks.items()}
        multiple = self.expansion.evaluate(self._pads[name].multiple, values)
        rounded = -(-size // multiple) * multiple
        mesh = self._axes[name][0] if name in self._axes else ""
        return share(rounded, self._ranks_of(name), rank.get(mesh, 0))

    def _of_names(self) -> Iterator[Diagnostic]:
        """P453 for an index, of experts say, whose positions do not divide."""
        for name, (_, axis) in self._axes.items():
            bounds = self._bounds(name)
            if bounds is not None and self._of_axis(name, {name: bounds[1] - bounds[0]}, {}) is None:
                yield self._uneven(name, bounds[1] - bounds[0], axis.span)

    def _bounds(self, name: str) -> tuple[int, int] | None:
        """The first value of an index and the one behind the last, where the config alone says them."""
        indices, params = self.expansion.map.indices, self.expansion.params
        index = indices.get(name)
        if index is None or index.upper is None:
            return None
        bounds = [bound for bound in (index.lower, index.upper) if bound is not None]
        if any(used in indices for bound in bounds for used in ir.names_in(bound)):
            return None
        first = 0 if index.lower is None else self.expansion.evaluate(index.lower, params)
        return first, max(first, self.expansion.evaluate(index.upper, params))

    def _different(self, number: int) -> Iterator[Match]:
        """Matches of a rule, one for each combination of sizes; a rule with wildcards has none to list."""
        seen: set[tuple[tuple[str, int], ...]] = set()
        for match in self.expansion.matches(number):
            sizes = self.expansion.sizes(match)
            key = tuple(sorted(sizes.items()))
            if key not in seen and not self.expansion.is_empty(match, sizes):
                seen.add(key)
                yield match

    def _of_tensor(self, tensor: ir.Tensor, shape: tree.Shape, sizes: Mapping[str, int]) -> Iterator[Diagnostic]:
        cut = self._cut_axes(*shape.dimensions)
        undivided = [name for name in cut if name in sizes and self._of_axis(name, sizes, {}) is None]
        for name in undivided:
            yield self._uneven(name, sizes[name], tensor.span)
        if not undivided and cut:
            yield from self._cut_blocks(tensor, shape, sizes)

    def _uneven(self, name: str, size: int, span: Span) -> Diagnostic:
        mesh, axis = self._axes[name]
        divisors = [str(n) for n in range(1, min(size, 64) + 1) if size % n == 0]
        advice = f"take a number of ranks that divides it ({', '.join(divisors)}), or say how the shares differ: "
        message = uneven(name, size, self.ranks[mesh], mesh).message
        spans = tuple(dict.fromkeys((span, axis.span)))
        return Diagnostic("P453", message, spans, help=f"{advice}`unevenly`, `by ceil`")

    def _cut_blocks(self, tensor: ir.Tensor, shape: tree.Shape, sizes: Mapping[str, int]) -> Iterator[Diagnostic]:
        """P454 for each dimension of which a share begins or ends within what one of the formats stores as one."""
        formats = [codec for codec in self.expansion.codecs(tensor) if not codec.is_elementwise]
        for codec, (number, dimension) in itertools.product(formats, enumerate(shape.dimensions)):
            held = [whole(0)] * len(shape.dimensions)  # what is held of the others does not matter
            for held[number] in self._cut_shares(dimension, sizes):
                try:
                    cut_parts(codec, tuple(held))
                except CutError as problem:
                    yield Diagnostic("P454", str(problem), (tensor.span,), help=problem.advice)
                    break

    def _cut_shares(self, dimension: tree.Dimension, sizes: Mapping[str, int]) -> Iterator[Held]:
        """What each rank holds of a dimension that is divided, where its size is known."""
        meshes = sorted({self._axes[name][0] for name in self._cut_axes(dimension)})
        for rank in all_ranks({mesh: self.ranks[mesh] for mesh in meshes}):
            held = self.held(dimension, sizes, rank)
            if held is not None and not held.is_whole:
                yield held
