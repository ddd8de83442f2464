"""What a trace says of a conversion, carried out link by link, to be held against what the conversion makes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.complement import Raw
from mapdsl.runtime.links import Link, Side, whole_box
from mapdsl.runtime.tracing import Source, Target, Trace

State = dict[str, Tensor]


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def view_of(tensor: Tensor, link: Link, side: Side) -> Tensor:
    """What a link speaks of, with its axes as dimensions."""
    steps = [0 if dim < 0 else step * tensor.stride(dim) for dim, step in link.along(side)]
    offset = sum(place * step for place, step in zip(link.at(side), tensor.stride(), strict=True))
    return tensor.as_strided([axis.size for axis in link.axes], steps, offset)


def plain(source: Source, state: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """A tensor that was taken, decoded."""
    if isinstance(source.stored, Raw):
        return state[source.parts[0]].contiguous()
    parts = {part: state[name] for part, name in zip(source.stored.names(source.name), source.parts, strict=True)}
    return source.stored.decode(source.name, parts, source.dtype or dtype).contiguous()


def made_of(found: Trace, target: Target, state: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """A tensor as the links of a trace say; what no link fills is zeros."""
    if target.traced is None:
        value = target.value
        assert value is not None
        return value if isinstance(value, Tensor) else torch.full(target.shape, value)
    own = found.dtype(target)
    assert own is not None, target.name
    out, filled = torch.zeros(target.shape, dtype=own), torch.zeros(target.shape, dtype=torch.int8)
    for link in target.links():
        source = plain(found.sources[link.source], state, dtype)
        assert tuple(source.shape) == found.sources[link.source].shape
        value, place = view_of(source, link, "source"), view_of(out, link, "target")
        assert link.within("target", whole_box(target.shape)) == [link.everything] or not value.numel()
        if link.copy:
            assert torch.equal(as_bytes(place), as_bytes(value)), f"{link}: copies differ"
            continue
        assert not view_of(filled, link, "target").any(), f"{link}: filled twice"
        view_of(filled, link, "target").fill_(1)
        place.copy_(value)
    return out


def assert_traced(found: Trace, state: Mapping[str, Tensor], made: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """The conversion made what the trace says: the same names, and each element from where its link says."""
    names = [name for target in found.targets.values() for name in parts_of(target)]
    assert names == list(dict.fromkeys(names)) and set(names) == set(made), set(names) ^ set(made)
    for name, target in found.targets.items():
        expected = made_of(found, target, state, dtype)
        assert tuple(expected.shape) == target.shape
        if isinstance(target.stored, Raw):
            is_stated = target.traced is None
            assert tuple(made[name].shape) == target.shape
            one = made[name].to(torch.float64) if is_stated else made[name]
            other = expected.to(made[name].dtype).to(torch.float64) if is_stated else expected
        else:
            parts = {part: made[part] for part in parts_of(target)}
            one = target.stored.decode(name, parts, expected.dtype)
            other = expected
            if not torch.equal(as_bytes(one), as_bytes(expected)):  # encoded anew, it decodes to what it was
                anew = dict(target.stored.encode(name, expected).parts)
                other = target.stored.decode(name, anew, expected.dtype)
        assert one.dtype == other.dtype, name
        assert torch.equal(as_bytes(one), as_bytes(other)), name


def parts_of(target: Target) -> list[str]:
    """The names under which a target is stored."""
    return list(target.stored.names(target.name)) if isinstance(target.stored, Codec) else [target.name]
