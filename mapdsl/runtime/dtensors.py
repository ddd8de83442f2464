"""What ranks hold as torch's DTensors, and local tensors out of DTensors.

A DTensor says how the ranks of a device mesh hold one tensor together. Which ranks do follows from names: those of a
mesh on whose ranks a tensor is not called the same (`{local i}`, an expert of its own, a guard on `rank(pp)`) hold
tensors of their own, and such a DTensor lives on the other dimensions of the device mesh.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor

from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.placements import Along
from mapdsl.runtime.shares import Held, Ranks
from mapdsl.runtime.spread import Part, Spread

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

    from mapdsl.runtime.sharded_adapter import ShardedAdapter

Otherwise = Literal["error", "local"]

_NO_DTENSOR = ("P454", "P456", "X304")


class Rank(NamedTuple):
    """Over how many ranks each mesh of a map cuts, in the order of the device mesh, and which of them one is."""

    ranks: Ranks
    rank: Ranks


def rank_of(meshes: Mapping[str, object], ranks: Ranks | DeviceMesh, rank: Ranks | int | None) -> Rank:
    """A rank as a map's meshes say it; of a device mesh, the one of a global number, or of this process."""
    if isinstance(ranks, Mapping):
        if not isinstance(rank, Mapping):
            message = f"which rank of {dict(ranks)} is meant? say its place in each mesh: {dict.fromkeys(ranks, 0)}"
            raise ConversionError("N113", message)
        return Rank(ranks, rank)
    names = mesh_names(ranks)
    if isinstance(rank, Mapping):
        return Rank({name: size for name, size in zip(names, ranks.shape, strict=True) if name in meshes}, rank)
    if rank is None:
        coordinate = ranks.get_coordinate()
        whose = "this process"
    else:
        place = (ranks.mesh == rank).nonzero().tolist()
        coordinate = place[0] if place else None
        whose = f"rank {rank}"
    if coordinate is None:
        raise ConversionError("N113", f"{whose} is not part of the device mesh {ranks}")
    cut = [(name, size, place) for name, size, place in zip(names, ranks.shape, coordinate, strict=True)]
    cut = [one for one in cut if one[0] in meshes]
    return Rank({name: size for name, size, _ in cut}, {name: place for name, _, place in cut})


def mesh_names(mesh: DeviceMesh) -> tuple[str, ...]:
    """The names of a device mesh's dimensions; N113 where they have none."""
    if mesh.mesh_dim_names is None:
        message = f"the dimensions of the device mesh {mesh} have no names, which say what of the map they are"
        raise ConversionError("N113", f'{message}: init_device_mesh(..., mesh_dim_names=("tp",))')
    return mesh.mesh_dim_names


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether this is a DTensor; torch's module of them is not imported to tell."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


# --- out of local tensors ---


def wrapped(
    adapter: ShardedAdapter,
    side: str,
    state: Mapping[str, Tensor],
    mesh: DeviceMesh,
    otherwise: Otherwise,
) -> dict[str, Tensor]:
    """What this rank holds as DTensors on a device mesh; plain tensors where no other rank has part in them."""
    if otherwise not in ("error", "local"):
        raise ConversionError("N111", f'`otherwise` is "error" or "local", not {otherwise!r}')
    spread = Spread(adapter, side, state, lambda tensor: False)
    meshes = Submeshes(mesh)
    made = {}
    for part in spread.parts():
        local = state[part.name]
        if is_dtensor(local):
            raise ConversionError("R606", f"{part.name} is a DTensor already")
        try:
            made[part.name] = _wrapped(local, part, meshes)
        except ConversionError as problem:
            if problem.code not in _NO_DTENSOR:
                raise
            if otherwise == "error":
                problem.message += '; otherwise="local" leaves it a plain tensor'
                raise
            made[part.name] = local
    return {name: made[name] for name in state}


class Submeshes:
    """A device mesh without some of its dimensions; torch is asked for each once."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self._names = mesh_names(mesh)
        self._found: dict[tuple[str, ...], DeviceMesh] = {self._names: mesh}

    def without(self, names: frozenset[str]) -> DeviceMesh | None:
        """The other dimensions; None where there are none."""
        left = tuple(name for name in self._names if name not in names)
        if left and left not in self._found:
            self._found[left] = self._mesh[left]
        return self._found.get(left)


def _wrapped(local: Tensor, part: Part, meshes: Submeshes) -> Tensor:
    from torch.distributed.tensor import DTensor

    mesh = meshes.without(part.apart)
    if mesh is None:
        return local
    ways = part.placements(mesh_names(mesh))
    _check_local(part, local)
    shape = torch.Size(dimension.size for dimension in part.held)
    return DTensor.from_local(
        local,
        mesh,
        [placement_of(way) for way in ways.values()],
        run_check=False,
        shape=shape,
        stride=strides_like(local, shape),
    )


def strides_like(local: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """Strides of a tensor of this shape whose dimensions lie in memory in the order of the local one's."""
    strides, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda dim: (local.stride(dim), -dim)):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


