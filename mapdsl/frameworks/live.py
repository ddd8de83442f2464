"""What a conversion of a live model's state shares with the one back: what a load gave out, and what maps state.

What converts is the compiled adapter, traced: links say which elements of which tensor each one is (`outgoing`,
`incoming`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mapdsl.frameworks.layouts import Block, Layout, local_of, slices
from mapdsl.frameworks.moves import seen
from mapdsl.runtime.adapter import Adapter
from mapdsl.runtime.complement import Raw
from mapdsl.runtime.dtensors import as_bytes, is_dtensor
from mapdsl.runtime.errors import ConversionError, some_of
from mapdsl.runtime.fitting import only_zeros, same_bytes
from mapdsl.runtime.links import Link, joined_axes, whole_region
from mapdsl.runtime.made_names import lacking
from mapdsl.runtime.tracing import Source, Target, Trace, trace

State = Mapping[str, Tensor]


EXTRA_STATE = "_extra_state"


def apart(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors that a map speaks of, out of any graph, and what modules keep besides."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or name.endswith(EXTRA_STATE):
            others[name] = value
        else:
            tensors[name] = value.detach() if value.requires_grad else value
    return tensors, others


class MissingTensorsError(ConversionError, RuntimeError):
    """Tensors of a checkpoint that this process needs and that are not there."""


@contextmanager
def telling_what_is_missing() -> Iterator[None]:
    """What tells of missing tensors is a RuntimeError, too."""
    try:
        yield
    except ConversionError as problem:
        if problem.code != "R605" or isinstance(problem, MissingTensorsError):
            raise
        raise MissingTensorsError(problem.code, problem.message, problem.rule) from None


def refuse_lacking(lacking: Iterable[str]) -> None:
    """Raise MissingTensorsError for tensors of the model that stored ones are made of, if there are any."""
    missing = list(lacking)
    if missing:
        raise MissingTensorsError("R605", f"stored tensors are made of others with them, missing: {some_of(missing)}")


def check_readable(adapter: Adapter, state: State, *, partial: bool) -> None:
    """Hold a checkpoint's names against those that reading needs; as of `Adapter.read`, with `partial` a part of them.

    Raises MissingTensorsError for tensors that are missing, telling of others that no rule reads: they may be the same
    under other names. C504 where some tensors have values and others are meta tensors: no conversion is of both.
    """
    missing = lacking(adapter, state, partial=partial)
    if missing:
        many = f"{len(missing)} tensors are missing" if len(missing) > 1 else "a tensor is missing"
        raise MissingTensorsError("R605", f"{many}: {some_of(missing)}{_unread(adapter, state)}")
    blank = [name for name, tensor in state.items() if tensor.is_meta]
    if 0 < len(blank) < len(state):
        raise ConversionError("C504", f"meta tensors among others, they have no values: {some_of(blank)}")


def _unread(adapter: Adapter, state: State) -> str:
    try:
        trace(adapter, adapter.LEFT, state, partial=True)
    except ConversionError as problem:
        return f"; {problem.message}" if problem.code == "R603" else ""
    return ""


@dataclass
class Load:
    """What a checkpoint is to be read into: the layouts of the model's tensors, and views of their memory by name.

    `views` are the local tensors that were given out for stored tensors, `into` by the model's tensor those names.
    `found` are the answers of `has(...)` that stored tensors were named by.
    """

    layouts: dict[str, Layout] = field(default_factory=dict)
    views: dict[str, Tensor] = field(default_factory=dict)
    into: dict[str, set[str]] = field(default_factory=dict)
    found: dict[str, bool] = field(default_factory=dict)

    def empty(self) -> set[str]:
        """The tensors of which this process has no element: nothing was asked for them."""
        return {name for name, layout in self.layouts.items() if 0 in layout.local_shape}

    def forget(self, names: set[str]) -> None:
        """Let go of the memory of tensors that have been read."""
        for name in names:
            self.layouts.pop(name, None)
            for part in self.into.pop(name, ()):
                self.views.pop(part, None)

    def is_filled(self, name: str, state: State) -> bool:
        """Whether all that was given out for a tensor of the model came back: it has what was read."""
        views = self.into.get(name)
        return bool(views) and all(part in state and _is_same(state[part], self.views[part]) for part in views or ())


def _is_same(tensor: Tensor, view: Tensor) -> bool:
    """Whether a tensor is a view that was given out: the same memory, seen the same way."""
    local = local_of(tensor)
    seen = (local.shape, local.stride(), local.dtype, local.device)
    if local.is_meta or seen != (view.shape, view.stride(), view.dtype, view.device):
        return False
    return local.data_ptr() == view.data_ptr()


def stated(
    target: Target,
    entries: Mapping[str, tuple[str, object]],
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """A tensor that the map states a value for, in the dtype that it was read in, if it was; `dtype` is of numbers."""
    entry = entries.get(target.name)
    found = getattr(torch, entry[0], None) if entry is not None else None
    if isinstance(target.value, Tensor):
        return target.value.to(device, found or target.value.dtype)
    assert target.value is not None, f"{target.name} comes from nowhere"
    return torch.full(target.shape, target.value, dtype=found or dtype, device=device)


def dtype_of(found: Trace, target: Target, entries: Mapping[str, tuple[str, object]]) -> torch.dtype:
    """The dtype that a tensor has before it is encoded, one that the map states too."""
    if target.traced is None:
        return stated(target, entries, torch.device("meta")).dtype
    return found.dtype(target) or torch.bfloat16


def whole_along(tensor: Tensor, layout: Layout, dims: frozenset[int]) -> Tensor:
    """What this process has of a DTensor that is whole along some dimensions of its mesh; all ranks there take part."""
    detached = tensor.detach()
    assert is_dtensor(detached)
    local: Tensor = as_bytes(detached).redistribute(placements=layout.without(dims).placements()).to_local()
    return local.view(tensor.dtype)


def check_stated(found: Trace, state: State) -> None:
    """Hold tensors against what the map states of them; R601 names what differs.

    A tie is looked at where both tensors are held alike: their shards are equal, then.
    """
    for source in found.sources.values():
        if source.is_there and (source.name in found.values or source.whole.zeros):
            tensor = state[source.parts[0]]
            check_piece(found, source, local_of(tensor), Layout.of(source.name, tensor).blocks())
    for name, other in found.ties.items():
        if other in state and Layout.of(name, state[name]) == Layout.of(other, state[other]):
            one, twin = local_of(state[name]), local_of(state[other])
            if not one.is_meta and one.dtype == twin.dtype and one.data_ptr() != twin.data_ptr():
                same_bytes(name, one, twin, other)


def check_piece(found: Trace, source: Source, local: Tensor, blocks: Sequence[Block]) -> None:
    """Hold blocks of a tensor, as `local` has them, against the values that the map states; R601 where they differ."""
    if local.is_meta or not isinstance(source.stored, Raw):
        return  # what is decoded is not at hand
    if source.name in found.values:
        _check_value(source.name, local, blocks, found.values[source.name])
    for region in source.whole.zeros:
        everything = whole_region(region.shape)
        link = Link(source.name, region.at, source.name, everything.at, joined_axes(region, everything))
        for block in blocks:
            for ranges in link.within("source", block.box):
                only_zeros(seen(local, block, link, "source", ranges), source.name)


def _check_value(name: str, local: Tensor, blocks: Sequence[Block], value: float | Tensor) -> None:
    what = "the value that the map states"
    if not isinstance(value, Tensor):
        same_bytes(name, local, torch.full((), value, dtype=local.dtype, device=local.device).expand(local.shape), what)
        return
    wanted = value.to(local.device, local.dtype)
    for block in blocks:
        same_bytes(name, local[block.place(block.box)], wanted[slices(block.box)], what)


__all__ = [
    "EXTRA_STATE",
    "Load",
    "MissingTensorsError",
    "State",
    "apart",
    "check_piece",
    "check_readable",
    "check_stated",
    "dtype_of",
    "refuse_lacking",
    "stated",
    "telling_what_is_missing",
    "whole_along",
]
