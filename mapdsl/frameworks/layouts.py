"""How the ranks of a device mesh hold a tensor, as runs of positions, whatever placements a DTensor has."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mapdsl.runtime.dtensors import is_dtensor, mesh_names, placement_of, strides_like
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.links import Box, Shape, boxes_of
from mapdsl.runtime.placements import Along, chunked
from mapdsl.runtime.shares import Run

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Ways = tuple["Along | None", ...]
"""How each dimension of a device mesh cuts a tensor; None where it does not: its ranks hold copies."""


class Block(NamedTuple):
    """A box of a tensor that a rank holds, and where it begins in what the rank holds."""

    box: Box
    at: Shape

    @classmethod
    def alone(cls, box: Box) -> Block:
        """A box that is all that a rank has."""
        return cls(box, (0,) * len(box))

    def place(self, box: Box) -> tuple[slice, ...]:
        """Where a box that lies in this one is in what the rank holds, as an index."""
        spans = zip(box, self.box, self.at, strict=True)
        return tuple(slice(begin - first + at, end - first + at) for (begin, end), (first, _), at in spans)


@dataclass(frozen=True)
class Layout:
    """A tensor of all ranks together: its shape, how the dimensions of a mesh cut it. Without a mesh it is whole."""

    shape: Shape
    mesh: DeviceMesh | None = None
    ways: Ways = ()

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Layout:
        """The layout of a DTensor; a plain tensor is whole. R606 for a DTensor that is a sum to be."""
        if not is_dtensor(tensor):
            return cls(tuple(tensor.shape))
        ways = tuple(_way(name, placement) for placement in tensor.placements)
        return cls(tuple(tensor.shape), tensor.device_mesh, ways)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many ranks each dimension of the mesh has."""
        return () if self.mesh is None else tuple(self.mesh.shape)

    @property
    def own(self) -> Mapping[int, int]:
        """The place of this process, by dimension of the mesh; N113 where it is not on it."""
        if self.mesh is None:
            return {}
        coordinate = self.mesh.get_coordinate()
        if coordinate is None:
            raise ConversionError("N113", f"this process is not part of the device mesh {self.mesh}")
        return dict(enumerate(coordinate))

    def without(self, dims: frozenset[int]) -> Layout:
        """The same, not cut by some dimensions of the mesh."""
        return replace(self, ways=tuple(None if dim in dims else way for dim, way in enumerate(self.ways)))

    def placements(self) -> list[Any]:
        """torch's placements that say it."""
        return [placement_of(way) for way in self.ways]

    def held(self, at: Mapping[int, int]) -> tuple[tuple[Run, ...], ...]:
        """What is held of each dimension at some places of the mesh; dimensions of it that are not named do not cut."""
        runs: list[tuple[Run, ...]] = [((0, size),) if size else () for size in self.shape]
        for dim, way in enumerate(self.ways):
            if way is not None and dim in at:
                size = sum(end - begin for begin, end in runs[way.dim])
                runs[way.dim] = _of_those(runs[way.dim], chunked(size, way.pieces, self.sizes[dim], at[dim]))
        return tuple(runs)

    def boxes(self, at: Mapping[int, int]) -> Iterator[Box]:
        """The boxes that are held at some places of the mesh."""
        yield from itertools.product(*self.held(at))

    def blocks(self) -> list[Block]:
        """What this process holds."""
        return [Block(box, at) for box, at in boxes_of(self.held(self.own))]

    @property
    def local_shape(self) -> Shape:
        """The shape of what this process holds."""
        return tuple(sum(end - begin for begin, end in runs) for runs in self.held(self.own))


def _way(name: str, placement: Any) -> Along | None:
    if placement.is_replicate():
        return None
    if placement.is_partial():
        raise ConversionError("R606", f"{name} is a DTensor whose ranks hold summands: redistribute it first")
    return Along(placement.dim, getattr(placement, "split_factor", 1))


def _of_those(runs: Sequence[Run], local: Sequence[Run]) -> tuple[Run, ...]:
    """Positions counted among some runs, as positions of the dimension."""
    found = []
    for first, stop in local:
        place = 0
        for begin, end in runs:
            low, high = max(first, place), min(stop, place + end - begin)
            if low < high:
                found.append((begin + low - place, begin + high - place))
            place += end - begin
    return tuple(found)


def local_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, without its history."""
    local: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor
    return local.detach()


def joined(local: Tensor, layout: Layout) -> Tensor:
    """The DTensor that the local tensors of all ranks are together; the tensor itself where one process has all of it.

    Nothing is communicated.
    """
    if layout.mesh is None:
        return local
    from torch.distributed.tensor import DTensor

    shape = torch.Size(layout.shape)
    strides = strides_like(local, shape)
    return DTensor.from_local(local, layout.mesh, layout.placements(), run_check=False, shape=shape, stride=strides)


def slices(box: Box) -> tuple[slice, ...]:
    """A box as an index."""
    return tuple(slice(begin, end) for begin, end in box)


def expert_layout(shape: Shape, device_mesh: DeviceMesh) -> Layout:
    """How Automodel holds grouped experts: over `ep` by expert, over `ep_shard` by the second dimension.

    Shares are those of DTensors: of the size rounded up, the last ones smaller. Raises ConversionError, N113, for a
    mesh that has no `ep` or other dimensions besides.
    """
    names = mesh_names(device_mesh)
    known = {"ep": Along(0, 1), "ep_shard": Along(1, 1), "ep_replicate": None}
    if "ep" not in names or not set(names) <= set(known):
        message = "grouped experts are held over `ep`, `ep_shard` and `ep_replicate`"
        raise ConversionError("N113", f"{message}, the device mesh has {list(names)}")
    sizes = dict(zip(names, device_mesh.shape, strict=True))
    has_more = any(size > 1 for name, size in sizes.items() if name != "ep")
    kept = tuple(name for name in names if name == "ep" or has_more)
    mesh = device_mesh if kept == names else device_mesh[kept]
    return Layout(shape, mesh, tuple(known[name] for name in kept))


__all__ = ["Block", "Layout", "Ways", "expert_layout", "joined", "local_of", "slices"]