def placement_of(way: Along | None) -> Placement:
    """torch's placement that cuts a tensor so."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if way is None:
        return Replicate()
    return Shard(way.dim) if way.pieces == 1 else _StridedShard(way.dim, split_factor=way.pieces)


# --- out of DTensors ---


def unwrapped(
    adapter: ShardedAdapter, side: str, state: Mapping[str, Tensor], *, redistribute: bool
) -> dict[str, Tensor]:
    """What this rank holds, out of DTensors; plain tensors are taken to be local ones."""
    spread = Spread(adapter, side, state, is_dtensor)
    made = {}
    for part in spread.parts():
        tensor = state[part.name]
        made[part.name] = _unwrapped(tensor, part, spread, redistribute) if is_dtensor(tensor) else tensor
    return {name: made[name] for name in state}


def _unwrapped(tensor: DTensor, part: Part, spread: Spread, redistribute: bool) -> Tensor:
    mesh = tensor.device_mesh
    names = mesh_names(mesh)
    _check_mesh(part, mesh, spread)
    shape = tuple(dimension.size for dimension in part.held)
    if tuple(tensor.shape) != shape:
        raise ConversionError("R606", f"{part.name}: expected a DTensor of {list(shape)}, found {list(tensor.shape)}")
    wanted = _wanted(part, names)
    if wanted is not None and _same(tensor, wanted):
        local = tensor.to_local()
    elif not redistribute:
        said = "none that torch has" if wanted is None else list(wanted)
        found = f"its placements are {list(tensor.placements)} over {names}, the map's are {said}"
        raise ConversionError("P456", f"{part.name}: {found}; redistribute=True moves it")
    else:
        movable = as_bytes(tensor)
        if wanted is not None and all(placement.is_shard() or placement.is_replicate() for placement in wanted):
            local = movable.redistribute(placements=wanted).to_local().view(tensor.dtype)
        else:
            # Not every way to a strided shard is one that torch goes; this one is.
            local = cut_out(movable.full_tensor(), part.held).view(tensor.dtype)
    _check_local(part, local)
    return local


def as_bytes(tensor: DTensor) -> DTensor:
    """The same tensor; of elements of one byte as bytes, as not every backend moves float8."""
    if tensor.dtype.itemsize > 1 or any(placement.is_partial() for placement in tensor.placements):
        return tensor
    local, mesh = tensor.to_local().view(torch.uint8), tensor.device_mesh
    return type(tensor).from_local(local, mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())


def _wanted(part: Part, names: tuple[str, ...]) -> list[Placement] | None:
    """The placements that the map says, over these dimensions; None where there are none that say it."""
    if not part.cut_by <= set(names):
        return None
    try:
        return [placement_of(way) for way in part.placements(names).values()]
    except ConversionError as problem:
        if problem.code not in _NO_DTENSOR:
            raise
        return None


def _same(tensor: DTensor, wanted: list[Placement]) -> bool:
    """Whether a DTensor is placed so; over one rank all placements are the same."""
    pairs = zip(tensor.placements, wanted, tensor.device_mesh.shape, strict=True)
    return all(one == other or (size == 1 and not one.is_partial()) for one, other, size in pairs)


def _check_mesh(part: Part, mesh: DeviceMesh, spread: Spread) -> None:
    """The DTensor's mesh is that of the adapter's rank."""
    place = spread.place
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ConversionError("N113", f"{part.name}: this process is not part of the device mesh {mesh}")
    for name, size, at in zip(mesh_names(mesh), mesh.shape, coordinate, strict=True):
        if name in spread.meshes and (place.size(name), place.coordinate(name)) != (size, at):
            message = f"{part.name} is a DTensor on rank {at} of {size} of `{name}`"
            found = f"the adapter's is rank {place.coordinate(name)} of {place.size(name)}"
            raise ConversionError("N113", f"{message}, {found}: adapter.at(device_mesh) gives this one's")
        if name in part.apart and size > 1:
            message = f"on the ranks of `{name}` the map calls other tensors so, or none"
            raise ConversionError("P456", f"{part.name} is one DTensor over `{name}`, but {message}")


def cut_out(tensor: Tensor, held: tuple[Held, ...]) -> Tensor:
    """What is held of a whole tensor, in memory of its own."""
    for dim, dimension in enumerate(held):
        if not dimension.is_whole:
            runs = [tensor.narrow(dim, begin, end - begin) for begin, end in dimension.runs]
            tensor = torch.cat(runs or [tensor.narrow(dim, 0, 0)], dim)
    return tensor


def _check_local(part: Part, local: Tensor) -> None:
    expected = tuple(dimension.local_size for dimension in part.held)
    if tuple(local.shape) != expected:
        message = f"{part.name}: expected {list(expected)} on this rank, found {list(local.shape)}"
        raise ConversionError("R606", message)


__all__ = ["Otherwise", "Rank", "as_bytes", "is_dtensor", "placement_of", "rank_of", "unwrapped", "wrapped"]
