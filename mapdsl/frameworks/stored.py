"""The stored parts of a tensor in a format: to be overwritten, or with values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mapdsl.frameworks.layouts import Block, Layout, joined
from mapdsl.frameworks.moves import Window
from mapdsl.runtime.codecs.base import Codec, Slice
from mapdsl.runtime.codecs.storage import Box, Storage
from mapdsl.runtime.complement import Raw
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.tracing import Source, Target


def placeholders(
    target: Target,
    codec: Codec,
    layout: Layout,
    dtype: torch.dtype,
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    """Tensors of the names, shapes and dtypes that a format stores, to be overwritten.

    The payload is held as `layout` says, by the logical tensor; of the others, which are small, every rank has all.
    `dtypes` are those that stored tensors are known to have: scales may have one of several.
    """
    forms = codec.stored(target.name, target.shape, dtype)
    payload = codec.payload(target.name)
    out = {}
    for name, (usual, shape) in forms.items():
        form = dtypes.get(name, usual)
        if name != payload or layout.mesh is None:
            out[name] = torch.zeros(shape, dtype=form, device=device)
            continue
        held = Layout(shape, layout.mesh, layout.ways)
        local = torch.zeros(held.local_shape, dtype=form, device=device)
        out[name] = joined(local, held)
    return out


def payload_layout(name: str, storage: Storage, layout: Layout) -> Layout:
    """How a payload can be held where the logical tensor is held so: not cut where elements are packed together.

    `ways` of the result are those of the payload; it is not cut along dimensions of the mesh that would cut a word.
    """
    if storage.unfit(layout.shape) is not None:
        raise ConversionError("D401", f"{name}: {storage.unfit(layout.shape)}")
    last = len(layout.shape) - 1
    cutting = [dim for dim, way in enumerate(layout.ways) if way is not None and way.dim == last]
    while cutting and not _cuts_words(storage, layout, cutting):
        layout = layout.without(frozenset({cutting.pop()}))
    return layout


def _cuts_words(storage: Storage, layout: Layout, dims: Sequence[int]) -> bool:
    """Whether some dimensions of the mesh cut the payload's last dimension where they cut the logical one's."""
    payload = storage.part_shapes(layout.shape)["payload"]
    if len(payload) != len(layout.shape):
        return False
    stored = Layout(payload, layout.mesh, layout.ways)
    for places in itertools.product(*(range(layout.sizes[dim]) for dim in dims)):
        at = dict(zip(dims, places, strict=True))
        words = tuple((begin * storage.per, end * storage.per) for begin, end in stored.held(at)[-1])
        if words != layout.held(at)[-1]:
            return False
    return True


def decoded(source: Source, box: Box, read: Callable[[str, Box], Tensor], dtype: torch.dtype) -> Window:
    """A box of a tensor that is stored in a format, decoded to a dtype; `read` gives its stored parts, contiguous."""
    assert not isinstance(source.stored, Raw)
    of = Slice(source.shape, box)
    called = dict(zip(source.stored.names(source.name), source.parts, strict=True))
    parts = {part: read(called[part], own) for part, own in source.stored.cut(source.name, of).items()}
    return source.stored.decode(source.name, parts, dtype, of=of), [Block.alone(box)]


def encoded(target: Target, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor in its format."""
    assert not isinstance(target.stored, Raw)
    return dict(target.stored.encode(target.name, tensor).parts)


__all__ = ["decoded", "encoded", "payload_layout", "placeholders"]
