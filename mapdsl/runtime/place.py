"""One rank among those over which meshes cut a map's axes. No torch here."""

from __future__ import annotations

from collections.abc import Mapping

from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.shares import How, padded, share

Meshes = Mapping[str, Mapping[str, How]]
"""How each axis is shared out, by mesh and axis."""


class Place:
    """Over how many ranks each mesh cuts its axes, and which of them this is.

    `meshes` say, by mesh and axis, how the axis is shared out; `noted` are, of each axis that was asked for, all
    positions and those that are held, without padding. With `counts_from_all` `{local e}` in a name counts as in a
    whole state; `counts_locally` notes that some name did not. A mesh that is not in `ranks` is one rank, whose place
    is 0. Raises ConversionError, N113, for a mesh that the map has not and a rank that there is not.
    """

    def __init__(
        self,
        meshes: Meshes,
        ranks: Mapping[str, int] | None = None,
        rank: Mapping[str, int] | None = None,
        *,
        counts_from_all: bool = False,
    ) -> None:
        self.ranks, self.rank = dict(ranks or {}), dict(rank or {})
        self.counts_from_all = counts_from_all
        self.counts_locally = False
        self.noted: dict[str, tuple[range, range]] = {}
        self._axes = {axis: (mesh, how) for mesh, axes in meshes.items() for axis, how in axes.items()}
        for mesh in (*self.ranks, *self.rank):
            if mesh not in meshes:
                known = ", ".join(f"`{name}`" for name in meshes) or "none"
                raise ConversionError("N113", f"the map has no mesh `{mesh}`; it has {known}")
            if not 0 <= self.coordinate(mesh) < self.size(mesh):
                message = f"there is no rank {self.coordinate(mesh)} of `{mesh}`: it is cut over {self.size(mesh)}"
                raise ConversionError("N113", message)

    def size(self, mesh: str) -> int:
        """Over how many ranks a mesh cuts its axes."""
        return self.ranks.get(mesh, 1)

    def coordinate(self, mesh: str) -> int:
        """The place of this rank in a mesh."""
        return self.rank.get(mesh, 0)

    def mesh_of(self, axis: str) -> str | None:
        """The mesh that cuts an axis over several ranks."""
        mesh, _ = self._axes.get(axis, ("", "evenly"))
        return mesh if self.size(mesh) > 1 else None

    def how(self, axis: str) -> How:
        """How an axis is shared out."""
        return self._axes[axis][1]

    def held(self, axis: str, positions: range) -> range:
        """Those positions of an axis that this rank holds, which are noted; see `share`."""
        held = self.share(axis, positions)
        self.noted[axis] = positions, held
        return held

    def held_padded(self, axis: str, positions: range, multiple: int) -> range:
        """Those positions that this rank holds of an axis rounded up to a multiple."""
        if multiple < 1:
            raise ConversionError("C505", f"`{axis}` cannot be padded to a multiple of {multiple}")
        held = self.share(padded(axis), range(-(-len(positions) // multiple) * multiple))
        self.noted[padded(axis)] = positions, within(held, len(positions))
        return held

    def unpadded(self, axis: str, held: range) -> range:
        """Those positions of an axis that lie in what is held of it with its padding."""
        positions, _ = self.noted[padded(axis)]
        self.noted[axis] = positions, within(held, len(positions))
        return within(held, len(positions))

    def counted_from(self, held: range, positions: range) -> int:
        """What the numbers in names count from, of what is held of some positions."""
        first = positions.start if self.counts_from_all else held.start
        self.counts_locally |= first != positions.start
        return first

    def share(self, axis: str, positions: range) -> range:
        """Those positions of an axis that this rank holds; ConversionError, P453, where they do not divide."""
        mesh, how = self._axes.get(axis, ("", "evenly"))
        if self.size(mesh) == 1:
            return positions
        found = share(len(positions), self.size(mesh), self.coordinate(mesh), how)
        if found is None:
            raise uneven(axis, len(positions), self.size(mesh), mesh)
        begin, end = found.runs[0] if found.runs else (0, 0)
        return positions[begin:end]


def within(held: range, size: int) -> range:
    """Those of some positions that come before a size."""
    return range(min(held.start, size), min(held.stop, size))


def uneven(axis: str, size: int, count: int, mesh: str) -> ConversionError:
    """P453: an axis does not divide over the ranks of a mesh."""
    name = axis.removesuffix(padded(""))
    message = f"the axis `{name}` has {size:,} positions, which do not divide over {count} ranks of `{mesh}`"
    return ConversionError("P453", message)
