"""What one rank holds of the tensors of a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from mapdsl.compiler import ir
from mapdsl.compiler.sharding import Sharding
from mapdsl.explain.trace import Reading
from mapdsl.language import tree
from mapdsl.language.unparse import unparse_shape


@dataclass(frozen=True)
class Rank:
    """A map cut over ranks, and the place of one rank in each mesh; at place 0 where none is said."""

    sharding: Sharding
    places: Mapping[str, int]

    def __str__(self) -> str:
        return ", ".join(f"{mesh} {self.places.get(mesh, 0)} of {count}" for mesh, count in self.sharding.ranks.items())

    def lines(
        self, reading: Reading, sizes: Mapping[str, int], name_of: Callable[[ir.Tensor], str]
    ) -> Iterator[tuple[str, str]]:
        """A line for each tensor of both sides: which positions of each dimension the rank holds."""
        yield "on rank", str(self)
        tensors = [(t, side) for side in ("left", "right") for t in enumerate(reading.rule.side(side))]
        for (place, tensor), side in tensors:
            shape = reading.layout.shapes[side == "right"][place]
            where = getattr(self.sharding.expansion.map, side)
            yield "", f"{where}: {name_of(tensor)}{self._held(shape, reading, sizes)}"

    def _held(self, shape: tree.Shape | None, reading: Reading, sizes: Mapping[str, int]) -> str:
        for index, value in reading.values.items():
            if not self.sharding.holds(index, value, self.places):
                return ", not here"
        if shape is None or not any(map(self.sharding.divides, shape.dimensions)):
            return ", all of it"
        return f"[{', '.join(self._dimension(dimension, sizes) for dimension in shape.dimensions)}]"

    def _dimension(self, dimension: tree.Dimension, sizes: Mapping[str, int]) -> str:
        if not self.sharding.divides(dimension):
            return ":"
        held = self.sharding.held(dimension, sizes, self.places)
        if held is None:
            return f"a share of {unparse_shape(tree.Shape((dimension,), span=dimension.span))[1:-1]}"
        return " + ".join(f"{begin}:{end}" for begin, end in held.runs) or "nothing"
