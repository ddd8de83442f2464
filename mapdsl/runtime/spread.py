"""One side of a map as all ranks hold it, seen from one of them: what it holds of each tensor, and who holds the rest.

Only names are asked of other ranks' adapters, and those along one mesh at a time: nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

from torch import Tensor

from mapdsl.runtime.codecs.storage import Storage
from mapdsl.runtime.errors import ConversionError, some_of
from mapdsl.runtime.name_list import Listed
from mapdsl.runtime.part_shares import held_parts
from mapdsl.runtime.place import Place, uneven
from mapdsl.runtime.placements import Along, Dimensions, NoPlacementError, placements
from mapdsl.runtime.share_list import sizes_of, with_whole_names
from mapdsl.runtime.shares import Held, held_of, share, whole
from mapdsl.runtime.sizes import parse_pattern

if TYPE_CHECKING:
    from mapdsl.runtime.sharded_adapter import ShardedAdapter

Axes = Mapping[str, "tuple[str | None, tuple[Held, ...]]"]
"""By axis: the mesh that cuts it, if one does, and what is held of it at each place there."""
Ways = Mapping[str, "Along | None"]
_Known = dict[object, "Ways | NoPlacementError"]


@dataclass(frozen=True)
class Part:
    """A stored tensor of this rank. `apart` are meshes on whose ranks the map calls other tensors so, or none."""

    name: str
    role: str
    shown: Listed
    storage: Storage
    shape: tuple[int, ...]
    apart: frozenset[str]
    place: Place
    find_axes: Callable[[], Axes]
    known: _Known  # of parts that are cut alike

    @cached_property
    def axes(self) -> Axes:
        """What every rank holds of each axis."""
        return self.find_axes()

    @cached_property
    def held(self) -> Dimensions:
        """What this rank holds of each dimension."""
        return self._held({mesh: self.place.coordinate(mesh) for mesh in self.cut_by})

    @cached_property
    def cut_by(self) -> frozenset[str]:
        """The meshes that cut the tensor."""
        return frozenset(mesh for mesh, _ in self.axes.values() if mesh is not None)

    def placements(self, names: tuple[str, ...]) -> Ways:
        """How each dimension of a device mesh cuts it; P456 where torch has no placements that say so."""
        meshes = {name: self.place.size(name) for name in names if name in self.cut_by}
        key = self.role, self.storage, self.shown.pattern, tuple(self.axes.items()), tuple(meshes.items())
        if key not in self.known:
            try:
                self.known[key] = placements(meshes, self._held)
            except NoPlacementError as problem:
                self.known[key] = problem
        found = self.known[key]
        if isinstance(found, NoPlacementError):
            pattern = f" [{self.shown.pattern}]" if self.shown.pattern else ""
            message = f"no placement of a DTensor says how `{found.mesh}` cuts {self.name}{pattern}"
            order = f" after `{found.after}`: try a device mesh with `{found.after}` last" if found.after else ""
            raise ConversionError("P456", f"{message} over {self.place.size(found.mesh)} ranks{order}")
        return {name: found.get(name) for name in names}

    def _held(self, at: Mapping[str, int]) -> Dimensions:
        """What is held of each dimension, by places in some meshes; those that are not named cut nothing."""
        if self.shown.pattern is None:
            return tuple(map(whole, self.shape))
        runs = {
            axis: whole(held[0].size) if mesh is None or mesh not in at else held[at[mesh]]
            for axis, (mesh, held) in self.axes.items()
        }
        parts = held_parts(self.shown.name, self.storage, held_of(self.shown.pattern, runs))
        if self.role in parts:
            return parts[self.role]
        if at:  # it tells the shape of what one rank holds
            raise NoPlacementError(next(iter(at)))
        return (whole(len(self.shape)),)


class Spread:
    """The tensors of one side that a rank has, of `state`, and how they lie among those of all.

    Shapes of DTensors in it are those of all ranks together. Raises ConversionError where the state does not fit: R603
    for a tensor that no rule reads, R605 for a part that is missing, R606 for one of another shape; X304 where nothing
    tells how long an axis is that is not cut evenly.
    """

    def __init__(
        self, adapter: ShardedAdapter, side: str, state: Mapping[str, Tensor], is_whole: Callable[[Tensor], bool]
    ) -> None:
        self.place, self.meshes = adapter.place, adapter.MESHES
        self._state, self._is_whole = state, is_whole
        self._shares = adapter.list_shares(side, state)
        pairs = with_whole_names(adapter, side, self._shares)
        self._here = [(shown, name) for shown, name in pairs if self._shares.is_there(shown)]
        self._there = {mesh: self._along(adapter, side, mesh) for mesh, size in adapter.place.ranks.items() if size > 1}
        self._known: _Known = {}

    def _along(self, adapter: ShardedAdapter, side: str, mesh: str) -> list[tuple[Place, dict[str, Listed]]]:
        """What each rank along a mesh holds, under the names of a whole state."""
        names = dict.fromkeys(part for shown, name in self._here for part in self._shares.storage(shown).names(name))
        found = []
        for coordinate in range(self.place.size(mesh)):
            rank = {**self.place.rank, mesh: coordinate}
            other = adapter.at(self.place.ranks, rank, counts_from_all=True)
            shares = other.list_shares(side, names)
            found.append((other.place, {shown.name: shown for shown in shares.shown}))
        return found

    def parts(self) -> Iterator[Part]:
        """Every stored tensor of the state."""
        left = dict.fromkeys(self._state)
        for shown, name in self._here:
            storage = self._shares.storage(shown)
            names = self._shares.parts(shown, storage)
            for part in names.values():
                if part not in self._state:
                    raise ConversionError("R605", f"{part} is missing: it belongs to {shown.name}")
            payload = self._state[names["payload"]]
            apart = frozenset(mesh for mesh, there in self._there.items() if any(name not in one for _, one in there))
            logical = storage.logical_shape(tuple(payload.shape))
            axes = partial(self._axes, shown, name, logical, self._is_whole(payload), apart)
            for role, part in names.items():
                left.pop(part, None)
                shape = tuple(self._state[part].shape)
                yield Part(part, role, shown, storage, shape, apart, self.place, axes, self._known)
        if left:
            raise ConversionError("R603", f"no rule reads {some_of(left)}")

    # --- axes ---

    def _axes(self, shown: Listed, name: str, shape: tuple[int, ...], is_whole: bool, apart: frozenset[str]) -> Axes:
        """What every rank holds of each axis of a tensor."""
        if shown.pattern is None:
            return {}
        axes = dict.fromkeys(axis for dim in parse_pattern(shown.pattern) for _, axes in dim for axis in axes)
        meshes = ((axis, self.place.mesh_of(axis)) for axis in axes)
        cut = {axis: mesh for axis, mesh in meshes if mesh is not None and mesh not in apart}
        told = {axis: held for axis, mesh in cut.items() if (held := self._told(axis, name, mesh)) is not None}
        here = {axis: held[self.place.coordinate(cut[axis])] for axis, held in told.items()}
        known = {axis: held.size if is_whole else held.local_size for axis, held in here.items()}
        sizes = sizes_of(shown, shape, known)
        found: dict[str, tuple[str | None, tuple[Held, ...]]] = {axis: (None, (whole(n),)) for axis, n in sizes.items()}
        for axis, mesh in cut.items():
            found[axis] = mesh, told[axis] if axis in told else self._shared(shown, axis, mesh, sizes[axis], is_whole)
        return found

    def _told(self, axis: str, name: str, mesh: str) -> tuple[Held, ...] | None:
        """What each rank of a mesh holds of an axis; None where neither map nor config tell its size."""
        held = []
        for place, there in self._there[mesh]:
            size = there[name].sizes.get(axis)
            if isinstance(size, range):
                held.append(size)
            elif axis in place.noted:
                held.append(place.noted[axis][1])
            else:
                return None
        begin = min((one.start for one in held if one), default=0)
        total = max((one.stop - begin for one in held if one), default=0)
        return tuple(Held(total, ((one.start - begin, one.stop - begin),) if one else ()) for one in held)

    def _shared(self, shown: Listed, axis: str, mesh: str, size: int, is_whole: bool) -> tuple[Held, ...]:
        """The same of an axis of which just its size is known, on this rank or on all."""
        ranks, how = self.place.size(mesh), self.place.how(axis)
        if not is_whole and how != "evenly":
            message = f"{shown.name}: what one rank holds does not tell the size of `{axis}`, which is cut {how}"
            raise ConversionError("X304", f"{message}: declare it, `param {axis} = ...`")
        total = size if is_whole else size * ranks
        held = [share(total, ranks, place, how) for place in range(ranks)]
        if None in held:
            raise uneven(axis, total, ranks, mesh)
        return tuple(one for one in held if one is not None)


__all__ = ["Part", "Spread"]
