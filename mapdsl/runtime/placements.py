"""How torch would have to cut a tensor for each rank to hold what the map says. No torch here.

torch cuts a tensor over one dimension of a device mesh after the other. Each cuts along one dimension of the tensor,
in as many parts of one size as there are ranks, the last ones smaller (`torch.chunk`), or it cuts each of some pieces
so: `(j f)`, cut inside f, is cut in two pieces. Whatever else a map says has no placement.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import NamedTuple

from mapdsl.runtime.shares import Dimensions, Held, Run, merged

HeldAt = Callable[[Mapping[str, int]], Dimensions]
"""What is held of each dimension, by places in some meshes; those that are not named cut nothing."""


class Along(NamedTuple):
    """A mesh cuts each of so many equal pieces of a dimension, as `torch.chunk` does."""

    dim: int
    pieces: int


class NoPlacementError(ValueError):
    """What ranks hold is not what torch's placements make; `mesh` is where, `after` one that had better come later."""

    def __init__(self, mesh: str, after: str = "") -> None:
        super().__init__(mesh)
        self.mesh = mesh
        self.after = after


def placements(meshes: Mapping[str, int], held: HeldAt) -> dict[str, Along | None]:
    """How each mesh, in this order, cuts a tensor; None where it does not. Raises NoPlacementError."""
    found: dict[str, Along | None] = {}
    places: list[dict[str, int]] = [{}]
    for mesh, size in meshes.items():
        cases = [(held(at), [held({**at, mesh: place}) for place in range(size)]) for at in places]
        found[mesh] = _way(mesh, cases)
        if found[mesh] is not None:
            places = [{**at, mesh: place} for at in places for place in range(size)]
    _check_order(meshes, found)
    return found


def _check_order(meshes: Mapping[str, int], found: Mapping[str, Along | None]) -> None:
    """Refuse what torch would gather wrongly: a dimension cut in pieces, and then over another mesh.

    It knows but one such case, where the pieces are those of the later mesh, as FSDP cuts what is cut already.
    """
    for dim in {along.dim for along in found.values() if along is not None}:
        cuts = [(mesh, along.pieces) for mesh, along in found.items() if along is not None and along.dim == dim]
        if len(cuts) == 2 and cuts[0][1] == meshes[cuts[1][0]] and cuts[1][1] == 1:
            continue
        for (mesh, pieces), (later, _) in itertools.pairwise(cuts):
            if pieces > 1:
                raise NoPlacementError(later, mesh)


def _way(mesh: str, cases: list[tuple[Dimensions, list[Dimensions]]]) -> Along | None:
    """How a mesh makes shares of what its ranks hold together, in all cases."""
    dims = {dim for whole, shares in cases for share in shares for dim, held in enumerate(share) if held != whole[dim]}
    if not dims:
        return None
    dim = dims.pop()
    found = [
        (whole[dim].local_size, [local_runs(share[dim], whole[dim]) for share in shares]) for whole, shares in cases
    ]
    # Runs tell the pieces, unless some touch: a piece of one position is not cut, its rank has the next one, too.
    counts = dict.fromkeys(count for size, shares in found for count in (max(map(len, shares)), size, 1))
    for pieces in filter(None, counts) if not dims else ():
        if all(_is_chunked(size, pieces, shares) for size, shares in found):
            return Along(dim, pieces)
    raise NoPlacementError(mesh)


def _is_chunked(size: int, pieces: int, shares: list[tuple[Run, ...]]) -> bool:
    return all(runs == chunked(size, pieces, len(shares), place) for place, runs in enumerate(shares))


def chunked(size: int, pieces: int, ranks: int, rank: int) -> tuple[Run, ...]:
    """What torch gives a rank of a dimension each of whose pieces is cut over ranks."""
    found = []
    for piece in _chunks((0, size), pieces):
        found += _chunks(piece, ranks)[rank : rank + 1]  # there may be fewer
    return merged(found)


def _chunks(run: Run, count: int) -> list[Run]:
    """As `torch.chunk` cuts."""
    begin, end = run
    step = max(-(-(end - begin) // count), 1)
    return [(first, min(first + step, end)) for first in range(begin, end, step)]


def local_runs(held: Held, outer: Held) -> tuple[Run, ...]:
    """Where what is held lies among what is held of the same dimension by several ranks together."""
    begins = [begin for begin, _ in outer.runs]
    starts = [0, *itertools.accumulate(end - begin for begin, end in outer.runs)]
    found = []
    for begin, end in held.runs:
        number = bisect_right(begins, begin) - 1
        first = starts[number] + begin - begins[number]
        found.append((first, first + end - begin))
    return merged(found)


__all__ = ["Along", "Dimensions", "NoPlacementError", "chunked", "local_runs", "placements"]
