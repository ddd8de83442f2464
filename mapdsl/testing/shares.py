"""What a rank holds, by the plain reading of a map: which positions of each axis, and so which elements.

Slow, and made in another way than what it is held against: every position is asked for itself, and axes are shared out
by torch's own functions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mapdsl.compiler import ir
from mapdsl.compiler.expand import Expansion, Named, pads_of
from mapdsl.compiler.formula import evaluate
from mapdsl.compiler.sharding import how
from mapdsl.language import tree
from mapdsl.runtime.codecs.storage import BlockStorage, Storage
from mapdsl.runtime.shares import How, Ranks
from mapdsl.testing.bits import bits
from mapdsl.testing.configs import value_of
from mapdsl.testing.states import Group, Logical

PADDING = -1
"""Stands among positions for an element that is padding."""


class UnevenError(Exception):
    """An axis that does not divide over the ranks of a mesh."""

    def __init__(self, axis: str, size: int, count: int, mesh: str) -> None:
        super().__init__(axis, size, count, mesh)
        self.axis, self.size, self.count, self.mesh = axis, size, count, mesh


@dataclass(frozen=True)
class Held:
    """One tensor as a rank holds it: under which name, and which positions of each dimension, PADDING among them.

    `positions` are None where the rank holds all, as of a tensor whose rule says no shape. Values are `divided_by` the
    number of ranks where each stores a part of them.
    """

    whole: Logical
    group: Group
    name: str
    positions: tuple[Tensor, ...] | None
    divided_by: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the decoded tensor on the rank."""
        return self.whole.shape if self.positions is None else tuple(map(len, self.positions))

    @property
    def is_padded(self) -> bool:
        """Whether some of it is padding."""
        return self.positions is not None and any(bool((one == PADDING).any()) for one in self.positions)

    @property
    def part_names(self) -> dict[str, str]:
        """The names of its stored parts on the rank, each with that in the whole state."""
        codec = self.whole.codec
        names = [self.name] if codec is None or codec.kind == "raw" else codec.names(self.name)
        return dict(zip(names, self.whole.parts, strict=True))

    def of(self, tensor: Tensor) -> Tensor:
        """The elements of a whole tensor that the rank holds; zeros for padding."""
        for dim, positions in enumerate(self.positions or ()):
            tensor = tensor.index_select(dim, positions.clamp(min=0))
            words = bits(tensor).index_fill_(dim, (positions == PADDING).nonzero().flatten(), 0)
            tensor = words.view(tensor.dtype)
        return tensor if self.divided_by == 1 else (tensor.double() / self.divided_by).to(tensor.dtype)


