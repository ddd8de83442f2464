"""Tensors of one rank put together from those of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mapdsl.runtime.codecs.storage import Box
from mapdsl.runtime.codecs.strided import copy_strided
from mapdsl.runtime.fitting import same_bytes
from mapdsl.runtime.partial import scaled
from mapdsl.runtime.resharding import Made


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
        out = part_of(states[made.sources[0].rank][made.sources[0].name], made.sources[0].source_box)
    else:
        out = _put_together(made, states, model)
    if compare:
        compare_replicas(name, made, states)
    return scaled(out, *made.scale)


def compare_replicas(name: str, made: Made, states: Sequence[Mapping[str, Tensor]]) -> None:
    """R602 where what one rank holds is not what another does, byte for byte."""
    first = {source.box: source for source in made.sources}
    for replica in made.replicas:
        source = first[replica.box]
        one, other = (part_of(states[part.rank][part.name], part.source_box) for part in (source, replica))
        if not one.is_meta:
            what = f"what another rank holds ({replica.name} of rank {replica.rank})"
            same_bytes(name, one, other.to(one.device), what, "R602")


def _put_together(made: Made, states: Sequence[Mapping[str, Tensor]], model: Tensor) -> Tensor:
    make = torch.empty if made.is_filled else torch.zeros
    out = make(made.shape, dtype=model.dtype, device=model.device)
    for source in made.sources:
        part = part_of(states[source.rank][source.name], source.source_box)
        copy_strided(part_of(out, source.box), part.to(out.device))
    return out


def part_of(tensor: Tensor, box: Box) -> Tensor:
    """A box of a tensor, as a view."""
    return tensor[tuple(slice(begin, end) for begin, end in box)] if box else tensor
