"""Which part of a dimension a rank holds, where one of the axes in it is cut over the ranks. No torch here.

A dimension is what its axes make of it: `(h c)` nests `c` in `h`, a sum lays its terms end to end. So is a share of it:
the share of an axis is one run of its positions, nested and joined like the axes themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Run = tuple[int, int]
"""Positions from the first to before the second."""

How = Literal["evenly", "unevenly", "by ceil", "or copies"]
"""What a mesh says of an axis. The ranks' shares are equal; or the first ranks have one more; or shares are of the size
rounded up, as `torch.chunk` makes them, and the last ranks have less; or more ranks than positions share these."""


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


def nested(outer: Held, inner: Held) -> Held:
    """What is held of `(outer inner)`: of each outer position that is held, the inner ones that are."""
    size = outer.size * inner.size
    if inner.is_whole:
        return Held(size, _merged((begin * inner.size, end * inner.size) for begin, end in outer.runs))
    places = (place * inner.size for begin, end in outer.runs for place in range(begin, end))
    return Held(size, _merged((place + begin, place + end) for place in places for begin, end in inner.runs))


def joined(terms: Iterable[Held]) -> Held:
    """What is held of `term + term + ...`."""
    size, runs = 0, []
    for term in terms:
        runs += [(size + begin, size + end) for begin, end in term.runs]
        size += term.size
    return Held(size, _merged(runs))


def _merged(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The same positions; runs that touch are one."""
    found: list[Run] = []
    for begin, end in runs:
        if found and found[-1][1] == begin:
            found[-1] = (found[-1][0], end)
        elif begin < end:
            found.append((begin, end))
    return tuple(found)
