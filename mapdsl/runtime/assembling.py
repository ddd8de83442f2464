"""Tensors of one rank put together from those of others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mapdsl.runtime.codecs.strided import copy_strided
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.fitting import same_bytes
from mapdsl.runtime.resharding import Made, Source
from mapdsl.runtime.shares import Box


def assembled(
    name: str, made: Made, states: Sequence[Mapping[str, Tensor]], *, compare: bool = True, own: bool = True
) -> Tensor:
    """A tensor put together from the states of all ranks; what several of them hold must be equal (R602).

    It has memory of its own, but without `own` it is a view where it lies in one piece in one of the states.
    """
    rank, like = made.like
    model = states[rank][like]
    if made.value is not None:
        return torch.tensor(made.value, dtype=model.dtype, device=model.device)
    if not own and len(made.sources) == 1 and made.sources[0].box == tuple((0, size) for size in made.shape):
        out = _part(states[made.sources[0].rank][made.sources[0].name], made.sources[0].source_box)
    else:
        out = _filled(name, made, states, model)
    for replica in made.replicas if compare else ():
        other = _of(replica, states, out, name)
        if not out.is_meta:
            what = f"what another rank holds ({replica.name} of rank {replica.rank})"
            same_bytes(name, _part(out, replica.box), other, what, "R602")
    return out


def _filled(name: str, made: Made, states: Sequence[Mapping[str, Tensor]], model: Tensor) -> Tensor:
    filled = sum(math.prod(end - begin for begin, end in source.box) for source in made.sources)
    make = torch.empty if filled == math.prod(made.shape) else torch.zeros
    out = make(made.shape, dtype=model.dtype, device=model.device)
    for source in made.sources:
        copy_strided(_part(out, source.box), _of(source, states, out, name))
    return out


def _of(source: Source, states: Sequence[Mapping[str, Tensor]], out: Tensor, name: str) -> Tensor:
    tensor = states[source.rank][source.name]
    if tensor.dtype != out.dtype:
        message = f"{name}: {source.name} of rank {source.rank} is {tensor.dtype}, of another {out.dtype}"
        raise ConversionError("R606", message)
    return _part(tensor, source.source_box).to(out.device)


def _part(tensor: Tensor, box: Box) -> Tensor:
    return tensor[tuple(slice(begin, end) for begin, end in box)] if box else tensor
