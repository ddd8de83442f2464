"""What a drawn state still needs: equal copies, ties, and some names in a legacy spelling."""

from __future__ import annotations

from random import Random
from typing import Any

import torch

from mapdsl.compiler import ir
from mapdsl.compiler.collide import spell
from mapdsl.compiler.expand import Expansion
from mapdsl.compiler.names import patterns
from mapdsl.language import tree
from mapdsl.runtime.sizes import SizeError, axis_sizes
from mapdsl.testing.bits import bits
from mapdsl.testing.configs import ContradictionError, value_of
from mapdsl.testing.readers import bindings
from mapdsl.testing.reference import Placement
from mapdsl.testing.states import Group, Logical, State, tied_name


def make_copies(expansion: Expansion, group: Group, side: str) -> None:
    """Make the copies of `repeat` equal: tensors by name, places in a shape element by element."""
    layout = expansion.checked.layouts[group.match.rule]
    if not layout.repeated:
        return
    first: dict[object, Logical] = {}
    for tensor in group.tensors:
        key = (tensor.named.place, *(kv for kv in tensor.place[1] if kv[0] not in layout.repeated))
        model = first.setdefault(key, tensor)
        tensor.parts = dict(zip(tensor.parts, model.parts.values(), strict=True))
    number = 0 if side == "left" else 1
    placement = Placement(group.rule, layout, expansion.map.indices, group.sizes)
    for pair in layout.pieces:
        piece = pair[number]
        inside = [axis for axis in piece.axes if axis in layout.repeated]
        for tensor in [t for t in group.tensors if t.named.place == piece.tensor] if inside else []:
            if len(tensor.parts) > 1 or tensor.named.name not in tensor.parts:
                # One byte everywhere: equal blocks under equal scales.
                tensor.parts = {n: torch.ones_like(bits(p)).view(p.dtype) for n, p in tensor.parts.items()}
                continue
            plain = tensor.parts[tensor.named.name]
            view = placement.view(plain, piece, number)
            for axis in inside:
                at = piece.axes.index(axis)
                view.copy_(view.narrow(at, 0, 1).clone().expand_as(view))


def clear_padding(expansion: Expansion, group: Group, side: str) -> None:
    """Make what stands in padding zeros, as it is written. In a format other bytes may decode to zeros."""
    shapes = expansion.checked.layouts[group.match.rule].shapes[side == "right"]
    for tensor in group.tensors:
        shape = shapes[tensor.named.place]
        for place, dimension in enumerate(shape.dimensions if shape is not None else ()):
            if isinstance(dimension, tree.Pad):
                payload = next(iter(tensor.parts.values()))
                elements = tensor.shape[place] // max(1, payload.shape[place])  # that are packed into one
                begin = -(-group.sizes[dimension.axis.name or ""] // max(1, elements))
                bits(payload).narrow(place, begin, payload.shape[place] - begin).zero_()
                group.exact &= tensor.codec is None or tensor.codec.kind in ("raw", "cast")


def clear_zeros(expansion: Expansion, group: Group, side: str) -> None:
    """Make zeros of what the other side lacks. In a format all of the payload is."""
    layout, number = expansion.checked.layouts[group.match.rule], 0 if side == "left" else 1
    placement = Placement(group.rule, layout, expansion.map.indices, group.sizes)
    for piece in layout.zeros[number]:
        for tensor in (tensor for tensor in group.tensors if tensor.named.place == piece.tensor):
            payload = bits(next(iter(tensor.parts.values())))
            if tensor.codec is None or tensor.codec.kind in ("raw", "cast"):
                placement.view(payload, piece, number).zero_()
            elif tensor.codec.kind in ir.QUANTISED:
                payload.zero_()
            else:
                raise ContradictionError(f"what {tensor.codec.name} makes zeros of is not drawn")


def make_ties(expansion: Expansion, state: State) -> None:
    """Tied tensors become those that they equal; a tie needs its twin."""
    known: dict[str, Any] = state.canonical
    for group in state.groups:
        twin = tied_name(group.rule, group.match) if group.rule.value is not None else None
        if twin is None or group.rule.value is None:
            continue
        if twin not in known:
            raise ContradictionError(f"{group.names[0]} is tied to {twin}, which is absent")
        tensor = group.tensors[0]
        if group.rule.value.compared:
            tensor.parts, tensor.shape = {tensor.named.name: known[twin]}, tuple(known[twin].shape)
            group.sizes |= _sizes_of_tie(expansion, group, state.side, tensor)
        else:
            group.exact = False


def _sizes_of_tie(expansion: Expansion, group: Group, side: str, tensor: Logical) -> dict[str, int]:
    """The sizes of a tied tensor's axes; ContradictionError where its twin does not fit them."""
    pattern = expansion.pattern(group.match.rule, side, tensor.named.place)
    try:
        return {} if pattern is None else axis_sizes(pattern, tensor.shape, expansion.sizes(group.match))
    except SizeError as err:
        raise ContradictionError(f"{tensor.named.name} does not fit what it is tied to: {err}") from None


def respell(expansion: Expansion, state: State, rng: Random) -> None:
    """Store some tensors under a legacy spelling."""
    taken = set(state.canonical)
    for accept in expansion.map.accepts:
        if rng.random() < 0.4:
            continue
        for old, new in zip(patterns(accept.old), patterns(accept.new), strict=True):
            for group in state.groups:
                for tensor in group.tensors:
                    _respell_one(expansion, state, accept, (old, new), tensor, taken)


def _respell_one(
    expansion: Expansion, state: State, accept: ir.Accept, pair: tuple[Any, Any], tensor: Logical, taken: set[str]
) -> None:

    old, new = pair
    for values, texts in bindings(expansion, new, tensor.named.name):
        if accept.guard is not None and not value_of(accept.guard, values):
            continue
        key = spell(old, dict(values), texts)
        codec = tensor.codec
        olds = [key] if codec is None or codec.kind == "raw" else codec.names(key)
        if not taken & set(olds):
            state.legacy |= dict(zip(tensor.parts, olds, strict=True))
            taken.update(olds)
