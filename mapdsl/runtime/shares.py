"""Which part of a dimension a rank holds, where one of the axes in it is cut over the ranks. No torch here.

A dimension is what its axes make of it: `(h c)` nests `c` in `h`, a sum lays its terms end to end. So is a share of it:
the share of an axis is one run of its positions, nested and joined like the axes themselves.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from mapdsl.runtime.codecs.storage import Box

Run = tuple[int, int]
"""Positions from the first to before the second."""

How = Literal["evenly", "unevenly", "by ceil", "or copies"]
"""What a mesh says of an axis. The ranks' shares are equal; or the first ranks have one more; or shares are of the size
rounded up, as `torch.chunk` makes them, and the last ranks have less; or more ranks than positions share these."""


def padded(axis: str) -> str:
    """What a padded axis is called where it is meant with its padding: no axis of a map is called so."""
    return f"{axis}__padded"


@dataclass(frozen=True)
class Held:
    """What is held of a dimension of `size` positions: runs of them, in order, none touching the next."""

    size: int
    runs: tuple[Run, ...]

    @property
    def is_whole(self) -> bool:
        """Whether all of it is held."""
        return self.runs == whole(self.size).runs

    @property
    def local_size(self) -> int:
        """How many positions are held: the size of the dimension on the rank."""
        return sum(end - begin for begin, end in self.runs)


Dimensions = tuple[Held, ...]
"""What is held of each dimension of a tensor."""

Ranks = Mapping[str, int]
"""Numbers of ranks, or the places of one rank, by mesh."""


def all_ranks(ranks: Ranks) -> Iterator[dict[str, int]]:
    """Every rank of these numbers of ranks, the last mesh fastest."""
    for coordinates in itertools.product(*map(range, ranks.values())):
        yield dict(zip(ranks, coordinates, strict=True))


def whole(size: int) -> Held:
    """All of a dimension."""
    return Held(size, ((0, size),) if size else ())


def share(size: int, ranks: int, rank: int, how: How = "evenly") -> Held | None:
    """What one of `ranks` ranks holds of an axis; None where the axis cannot be shared so."""
    if how == "unevenly":
        least, more = divmod(size, ranks)
        begin = rank * least + min(rank, more)
        end = begin + least + (rank < more)
    elif how == "by ceil":
        most = -(-size // ranks)
        begin, end = min(rank * most, size), min((rank + 1) * most, size)
    elif how == "or copies" and size and size < ranks:
        if ranks % size:
            return None
        begin = rank // (ranks // size)
        end = begin + 1
    else:
        if size % ranks:
            return None
        begin, end = size // ranks * rank, size // ranks * (rank + 1)
    return Held(size, ((begin, end),) if begin < end else ())


def clipped(runs: Iterable[Run], size: int) -> tuple[Run, ...]:
    """Those positions of some runs that come before a size."""
    return tuple((begin, min(end, size)) for begin, end in runs if begin < size)


def nested(outer: Held, inner: Held) -> Held:
    """What is held of `(outer inner)`: of each outer position that is held, the inner ones that are."""
    size = outer.size * inner.size
    if inner.is_whole:
        return Held(size, merged((begin * inner.size, end * inner.size) for begin, end in outer.runs))
    places = (place * inner.size for begin, end in outer.runs for place in range(begin, end))
    return Held(size, merged((place + begin, place + end) for place in places for begin, end in inner.runs))


def joined(terms: Iterable[Held]) -> Held:
    """What is held of `term + term + ...`."""
    size, runs = 0, []
    for term in terms:
        runs += [(size + begin, size + end) for begin, end in term.runs]
        size += term.size
    return Held(size, merged(runs))


def merged(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The same positions; runs that touch are one."""
    found: list[Run] = []
    for begin, end in runs:
        if found and found[-1][1] == begin:
            found[-1] = (found[-1][0], end)
        elif begin < end:
            found.append((begin, end))
    return tuple(found)


# --- patterns ---


def held_of(pattern: str, axes: Mapping[str, Held]) -> tuple[Held, ...]:
    """What is held of each dimension of a pattern, such as `(h c + g c) d`, by what is held of its axes.

    Raises KeyError for an axis that is not there.
    """
    words = re.findall(r"[A-Za-z_]\w*|\d+|[()+]", pattern)
    found, place = [], 0
    while place < len(words):
        dimension, place = _held_factor(words, place, axes)
        found.append(dimension)
    return tuple(found)


def axes_in(pattern: str) -> set[str]:
    """The axes of a pattern."""
    return set(re.findall(r"[A-Za-z_]\w*", pattern))


def _held_factor(words: list[str], place: int, axes: Mapping[str, Held]) -> tuple[Held, int]:
    word = words[place]
    if word != "(":
        return whole(int(word)) if word.isdigit() else axes[word], place + 1
    terms, product, place = [], whole(1), place + 1
    while words[place] != ")":
        if words[place] == "+":
            terms.append(product)
            product, place = whole(1), place + 1
            continue
        factor, place = _held_factor(words, place, axes)
        product = nested(product, factor)
    return joined([*terms, product]), place + 1


# --- from ranks to a rank ---


class Region(NamedTuple):
    """A box of a tensor, and where one of the sources holds it in its own."""

    source: int
    source_box: Box
    box: Box


class Assembly(NamedTuple):
    """How a tensor is put together: boxes of sources, each position once, and boxes that others hold too."""

    regions: tuple[Region, ...]
    replicas: tuple[Region, ...]


@lru_cache(maxsize=4096)
def assembly(target: tuple[Held, ...], sources: tuple[tuple[Held, ...], ...]) -> Assembly | None:
    """How what is held of a tensor comes from what each source holds of it; None where a position is held by none."""
    columns = [_cells(held, [source[n] for source in sources]) for n, held in enumerate(target)]
    regions, replicas = [], []
    for cells in itertools.product(*columns):
        box = tuple(cell.run for cell in cells)
        holders = [n for n in range(len(sources)) if all(cell.starts[n] is not None for cell in cells)]
        found = [Region(n, tuple(_at(cell, n) for cell in cells), box) for n in holders]
        if not found:
            return None
        regions.append(found[0])
        replicas += found[1:]
    return Assembly(tuple(regions), tuple(replicas))


class _Cell(NamedTuple):
    """A run of what is held of a dimension, and where each source has it in its own, if it has."""

    run: Run
    starts: tuple[int | None, ...]


def _at(cell: _Cell, source: int) -> Run:
    start = cell.starts[source]
    assert start is not None  # a holder
    return start, start + cell.run[1] - cell.run[0]


def _cells(target: Held, sources: list[Held]) -> list[_Cell]:
    """The runs of a dimension, cut where a source's runs begin or end."""
    edges = sorted({edge for source in sources for run in source.runs for edge in run})
    cells = []
    local = 0
    for begin, end in target.runs:
        places = [begin, *(edge for edge in edges if begin < edge < end), end]
        for first, last in itertools.pairwise(places):
            starts = tuple(_local_place(source, first) for source in sources)
            cells.append(_Cell((local, local + last - first), starts))
            local += last - first
    return cells


def _local_place(held: Held, place: int) -> int | None:
    """Where a position lies among those that are held."""
    local = 0
    for begin, end in held.runs:
        if begin <= place < end:
            return local + place - begin
        local += end - begin
    return None
