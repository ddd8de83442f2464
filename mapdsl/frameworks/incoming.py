"""Stored tensors into a live model, on all ranks of a job: each makes what it holds of the model's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from mapdsl.frameworks.layouts import Block, Layout, joined, local_of, slices
from mapdsl.frameworks.live import MissingTensorsError, State, check_stated, stated, whole_along
from mapdsl.frameworks.moves import Window, fill, made_for
from mapdsl.frameworks.stored import decoded
from mapdsl.runtime.adapter import Adapter
from mapdsl.runtime.codecs.strided import contiguous
from mapdsl.runtime.complement import Raw
from mapdsl.runtime.errors import ConversionError, some_of
from mapdsl.runtime.links import Box, Link, common, whole_box
from mapdsl.runtime.tracing import Source, Target, trace


class Import:
    """The tensors of the model that a state of stored tensors makes, on this process.

    `layout` says how a tensor of the model is to be held, by what it is and the layouts of what it comes from. Raises
    MissingTensorsError, before anything is made, where tensors that this process needs are not there.
    """

    def __init__(
        self,
        adapter: Adapter,
        state: State,
        *,
        dtype: torch.dtype,
        partial: bool,
        layout: Callable[[Target, Iterator[Layout]], Layout],
    ) -> None:
        self.adapter, self.state, self.dtype = adapter, state, dtype
        self.trace = trace(adapter, adapter.LEFT, state, dtype=dtype, partial=partial)
        self.layouts = {name: self._payload_layout(one) for name, one in self.trace.sources.items() if one.is_there}
        self.layout_of = layout
        self._wholes: dict[str, Tensor] = {}

    def _payload_layout(self, source: Source) -> Layout:
        payload = self.state[source.parts[0]]
        return Layout.of(source.parts[0], payload)

    def run(self, is_filled: Callable[[str], bool]) -> tuple[dict[str, Tensor], set[str]]:
        """The tensors, and the names of those that are in the model already, as `is_filled` says."""
        self._check_missing()
        check_stated(self.trace, self.state)
        out: dict[str, Tensor] = {}
        filled: set[str] = set()
        for target in self.trace.targets.values():
            if is_filled(target.name) and not target.has_zeros:  # these have not been written
                filled.add(target.name)
            else:
                out[target.name] = self._made(target)
        return out, filled

    def _check_missing(self) -> None:
        if not self.trace.lacking:
            return
        known = {link.source for target in self.trace.targets.values() for link in target.links()}
        missing = [name for name in self.trace.lacking if name not in known]
        for target in self.trace.targets.values():
            layout = self._layout(target)
            for link in target.links():
                if link.source in self.trace.lacking and any(link.within("target", b.box) for b in layout.blocks()):
                    missing.append(link.source)
        if missing:
            listed = sorted(set(missing))
            what = f"{len(listed)} tensors that this process needs are missing" if len(listed) > 1 else "is missing"
            names = some_of(listed)
            raise MissingTensorsError("R605", f"{what}: {names}" if len(listed) > 1 else f"{names} {what}")

    def _layout(self, target: Target) -> Layout:
        sources = dict.fromkeys(link.source for link in target.links())
        return self.layout_of(target, (self.layouts[name] for name in sources if name in self.layouts))

    def _made(self, target: Target) -> Tensor:
        links = list(target.links())
        layout = self._layout(target)
        if not links:
            value = stated(target, self.adapter.complement.right, self._device(links), self.dtype)
            return self._cut(value, layout)
        if len(links) == 1 and (renamed := self._renamed(links[0], target, layout)) is not None:
            return renamed
        dtype = self.trace.dtype(target)
        local = made_for(layout, links, dtype or self.dtype, self._device(links))
        if not local.is_meta:
            self._wholes = {}
            if layout.mesh is None:  # all ranks need all of it
                parts = dict.fromkeys(part for link in links for part in self.trace.sources[link.source].parts)
                self._wholes = {part: one for part in parts if (one := self._gathered(part)) is not None}
            fill(local, layout.blocks(), links, self._window)
        return joined(local, layout)

    def _device(self, links: Sequence[Link]) -> torch.device:
        """That of what a tensor comes from; a rank that has no part of it has nothing of that."""
        sources = (self.trace.sources[link.source] for link in links)
        tensors = (self.state[source.parts[0]] for source in sources if source.is_there)
        found = next(itertools.chain(tensors, self.state.values()), None)
        return torch.device("cpu") if found is None else local_of(found).device

    def _renamed(self, link: Link, target: Target, layout: Layout) -> Tensor | None:
        """The tensor itself, where it is stored as the model has it."""
        source = self.trace.sources[link.source]
        if not (link.is_rename and isinstance(source.stored, Raw) and source.shape == target.shape):
            return None
        tensor = self.state[source.parts[0]]
        return tensor if self.layouts[source.name] == layout else None

    def _cut(self, tensor: Tensor, layout: Layout) -> Tensor:
        """This process's part of a tensor that it has all of."""
        if layout.mesh is None:
            return tensor
        local = torch.empty(layout.local_shape, dtype=tensor.dtype, device=tensor.device)
        for block in layout.blocks():
            local[block.place(block.box)].copy_(tensor[slices(block.box)])
        return joined(local, layout)

    # --- stored tensors ---

    def _gathered(self, part: str) -> Tensor | None:
        """All of a stored tensor that ranks hold in shares: all of them take part. None for one that is whole."""
        layout = Layout.of(part, self.state[part])
        every = frozenset(range(len(layout.ways)))
        return whole_along(self.state[part], layout, every) if any(layout.ways) else None

    def _at_hand(self, part: str) -> Window:
        whole = self._wholes.get(part)
        if whole is not None:
            return whole, [Block.alone(whole_box(whole.shape))]
        return local_of(self.state[part]), Layout.of(part, self.state[part]).blocks()

    def _window(self, name: str, box: Box) -> Window:
        """All of a box of a stored tensor, decoded."""
        source = self.trace.sources[name]
        if isinstance(source.stored, Raw):
            return self._at_hand(source.parts[0])
        return decoded(source, box, self._box, source.dtype or self.dtype)

    def _box(self, part: str, box: Box) -> Tensor:
        """A box of a stored part, contiguous."""
        local, blocks = self._at_hand(part)
        for block in blocks:
            if common(block.box, box) == box:
                return contiguous(local[block.place(box)])
        raise ConversionError("R605", f"this process has not all of {part} that it needs, which is {list(box)}")

    def beside(self, asked: Collection[str]) -> set[str]:
        """What is made though the model is without it: what the map states, and a tied head where it has the other."""
        first: dict[int, str] = {}
        out = set()
        for target in self.trace.targets.values():
            other = first.setdefault(id(target.traced), target.name) if target.traced is not None else None
            if target.name not in asked and (other is None or (other != target.name and other in asked)):
                out.add(target.name)
        return out

    @cached_property
    def expected(self) -> set[str]:
        """The names of what is made."""
        return set(self.trace.targets)


__all__ = ["Import"]
