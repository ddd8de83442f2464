"""Which rank converts which units of a plan, where several processes convert one checkpoint."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from mapdsl.checkpoint.layout import FileLayout
from mapdsl.checkpoint.passes import Plan

PAGE_BYTES = max(mmap.PAGESIZE, 2**16)
"""What machines that share files may write as one piece, though a part of it was asked for."""

_Place = tuple[int, int, int]


@dataclass(frozen=True)
class Division:
    """The units of each rank; `last` are for the first rank, when all others are done."""

    parts: tuple[tuple[int, ...], ...]
    last: tuple[int, ...] = ()


def divide(plan: Plan, layout: Sequence[FileLayout], done: AbstractSet[int], nodes: Sequence[str]) -> Division:
    """Share out the units that are not done, by the bytes that they read and write; `nodes` names each rank's machine.

    Units stand in the order of their places in the output, and each rank takes a run of them: so it works on few files,
    and machines meet only where one's run ends. Over a network file system a machine writes whole pages, with what it
    last saw of them: of two units that share a page on two machines, one comes last.
    """
    places = _places(plan, layout)
    members, stored = plan.units.members(), plan.request.checkpoint.tensors
    units = [unit for unit in range(plan.units.count) if unit not in done]
    units.sort(key=lambda unit: (min(places[unit], default=(-1, 0, 0)), unit))
    sizes = {
        unit: 1 + sum(stored[name].nbytes for name in members[unit][0]) + sum(map(plan.nbytes, members[unit][1]))
        for unit in units
    }
    order = sorted(range(len(nodes)), key=lambda rank: (nodes.index(nodes[rank]), rank))
    parts: list[list[int]] = [[] for _ in nodes]
    total, before = sum(sizes.values()), 0
    for unit in units:
        turn = (2 * before + sizes[unit]) * len(nodes) // (2 * total)  # by the unit's middle
        parts[order[turn]].append(unit)
        before += sizes[unit]
    last = _sharing_pages(((nodes[rank], parts[rank]) for rank in order), places)
    return Division(tuple(tuple(unit for unit in part if unit not in last) for part in parts), tuple(sorted(last)))


def _places(plan: Plan, layout: Sequence[FileLayout]) -> list[list[_Place]]:
    """By unit, the places of its outputs: number of the file, first byte, end."""
    by_name = {
        tensor.name: (number, tensor.begin, tensor.end) for number, file in enumerate(layout) for tensor in file.tensors
    }
    return [[by_name[plan.name_of(name)] for name in outputs] for _, outputs in plan.units.members()]


def _sharing_pages(parts: Iterable[tuple[str, Sequence[int]]], places: Sequence[Sequence[_Place]]) -> set[int]:
    """The units that share a page of a file with a unit of an earlier part on another machine."""
    owners: dict[tuple[int, int], str] = {}
    found: set[int] = set()
    for node, units in parts:
        for unit in units:
            full = [place for place in places[unit] if place[1] < place[2]]
            edges = {(file, byte // PAGE_BYTES) for file, begin, end in full for byte in (begin, end - 1)}
            if any(owners.get(page, node) != node for page in edges):
                found.add(unit)
            else:
                owners.update(dict.fromkeys(edges, node))
    return found