@dataclass
class Reading:
    """A map's states over some numbers of ranks. `places` are all ranks, the last mesh fastest."""

    expansion: Expansion
    ranks: Ranks
    _shared: dict[tuple[str, int], list[Tensor] | None] = field(default_factory=dict, repr=False)
    _ranges: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        resolved = self.expansion.map
        self.axes = {axis.name: (mesh.name, how(axis)) for mesh in resolved.meshes for axis in mesh.axes}
        self.pads = {pad.axis.name or "": pad.multiple for pad in pads_of(resolved)}
        names = [mesh.name for mesh in resolved.meshes if mesh.name in self.ranks]
        counts = (range(self.ranks[name]) for name in names)
        self.places = [dict(zip(names, place, strict=True)) for place in itertools.product(*counts)]

    # --- a tensor of a state ---

    def held(self, group: Group, side: str, place: Ranks) -> Iterator[Held]:
        """What a rank holds of a group, all axes of which divide."""
        shapes = self.expansion.checked.layouts[group.match.rule].shapes[side == "right"]
        for tensor in group.tensors:
            name = self.name_on(group, tensor.named, side, place)
            if name is not None:
                shape = shapes[tensor.named.place]
                # What is dropped is on the ranks as it is in the whole.
                positions = None
                if shape is not None and group.kept:
                    positions = self._of_shape(shape, group.sizes, place)
                meshes = partial_meshes(group.rule.side(side)[tensor.named.place])
                yield Held(tensor, group, name, positions, math.prod(self.ranks.get(mesh, 1) for mesh in meshes))

    def name_on(self, group: Group, named: Named, side: str, place: Ranks) -> str | None:
        """What a rank calls a tensor; None where it does not hold it."""
        match, rule = group.match, group.rule
        if not self.is_there(rule.guard, match.values, place) or self._is_empty(group, place):
            return None
        values, choice = dict(match.values), {**match.choice, **named.position}
        for axis, position in named.position.items():
            if axis in self.expansion.map.indices:
                values[axis] = self.range_of(axis)[position]
        return self._spelled(rule.side(side)[named.place].template, values, choice, place)

    def is_there(self, guard: tree.Expr | None, values: Mapping[str, Any], place: Ranks) -> bool:
        """Whether the guard of a rule holds on a rank."""
        values = dict(values)
        for mesh in self.expansion.map.meshes:
            values[f"size({mesh.name})"] = self.ranks.get(mesh.name, 1)
            values[f"rank({mesh.name})"] = place.get(mesh.name, 0)
        return guard is None or bool(value_of(guard, values))

    def uneven(self, group: Group) -> Iterator[UnevenError]:
        """The axes of a group that do not divide, of those in its names and in the shapes of both sides."""
        layout = self.expansion.checked.layouts[group.match.rule]
        shapes = [shape for side in layout.shapes for shape in side if shape is not None]
        sizes = {axis.name: group.sizes[axis.name] for shape in shapes for axis in ir.axes_of(shape) if axis.name}
        for name in (*layout.matched, *(axis for names in layout.in_names for axis in names)):
            if name in self.axes and name in self.expansion.map.indices:
                sizes[name] = len(self.range_of(name))
        for name, size in sizes.items():
            try:
                self.share(name, size, {})
            except UnevenError as problem:
                yield problem

    def range_of(self, index: str) -> list[int]:
        """All values of an index that a mesh cuts."""
        if index not in self._ranges:
            self._ranges[index] = [values[index] for values in self.expansion.index_values([index])]
        return self._ranges[index]

    def cuts_a_block(self, held: Held, codec: Storage | None) -> bool:
        """Whether a rank's share of a tensor begins or ends within what a format stores as one."""
        if codec is None or codec.is_elementwise or held.positions is None:
            return False
        sizes = held.whole.shape
        if not isinstance(codec, BlockStorage):
            return held.shape != sizes
        dims = list(range(len(sizes)))[-2:]
        for dim, block in zip(dims, codec.block[2 - len(dims) :], strict=True):
            wanted = math.lcm(block or 1, codec.per if dim == len(sizes) - 1 else 1)
            if codec.blocks and block is None and dim == len(sizes) - 1:
                wanted = sizes[dim]
            edges = [edge for edge in _edges(held.positions[dim]) if edge != sizes[dim]]
            if any(edge % wanted for edge in edges):
                return True
        return False

    # --- positions ---

    def share(self, axis: str, size: int, place: Ranks) -> Tensor:
        """The positions of an axis that a rank holds; UnevenError where they do not divide."""
        mesh, manner = self.axes.get(axis, ("", "evenly"))
        count, number = self.ranks.get(mesh, 1), place.get(mesh, 0)
        if count == 1:
            return torch.arange(size)
        if axis in self.pads:
            padded = self._padded(axis, size, place)
            return padded[padded != PADDING]
        if (axis, size) not in self._shared:
            self._shared[axis, size] = shared_out(size, count, manner)
        shares = self._shared[axis, size]
        if shares is None:
            raise UnevenError(axis, size, count, mesh)
        return shares[number]

    def _padded(self, axis: str, size: int, place: Ranks) -> Tensor:
        """Those positions that a rank holds of an axis that is rounded up before it is cut; PADDING behind the last."""
        values = dict(self.expansion.params) | {f"size({mesh})": count for mesh, count in self.ranks.items()}
        values = {f"size({mesh.name})": 1 for mesh in self.expansion.map.meshes} | values
        multiple = evaluate(self.pads[axis], values)
        everything = torch.arange(-(-size // multiple) * multiple)
        everything[size:] = PADDING
        mesh, _ = self.axes.get(axis, ("", "evenly"))
        count = self.ranks.get(mesh, 1)
        if len(everything) % count:
            raise UnevenError(axis, len(everything), count, mesh)
        return everything.reshape(count, -1)[place.get(mesh, 0)]

    def _of_shape(self, shape: tree.Shape, sizes: Mapping[str, int], place: Ranks) -> tuple[Tensor, ...]:
        out = []
        for dimension in shape.dimensions:
            if isinstance(dimension, tree.Pad):
                name = dimension.axis.name or ""
                out.append(self._padded(name, sizes[name], place))
            else:
                out.append(self._is_held(dimension, sizes, place).nonzero().flatten())
        return tuple(out)

    def _is_held(self, part: tree.Dimension | tree.Product, sizes: Mapping[str, int], place: Ranks) -> Tensor:
        """Of each position of a dimension, whether a rank holds it: that is, of each axis the position there."""
        match part:
            case tree.Axis(name=None, size=size):
                return torch.ones(size or 0, dtype=torch.bool)
            case tree.Axis(name=str(name)):
                found = torch.zeros(sizes[name], dtype=torch.bool)
                found[self.share(name, sizes[name], place)] = True
                return found
            case tree.Sum(terms=terms):
                return torch.cat([self._is_held(term, sizes, place) for term in terms])
            case tree.Product(factors=factors):
                found = torch.ones(1, dtype=torch.bool)
                for factor in factors:
                    inner = self._is_held(factor, sizes, place)
                    found = (found[:, None] & inner[None, :]).flatten()
                return found
        raise AssertionError(part)

    # --- names ---

    def _is_empty(self, group: Group, place: Ranks) -> bool:
        """Whether the rank has no position of an axis of the group whose size the config tells."""
        layout = self.expansion.checked.layouts[group.match.rule]
        shapes = [shape for side in layout.shapes for shape in side if shape is not None]
        axes = {axis.name for shape in shapes for axis in ir.axes_of(shape) if axis.name}.union(*layout.in_names)
        known = self.expansion.sizes(group.match).keys() | {axis for names in layout.in_names for axis in names}
        # Where all is padding there is still that.
        sizes = {axis: len(self.share(axis, group.sizes[axis], place)) for axis in (axes & known) - set(self.pads)}
        return self.expansion.is_empty(group.match, sizes)

    def _spelled(
        self, template: tree.Template, values: Mapping[str, object], choice: Mapping[str, int], place: Ranks
    ) -> str | None:
        """The name on a rank; None where it has an index of which the rank does not hold this value."""
        words = []
        for part in template.parts:
            match part:
                case tree.Text(text=text):
                    words.append(text)
                case tree.EnumHole(name=name, spellings=spellings):
                    words.append(spellings[choice[name]])
                case tree.WildcardHole(name=name):
                    words.append(str(values[f"{{{name}}}"]))
                case tree.NumberHole(value=value, local=is_local):
                    first = 0
                    for index in (name for name in ir.names_in(value) if name in self.axes):
                        numbers = self.range_of(index)
                        mine = [numbers[at] for at in self.share(index, len(numbers), place).tolist()]
                        if values[index] not in mine:
                            return None
                        first = mine[0] if is_local else 0
                    words.append(str(evaluate(value, values) - first))
        return "".join(words)


def partial_meshes(tensor: ir.Tensor) -> list[str]:
    """The mesh of `as partial(tp)`, over whose ranks a value is divided."""
    uses = [use for use in tensor.codecs if use.name == "partial"]
    return [str(argument.value[0]) for use in uses for argument in use.arguments if isinstance(argument.value, tuple)]


def shared_out(size: int, count: int, manner: How) -> list[Tensor] | None:
    """The positions of an axis that each rank holds; None where they cannot be shared out so."""
    everything = torch.arange(size)
    if manner == "unevenly":
        return list(everything.tensor_split(count))
    if manner == "by ceil":
        chunks = list(everything.chunk(count)) if size else []
        return chunks + [everything[:0]] * (count - len(chunks))
    if manner == "or copies" and 0 < size < count:
        return None if count % size else list(everything.repeat_interleave(count // size).unsqueeze(1))
    return None if size % count else list(everything.reshape(count, size // count))


def _edges(positions: Tensor) -> list[int]:
    """Where runs of positions begin and end; padding behind them is no position."""
    held = positions[positions != PADDING].tolist()
    begins = [one for before, one in itertools.pairwise([None, *held]) if before is None or one != before + 1]
    ends = [one + 1 for one, after in itertools.pairwise([*held, None]) if after is None or after != one + 1]
    return [edge for edge in (*begins, *ends) if edge]
