"""Stored tensors out of a live model, on all ranks of a job.

A process makes just those stored tensors of which it holds a part of the model's. What is a view of the model's memory
is one, if it is to be overwritten, so that what is read goes straight to its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mapdsl.frameworks.images import Image, Images
from mapdsl.frameworks.layouts import Layout, joined, local_of
from mapdsl.frameworks.live import Load, State, check_stated, stated, whole_along
from mapdsl.frameworks.moves import Window, as_target, fill, made_for
from mapdsl.frameworks.stored import encoded, payload_layout, placeholders
from mapdsl.runtime.adapter import Adapter
from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.strided import contiguous_copy
from mapdsl.runtime.codecs.values import Cast
from mapdsl.runtime.complement import Raw
from mapdsl.runtime.dtensors import mesh_names
from mapdsl.runtime.links import Box, Link
from mapdsl.runtime.tracing import Target, trace

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Export:
    """The stored tensors that a state of the model makes, on this process.

    With `load` they are to be overwritten: views of the model's memory where that goes, and no values else. Otherwise
    they have the model's values, in memory of their own where they are moved. `dtypes` are known ones of stored
    tensors, `dtype` is that of numbers that the map states.
    """

    def __init__(
        self,
        adapter: Adapter,
        state: State,
        *,
        quantization: bool,
        load: Load | None,
        in_place: Callable[[str], bool],
        dtype: torch.dtype = torch.bfloat16,
        dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
    ) -> None:
        self.dtype, self.dtypes = dtype, dtypes
        self.adapter, self.state = adapter, state
        self.load, self.in_place = load, in_place
        self.trace = trace(adapter, adapter.RIGHT, state, partial=True, quantization=quantization)
        self.layouts = {name: Layout.of(name, state[name]) for name, one in self.trace.sources.items() if one.is_there}
        self._images: dict[int, Images] = {}
        self._submeshes: dict[tuple[int, tuple[int, ...]], DeviceMesh] = {}
        self._gathered: dict[tuple[str, frozenset[int]], Tensor] = {}
        if load is not None:
            # What is stored nowhere is not waited for.
            read = {name for target in self.trace.targets.values() for name in target.origins()}
            read |= self.trace.values.keys() | self.trace.ties.keys()
            load.layouts |= {name: layout for name, layout in self.layouts.items() if name in read}

    def run(self) -> dict[str, Tensor]:
        """All that this process holds, by name."""
        if self.load is None:
            check_stated(self.trace, self.state)
        out: dict[str, Tensor] = {}
        for target in self.trace.targets.values():
            out |= self._made(target)
        return out

    def _made(self, target: Target) -> dict[str, Tensor]:
        links = [link for link in target.links() if not link.copy]
        if not links:
            return self._stated(target)
        layouts = {link.source: self.layouts[link.source] for link in links}
        meshes = {id(one.mesh): one.mesh for one in layouts.values() if one.mesh is not None}
        image = Image()
        if len(meshes) == 1 and len(layouts) == sum(one.mesh is not None for one in layouts.values()):
            (key,) = meshes
            image = self._images.setdefault(key, Images()).of(target.shape, links, layouts)
        elif meshes:  # nothing says how tensors of several meshes lie to each other
            image = Image(gathered=frozenset(range(max(mesh.ndim for mesh in meshes.values() if mesh is not None))))
        if not image.is_here:
            return {}
        return _Making(self, target, links, image).run()

    def submesh(self, mesh: DeviceMesh, dims: tuple[int, ...]) -> DeviceMesh:
        """A device mesh with some of its dimensions; torch is asked for each once. N113 where they have no names."""
        if len(dims) == mesh.ndim:
            return mesh
        if (id(mesh), dims) not in self._submeshes:
            names = mesh_names(mesh)
            self._submeshes[id(mesh), dims] = mesh[tuple(names[dim] for dim in dims)]
        return self._submeshes[id(mesh), dims]

    def source(self, name: str, gathered: frozenset[int]) -> tuple[Tensor, Layout]:
        """What this process has of a tensor of the model, whole along some dimensions of its mesh, and its layout."""
        tensor, layout = self.state[name], self.layouts[name]
        dims = frozenset(dim for dim, way in enumerate(layout.ways) if way is not None and dim in gathered)
        if not dims:
            return local_of(tensor), layout
        return self._gathered[name, dims], layout.without(dims)

    def gather(self, names: Sequence[str], gathered: frozenset[int]) -> None:
        """Make tensors whole along some dimensions of their mesh: all ranks there do, those with no part of it, too."""
        kept = {}
        for name in names:
            layout = self.layouts[name]
            dims = frozenset(dim for dim, way in enumerate(layout.ways) if way is not None and dim in gathered)
            if dims:
                found = self._gathered.get((name, dims))
                kept[name, dims] = whole_along(self.state[name], layout, dims) if found is None else found
        self._gathered = kept

    def _stated(self, target: Target) -> dict[str, Tensor]:
        """What the map states a value for."""
        device = next((tensor.device for tensor in self.state.values()), torch.device("cpu"))
        value = stated(target, self.adapter.complement.entries, device, self.dtype)
        return {target.name: value} if isinstance(target.stored, Raw) else encoded(target, value)


class _Making:
    """One stored tensor on this process."""

    def __init__(self, export: Export, target: Target, links: Sequence[Link], image: Image) -> None:
        self.export, self.target, self.links = export, target, links
        self.load = export.load
        self.image = image
        self.layout = Layout(target.shape)
        mesh = export.layouts[links[0].source].mesh
        sizes = () if mesh is None else tuple(mesh.shape)
        # Along the others there are other tensors, or there is but one rank.
        kept = tuple(dim for dim, size in enumerate(sizes) if size > 1 and dim not in image.apart)
        if mesh is not None and kept:
            ways = tuple(image.ways[dim] for dim in kept) if image.ways else (None,) * len(kept)
            self.layout = Layout(target.shape, export.submesh(mesh, kept), ways)

    def run(self) -> dict[str, Tensor]:
        stored = self.target.stored
        if isinstance(stored, Raw) or self._is_as_held(stored):
            return {self.target.name: self._plain()}
        dtype = self._dtype()
        if self.load is not None or self._is_meta():
            held = payload_layout(self.target.name, stored.storage, self.layout)
            return placeholders(self.target, stored, held, dtype, self._device(), self.export.dtypes)
        return encoded(self.target, self._whole())

    def _is_as_held(self, codec: Codec) -> bool:
        """Whether a tensor of a dtype that the map states has that dtype in the model: it is moved."""
        return isinstance(codec, Cast) and all(
            self.export.state[link.source].dtype is codec.dtype for link in self.links
        )

    def _plain(self) -> Tensor:
        """The tensor as it is: itself, a view of the model's memory, or made of it."""
        (link, *others) = self.links
        tensor = self.export.state[link.source]
        if not others and link.is_rename and tuple(tensor.shape) == self.target.shape:
            return tensor
        local = None if others or self.image.gathered else self._view(link)
        if local is not None and self.load is not None and not local.is_meta:
            self._give_out(local, in_place=self.export.in_place(link.source))
        elif local is not None:
            local = contiguous_copy(local)
        else:
            local = self._filled(self.layout)
        return joined(local, self.layout)

    def _give_out(self, local: Tensor, *, in_place: bool) -> None:
        if self.load is not None and in_place:
            self.load.views[self.target.name] = local
            self.load.into.setdefault(self.links[0].source, set()).add(self.target.name)

    def _view(self, link: Link) -> Tensor | None:
        """What this process has of the tensor as a view of the model's memory, if it is one."""
        source, layout = self.export.source(link.source, frozenset())
        parts = [(block, ranges) for block in layout.blocks() for ranges in link.within("source", block.box)]
        if len(parts) != 1:
            return None
        view = as_target(source, parts[0][0], link, parts[0][1])
        return view if view is not None and tuple(view.shape) == self.layout.local_shape else None

    def _filled(self, layout: Layout) -> Tensor:
        """What this process has of the tensor, or is to have, made of what it has of the model's."""
        local = made_for(layout, self.links, self._dtype(), self._device())
        if self.load is None and not local.is_meta:
            self.export.gather(list(dict.fromkeys(link.source for link in self.links)), self.image.gathered)
            fill(local, layout.blocks(), self.links, self._window)
        return local

    def _whole(self) -> Tensor:
        """All of the tensor: a format of blocks has one scale for elements of several ranks."""
        local = self._filled(self.layout)
        if any(way is not None for way in self.layout.ways):
            every = frozenset(range(len(self.layout.ways)))
            return whole_along(joined(local, self.layout), self.layout, every)
        return local

    def _window(self, name: str, box: Box) -> Window:
        local, layout = self.export.source(name, self.image.gathered)
        return local, layout.blocks()

    def _dtype(self) -> torch.dtype:
        dtype = self.export.trace.dtype(self.target)
        assert dtype is not None  # what the model lacks makes nothing
        return dtype

    def _device(self) -> torch.device:
        return local_of(self.export.state[self.links[0].source]).device

    def _is_meta(self) -> bool:
        return self._device().type == "meta"


__all__ = ["Export"]
