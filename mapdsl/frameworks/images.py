"""What the placements of the tensors of one side make of a tensor of the other side.

A stored expert lies on those ranks that have its slice of the model's stacked tensor; how other dimensions are cut
follows the axes to where they are on the other side. Some cuts are no placement there: half of a joined tensor's rows
are not half of each of its parts. Such a tensor has to be whole along that dimension of the mesh first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mapdsl.frameworks.layouts import Layout, Ways
from mapdsl.runtime.links import Link, Shape
from mapdsl.runtime.placements import NoPlacementError, placements
from mapdsl.runtime.shares import Dimensions, Held, Run


@dataclass(frozen=True)
class Image:
    """How the dimensions of a mesh cut a tensor that is made from others.

    `apart` are those on whose ranks there are others, `gathered` those along which the tensors it comes from have to be
    whole. `is_here` says whether this process has a part.
    """

    ways: Ways = ()
    apart: frozenset[int] = frozenset()
    gathered: frozenset[int] = frozenset()
    is_here: bool = True


class Images:
    """The images of one mesh; what is cut alike is looked at once."""

    def __init__(self) -> None:
        self._known: dict[object, Image] = {}

    def of(self, shape: Shape, links: Sequence[Link], layouts: Mapping[str, Layout]) -> Image:
        """The image of a tensor that some links make, of tensors on one mesh."""
        of_links = tuple((link.source_at, link.target_at, link.axes, layouts[link.source].ways) for link in links)
        shapes = tuple(layouts[link.source].shape for link in links)
        key = shape, of_links, shapes
        if key not in self._known:
            self._known[key] = _image(shape, links, layouts)
        return self._known[key]


def _image(shape: Shape, links: Sequence[Link], layouts: Mapping[str, Layout]) -> Image:
    first = layouts[links[0].source]
    sizes, own = first.sizes, first.own
    cutting = [dim for dim in range(len(sizes)) if sizes[dim] > 1 and any(layouts[k.source].ways[dim] for k in links)]
    owners = _owners(cutting, sizes, links, layouts)
    apart = frozenset(dim for dim, found in owners.items() if len(found) == 1)
    # What is padded has elements that come from nowhere: no cut of it follows from the others.
    is_filled = all(held.is_whole for held in _held(shape, links, layouts, {}))
    gathered = frozenset() if is_filled else frozenset(cutting) - apart
    while True:
        named = {str(dim): sizes[dim] for dim in cutting if dim not in apart | gathered}
        try:
            found = placements(named, lambda at: _held(shape, links, layouts, at))
        except NoPlacementError as problem:
            gathered |= {int(problem.mesh)}
            continue
        ways = tuple(found.get(str(dim)) for dim in range(len(sizes)))
        return Image(ways, apart, gathered, all(owners[dim] == {own[dim]} for dim in apart))


def _owners(
    cutting: Sequence[int], sizes: Sequence[int], links: Sequence[Link], layouts: Mapping[str, Layout]
) -> dict[int, set[int]]:
    """The places along each of some dimensions of the mesh where a rank has any element of the tensor."""
    found: dict[int, set[int]] = {dim: set() for dim in cutting}
    for dims in _cut_together(cutting, links, layouts):
        for places in itertools.product(*(range(sizes[dim]) for dim in dims)):
            at = dict(zip(dims, places, strict=True))
            boxes = ((link, box) for link in links for box in layouts[link.source].boxes(at))
            if any(link.within("source", box) for link, box in boxes):
                for dim, place in at.items():
                    found[dim].add(place)
    return found


def _cut_together(
    cutting: Sequence[int], links: Sequence[Link], layouts: Mapping[str, Layout]
) -> Iterable[Sequence[int]]:
    """Dimensions of the mesh, those together that cut one dimension of a tensor: one cuts what the other leaves."""
    groups = [{dim} for dim in cutting]
    for ways in {layouts[link.source].ways for link in links}:
        for tensor_dim in {way.dim for way in ways if way is not None}:
            same = {dim for dim, way in enumerate(ways) if way is not None and way.dim == tensor_dim}
            joint = [group for group in groups if group & same]
            groups = [group for group in groups if not group & same] + [set().union(*joint)]
    return [sorted(group) for group in groups if group]


def _held(shape: Shape, links: Sequence[Link], layouts: Mapping[str, Layout], named: Mapping[str, int]) -> Dimensions:
    """What is held of each dimension of the tensor at some places of the mesh; NoPlacementError if it is no product."""
    at = {int(dim): place for dim, place in named.items()}
    parts = []
    for link in links:
        for box in layouts[link.source].boxes(at):
            parts += [link.runs("target", ranges) for ranges in link.within("source", box)]
    columns = zip(*parts, strict=True) if parts else ((),) * len(shape)
    held = tuple(Held(size, _union(column)) for size, column in zip(shape, columns, strict=True))
    if parts and math.prod(dimension.local_size for dimension in held) != sum(map(_count, parts)):
        raise NoPlacementError(next(reversed([*named])))
    return held


def _union(columns: Iterable[Sequence[Run]]) -> tuple[Run, ...]:
    """The positions that are in any of some runs."""
    found: list[Run] = []
    for begin, end in sorted({run for runs in columns for run in runs}):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return tuple(found)


def _count(runs: Sequence[Sequence[Run]]) -> int:
    """How many elements are at the positions of some runs in each dimension."""
    return math.prod(sum(end - begin for begin, end in column) for column in runs)


__all__ = ["Image", "Images"]
