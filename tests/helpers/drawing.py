"""Whole states of one side of a map, as the reference interpreter sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from mapdsl.compiler import ir
from mapdsl.compiler.shapes import name_axes
from mapdsl.language import tree
from tests.helpers.elements import Match, State, extent, move
from tests.helpers.reference import Reference, is_wild


def draw(reference: Reference, side: int, free: Mapping[str, int], fill: Callable[[list[int]], Tensor]) -> State:
    """A whole state of one side: every match that holds, its free axes of the sizes given.

    Constants and ties have their values; where copies stand on this side, the other side is drawn and moved over.
    """
    state = State()
    ties: list[Match] = []
    for match in reference._matches():
        rule = match.rule
        if not match.holds or is_wild(rule, reference.map) or reference._is_empty(match):
            continue
        if rule.value is not None:
            if isinstance(rule.value.content, tree.Template):
                ties.append(match)
            elif rule.sides[side]:
                reference._make(match, side, state)
            continue
        if _has_copies(match, side, reference.map):
            other = State()
            _fill(reference, match, 1 - side, free, fill, other)
            move(reference, match, 1 - side, other, state)
        else:
            _fill(reference, match, side, free, fill, state)
    for match in ties:
        assert match.rule.value is not None and isinstance(match.rule.value.content, tree.Template)
        for tensor in match.rule.sides[side]:
            for name, _ in reference._names(match, side, tensor):
                state[name] = state[reference._spell(match.rule.value.content, match.values)]
    return state


def _has_copies(match: Match, side: int, resolved: ir.Map) -> bool:
    """Whether the copies of a rule stand on this side."""
    axes: set[str] = set()
    for tensor in match.rule.sides[side]:
        axes |= set(name_axes(tensor.template, resolved.indices))
        axes |= {axis.name for axis in ir.axes_of(tensor.shape) if axis.name} if tensor.shape else set()
    return bool(axes & match.layout.repeated)


def _fill(
    reference: Reference,
    match: Match,
    side: int,
    free: Mapping[str, int],
    fill: Callable[[list[int]], Tensor],
    state: State,
) -> None:
    sizes = reference._sizes(match, [], free)
    shapes = match.layout.shapes[side] or tuple(t.shape for t in match.rule.sides[side])
    for tensor, shape in zip(match.rule.sides[side], shapes, strict=True):
        extents = [3] if shape is None else [extent(d, sizes) for d in shape.dimensions]
        for name, _ in reference._names(match, side, tensor):
            state[name] = fill(extents)
