"""From ranks to a rank: which boxes of which stored tensors make up those that one rank is to hold.

Nothing is moved here, and of tensors only names, dtypes and shapes are looked at. A rank's tensors are those that its
adapter reads (`ShareList`); what it holds of each dimension follows from the pattern of its shape (`held_of`), and
boxes from that (`assembly`). Sizes that no config tells are read off the shapes of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from mapdsl.runtime.codecs.storage import Box, Storage
from mapdsl.runtime.errors import ConversionError, some_of
from mapdsl.runtime.name_list import Listed
from mapdsl.runtime.part_shares import held_parts
from mapdsl.runtime.partial import ranks_of
from mapdsl.runtime.place import Place
from mapdsl.runtime.share_list import ShareList, listed, sizes_of, with_whole_names
from mapdsl.runtime.shares import Assembly, Dimensions, Held, Ranks, all_ranks, assembly, held_of, padded, whole
from mapdsl.runtime.sizes import counted

if TYPE_CHECKING:
    from mapdsl.runtime.sharded_adapter import ShardedAdapter

States = Sequence[Mapping[str, Tensor]]


class Source(NamedTuple):
    """A box of a stored tensor of one rank."""

    rank: int
    name: str
    source_box: Box
    box: Box


@dataclass(frozen=True)
class Made:
    """A stored tensor that a rank is to hold.

    `sources` are boxes that fill it, but for padding, which is zeros; `replicas` are others that must equal what fills
    it. `like` is one of the tensors that it comes from, by rank and name: its dtype is that of this one. Where `value`
    is given it is that, and comes from nowhere. `scale` is what it is to be multiplied with, and divided by.
    """

    shape: tuple[int, ...]
    like: tuple[int, str]
    sources: tuple[Source, ...] = ()
    replicas: tuple[Source, ...] = ()
    value: tuple[int, ...] | None = None
    scale: tuple[int, int] = (1, 1)

    @property
    def is_filled(self) -> bool:
        """Whether the sources fill all of it: nothing of it is padding."""
        filled = sum(math.prod(end - begin for begin, end in source.box) for source in self.sources)
        return filled == math.prod(self.shape)


@dataclass
class Holder:
    """What one rank holds of one tensor."""

    rank: int
    shown: Listed
    storage: Storage
    sizes: Mapping[str, int]
    shape: tuple[int, ...]
    parts: Mapping[str, str]  # the names of its parts in the rank's state, by role


def places(adapter: ShardedAdapter, ranks: Ranks) -> Iterator[Ranks]:
    """Every rank, the last mesh fastest, in the order in which states of ranks are given."""
    return all_ranks({mesh: ranks[mesh] for mesh in dict.fromkeys((*adapter.MESHES, *ranks)) if mesh in ranks})


class Resharding:
    """One side of a map, held by some ranks, seen from any rank of others.

    `states` are those of all `ranks`, in the order of `places`. Raises ConversionError where they do not fit the map or
    each other: R603 for a tensor that no rule reads, R605 for one that a rank lacks, R606 for one of another shape,
    P453 and P454 where it cannot be cut so.
    """

    def __init__(self, adapter: ShardedAdapter, side: str, states: States, ranks: Ranks) -> None:
        self._adapter, self._side, self._states = adapter, side, states
        self._places = list(places(adapter, ranks))
        if len(self._places) != len(states):
            message = f"{len(states)} states were given, {dict(ranks)} are {len(self._places)} ranks"
            raise ConversionError("N113", message)
        self._source_places: list[Place] = []
        self._holders: dict[str, list[Holder]] = {}
        self._lacking: dict[str, str] = {}  # what some rank does not have
        self._any_wild = False
        self._named: set[str] = set()  # by the targets so far
        for number, place in enumerate(self._places):
            self._read(number, adapter.at(ranks, place))
        if self._any_wild:
            self._look_for_what_wildcards_carry(ranks)
        self._cut: dict[str, Cut] = {name: self._cut_of(name, holders) for name, holders in self._holders.items()}
        self._names = dict.fromkeys(part for cut in self._cut.values() for part in cut.whole_parts.values())

    def target(self, ranks: Ranks, rank: Ranks) -> dict[str, Made]:
        """The stored tensors of one of other ranks, by name."""
        adapter = self._adapter.at(ranks, rank)
        found: dict[str, Made] = {}
        for shown, name in listed(adapter, self._side, self._names):
            self._named.add(name)
            if name in self._cut and not _is_nothing(shown, adapter.place):
                found |= self._cut[name].made(shown, adapter.place)
        return found

    def dropped(self) -> list[str]:
        """The tensors, as a whole state calls them, that no target so far is to hold: guards of the map say so."""
        return [name for name in self._cut if name not in self._named]

    # --- what ranks hold ---

    def _read(self, number: int, adapter: ShardedAdapter) -> None:
        """Note what one rank holds."""
        state = self._states[number]
        shares = adapter.list_shares(self._side, state)
        self._any_wild = self._any_wild or shares.any_wild
        left = dict.fromkeys(state)
        for shown, name in with_whole_names(adapter, self._side, shares):
            holder = self._holder(number, shown, shares)
            if holder is None and not shown.is_empty:
                self._lacking.setdefault(name, f"{shown.name} of {told(adapter.place.rank)}")
            if holder is not None:
                for part in holder.parts.values():
                    left.pop(part, None)
                self._holders.setdefault(name, []).append(holder)
        self._source_places.append(adapter.place)
        if left:
            raise ConversionError("R603", f"no rule reads {some_of(left)} of {told(adapter.place.rank)}")

    def _look_for_what_wildcards_carry(self, ranks: Ranks) -> None:
        """Note what a wildcard carries on one rank and not on another, whose own names do not tell of it."""
        everything = {
            part: None for name, found in self._holders.items() for part in found[0].storage.part_names(name).values()
        }
        holding = {name: {holder.rank for holder in found} for name, found in self._holders.items()}
        for number, place in enumerate(self._places):
            for shown, name in listed(self._adapter.at(ranks, place), self._side, everything):
                is_lacking = name in holding and number not in holding[name] and shown.pattern is not None
                if is_lacking and not shown.is_empty:
                    self._lacking.setdefault(name, f"{shown.name} of {told(place)}")

    def _holder(self, number: int, shown: Listed, shares: ShareList) -> Holder | None:
        """What a rank holds of a tensor; None where it is not there."""
        if not shares.is_there(shown):
            return None
        storage = shares.storage(shown)
        parts = shares.parts(shown, storage)
        state = self._states[number]
        for part in parts.values():
            if part not in state:
                raise ConversionError("R605", f"{part} of {told(self._places[number])} is missing")
        shape = storage.logical_shape(tuple(state[parts["payload"]].shape))
        return Holder(number, shown, storage, sizes_of(shown, shape), shape, parts)

    def _cut_of(self, name: str, holders: list[Holder]) -> Cut:
        first = holders[0]
        if name in self._lacking:
            raise ConversionError("R605", f"{self._lacking[name]} is missing, {told(self._places[first.rank])} has it")
        for other in holders[1:]:
            if (other.storage, other.shown.pattern) != (first.storage, first.shown.pattern):
                message = f"{name} is stored as {first.storage.name} by one rank, as {other.storage.name} by another"
                raise ConversionError("R606", message)
            self._check_dtypes(first, other)
        return Cut(name, holders, self._source_places)

    def _check_dtypes(self, first: Holder, other: Holder) -> None:
        """R606 where a part has another dtype on another rank: their bytes cannot be put together."""
        for role, part in other.parts.items():
            mine, theirs = self._states[first.rank][first.parts[role]].dtype, self._states[other.rank][part].dtype
            if mine != theirs:
                message = f"{part} of rank {other.rank} is {theirs}, of rank {first.rank} {mine}"
                raise ConversionError("R606", f"{first.parts[role]}: {message}")


@dataclass
class Cut:
    """One tensor of a side, by what each rank holds of it."""

    name: str
    holders: Sequence[Holder]
    places: Sequence[Place]
    axes: dict[str, int] = field(init=False)
    _held: list[Mapping[str, Dimensions]] = field(init=False)

    def __post_init__(self) -> None:
        pattern = self.holders[0].shown.pattern
        widths = {axis: self._widths(axis) for axis in self.holders[0].sizes}
        self.axes = {axis: sum(found.values()) for axis, found in widths.items()}
        self._held = []
        for holder in self.holders:
            place = self.places[holder.rank]
            runs = {axis: self._run(axis, place, widths[axis]) for axis in widths}
            self._held.append(self._parts(holder.shape, pattern, runs))

    @property
    def whole_parts(self) -> dict[str, str]:
        """The names of its parts in a whole state, by role."""
        return self.holders[0].storage.part_names(self.name)

    def made(self, shown: Listed, place: Place) -> dict[str, Made]:
        """The parts that another rank is to hold, by name."""
        first = self.holders[0]
        runs = {axis: self._target_run(axis, shown, place) for axis in self.axes}
        held = self._parts(first.shape, shown.pattern, runs)
        with_padding = {
            axis: _within(range(one.stop), one) for axis, one in shown.sizes.items() if isinstance(one, range)
        }
        shapes = self._parts(first.shape, shown.pattern, runs | with_padding)
        out: dict[str, Made] = {}
        for role, part in first.storage.part_names(shown.name).items():
            like = first.rank, first.parts[role]
            if role not in held:  # it tells the shape
                shape = logical_shape(first.shape, shown.pattern, runs)
                out[part] = Made((len(shape),), like, value=shape)
                continue
            found = assembly(held[role], tuple(dimensions[role] for dimensions in self._held))
            if found is None:
                raise ConversionError("R605", f"no rank holds all of {self.name} that {told(place.rank)} is to hold")
            scale = ranks_of(first.shown.stored), ranks_of(shown.stored)
            out[part] = replace(self._assembled(role, shapes[role], found, like), scale=scale)
        return out

    def _assembled(self, role: str, held: Dimensions, found: Assembly, like: tuple[int, str]) -> Made:
        shape = tuple(dimension.local_size for dimension in held)
        sources, replicas = (
            tuple(Source(self.holders[n].rank, self.holders[n].parts[role], mine, box) for n, mine, box in regions)
            for regions in found
        )
        return Made(shape, like, sources, replicas)

    def _parts(self, shape: tuple[int, ...], pattern: str | None, runs: Mapping[str, Held]) -> Mapping[str, Dimensions]:
        held = tuple(map(whole, shape)) if pattern is None else held_of(pattern, runs)
        return held_parts(self.name, self.holders[0].storage, held)

    # --- axes ---

    def _widths(self, axis: str) -> dict[int, int]:
        """How much of an axis each rank of its mesh holds, by its place there; under 0 all of an axis that is not cut.

        Where copies share a position, all of the axis.
        """
        found: dict[int, tuple[int, Holder]] = {}
        place, mesh = self.places[0], None
        for holder in self.holders:
            place, size = self.places[holder.rank], holder.sizes[axis]
            mesh = place.mesh_of(axis)
            if axis in place.noted:
                size = len(place.noted[axis][0])
                coordinate = 0
            else:
                coordinate = place.coordinate(mesh) if mesh is not None else 0
            before, other = found.setdefault(coordinate, (size, holder))
            if before != size:
                message = f"{self.name}: `{axis}` is {before:,} on {told(self.places[other.rank].rank)}, {size:,} on "
                raise ConversionError("R606", message + told(place.rank))
        if mesh is not None and axis not in place.noted:
            self._check_widths(axis, mesh, place, set(found))
        return {coordinate: size for coordinate, (size, _) in sorted(found.items())}

    def _check_widths(self, axis: str, mesh: str, place: Place, found: set[int]) -> None:
        """The size of an axis that no config tells is that of all ranks together."""
        if place.how(axis) == "or copies":
            message = f"{self.name}: with copies among the ranks nothing tells the size of `{axis}`"
            raise ConversionError("X304", f"{message}: declare it, `param {axis} = ...`")
        for coordinate in range(place.size(mesh)):
            if coordinate not in found:
                raise ConversionError("R605", f"{self.name} is missing on {told({mesh: coordinate})}")

    def _run(self, axis: str, place: Place, widths: Mapping[int, int]) -> Held:
        """What a rank holds of an axis; of a padded one, without its padding."""
        if axis in place.noted:
            return _within(*place.noted[axis])
        mesh = place.mesh_of(axis)
        if mesh is None:
            return whole(sum(widths.values()))
        begin = sum(size for coordinate, size in widths.items() if coordinate < place.coordinate(mesh))
        return _within(range(sum(widths.values())), range(begin, begin + widths[place.coordinate(mesh)]))

    def _target_run(self, axis: str, shown: Listed, place: Place) -> Held:
        if isinstance(shown.sizes.get(axis), range):
            return _within(*place.noted[axis])
        everything = range(self.axes[axis])
        try:
            return _within(everything, place.share(axis, everything))
        except ConversionError as problem:  # a size that came with the tensor: say with which
            raise ConversionError(problem.code, f"{self.name}: {problem.message}") from None


def logical_shape(shape: tuple[int, ...], pattern: str | None, runs: Mapping[str, Held]) -> tuple[int, ...]:
    """The shape of what is held of a tensor."""
    return shape if pattern is None else tuple(held.local_size for held in held_of(pattern, runs))


def told(rank: Ranks) -> str:
    """A rank for a message: `rank tp 1, ep 0`."""
    return f"rank {', '.join(f'{mesh} {place}' for mesh, place in rank.items()) or '0'}"


def _is_nothing(shown: Listed, place: Place) -> bool:
    """Whether a rank has no tensor as it would hold nothing: no expert. Where all is padding it has an empty one."""
    empty = (axis for axis, size in counted(shown.sizes).items() if size == 0)
    return any(padded(axis) not in place.noted for axis in empty)


def _within(positions: range, held: range) -> Held:
    begin, end = held.start - positions.start, held.stop - positions.start
    return Held(len(positions), ((begin, end),) if begin < end else ())


__all__ = ["Made", "Resharding", "Source", "places", "told"]
