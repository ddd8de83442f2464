"""What a map says of ranks: which axes its meshes cut, and where it speaks of how many ranks there are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from mapdsl.compiler import ir
from mapdsl.compiler.shapes import Layout, name_axes, pieces_of
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic

_OF_RANKS = ("size", "rank")


def check_meshes(resolved: ir.Map, layouts: Sequence[Layout]) -> Iterator[Diagnostic]:
    """P452 for an axis cut twice, P455 for what cannot be cut, N113 for a mesh that is not declared.

    In a map with a mesh every tensor that both sides have needs a shape, X307: without one nothing tells how it is cut.
    """
    yield from _cut_twice(resolved)
    yield from _not_cut(resolved)
    yield from _local_holes(resolved)
    yield from _calls(resolved)
    yield from _partial(resolved)
    yield from _cut_both_ways(resolved, layouts)
    if resolved.meshes:
        yield from _without_shape(resolved, layouts)


def _cut_twice(resolved: ir.Map) -> Iterator[Diagnostic]:
    seen: dict[str, tree.MeshAxis] = {}
    for mesh in resolved.meshes:
        for axis in mesh.axes:
            if axis.name in seen:
                message = f"the axis `{axis.name}` is cut over two mesh dimensions"
                yield Diagnostic("P452", message, (axis.span, seen[axis.name].span))
            seen.setdefault(axis.name, axis)


def _cut_both_ways(resolved: ir.Map, layouts: Sequence[Layout]) -> Iterator[Diagnostic]:
    """P452 for a piece of which one mesh cuts two axes: of what is in both no rank would hold all shares."""
    of = {axis.name: mesh.name for mesh in resolved.meshes for axis in mesh.axes}
    for rule, layout in zip(resolved.rules, layouts, strict=True):
        for side, shapes in zip(rule.sides, layout.shapes, strict=True):
            for tensor, shape in zip(side, shapes, strict=True):
                named = [name for name in name_axes(tensor.template, resolved.indices) if name in of]
                for axes in pieces_of(tensor, shape):
                    cut = sorted({name for name in (*named, *axes) if name in of})
                    for one, other in itertools.combinations(cut, 2):
                        if of[one] == of[other]:
                            message = f"`{of[one]}` cuts two axes of this tensor, `{one}` and `{other}`"
                            advice = "a rank would hold no part of most of it: cut one of them, or over another mesh"
                            yield Diagnostic("P452", message, (tensor.span,), help=advice)


def _not_cut(resolved: ir.Map) -> Iterator[Diagnostic]:
    """Axes whose positions are no range that the config alone tells."""
    spelled = {name for rule in resolved.rules for name in rule.enumerations}
    for axis in (axis for mesh in resolved.meshes for axis in mesh.axes):
        index = resolved.indices.get(axis.name)
        if axis.name in spelled:
            message = f"the positions of `{axis.name}` are spelled in names, they are no numbers to be cut"
            yield Diagnostic("P455", message, (axis.span,))
        if index is not None:
            bounds = [bound for bound in (index.lower, index.upper) if bound is not None]
            if index.upper is None or any(used in resolved.indices for bound in bounds for used in ir.names_in(bound)):
                message = f"the range of `{axis.name}` is not fixed by the config alone, so it cannot be cut"
                yield Diagnostic("P455", message, (axis.span, index.span))


def _local_holes(resolved: ir.Map) -> Iterator[Diagnostic]:
    """`{local e}` counts from what a rank holds first: `e` must be cut, from 0, and tell names apart by itself."""
    cut = {axis.name for mesh in resolved.meshes for axis in mesh.axes}
    for tensor in _tensors(resolved):
        parts = tensor.template.parts
        for hole in (part for part in parts if isinstance(part, tree.NumberHole) and part.local):
            name = hole.value.path if isinstance(hole.value, tree.Name) else ""
            index = resolved.indices.get(name)
            if index is None or name not in cut:
                message = "`local` stands before an index that a mesh cuts"
                yield Diagnostic("P455", message, (hole.span,), help=f"`mesh ep shards {name or 'e'}` cuts it")
            elif index.lower is not None and not _is_zero(index.lower):
                message = f"`{{local {name}}}` counts from 0, but `{name}` does not begin there"
                yield Diagnostic("P455", message, (hole.span, index.span))
            elif any(isinstance(part, tree.WildcardHole) for part in parts):
                yield Diagnostic("P455", "a name with a wildcard cannot count from what a rank holds", (hole.span,))


def _calls(resolved: ir.Map) -> Iterator[Diagnostic]:
    """`size(tp)` and `rank(tp)` stand in guards, `size(tp)` in a pad: params and ranges are the same on all ranks."""
    meshes = {mesh.name for mesh in resolved.meshes}
    pads = [d for t in _tensors(resolved) if t.shape for d in t.shape.dimensions if isinstance(d, tree.Pad)]
    guards = [rule.guard for rule in resolved.rules if rule.guard is not None]
    for call in _calls_in([*guards, *(pad.multiple for pad in pads)]):
        if [argument.path for argument in call.arguments if isinstance(argument, tree.Name)] in ([m] for m in meshes):
            continue
        yield Diagnostic("N113", f"`{call.function}` asks for a mesh of the map", (call.span,))
    for call in _calls_in(pad.multiple for pad in pads):
        if call.function == "rank":
            yield Diagnostic("P455", "all ranks pad to one size, which depends on none of them", (call.span,))
    elsewhere = [param.value for param in resolved.params.values()]
    elsewhere += [accept.guard for accept in resolved.accepts if accept.guard is not None]
    elsewhere += [b for index in resolved.indices.values() for b in (index.lower, index.upper) if b is not None]
    for call in _calls_in(elsewhere):
        message = f"`{call.function}` stands in guards and in `pad`: a map is the same for any number of ranks"
        yield Diagnostic("P455", message, (call.span,))
    for name in _bare([*guards, *(pad.multiple for pad in pads), *elsewhere], meshes):
        message = f"`{name.path}` is a mesh, no number"
        yield Diagnostic("N113", message, (name.span,), help=f"`size({name.path})` is its number of ranks")


def _partial(resolved: ir.Map) -> Iterator[Diagnostic]:
    """`as partial(tp)` stands alone, and for a mesh: nothing tells a share of a value from the value."""
    meshes = {mesh.name for mesh in resolved.meshes}
    for tensor in _tensors(resolved):
        for codec in (one for one in tensor.codecs if one.name == "partial"):
            if tuple(argument.value for argument in codec.arguments) not in {((mesh,),) for mesh in meshes}:
                yield Diagnostic("N113", "`partial` takes a mesh of the map: `partial(tp)`", (tensor.span,))
            elif len(tensor.codecs) > 1:
                message = "nothing tells a share of a value from the value: `partial` is no alternative"
                yield Diagnostic("D407", message, (tensor.span,), help="leave out the others")


def _without_shape(resolved: ir.Map, layouts: Sequence[Layout]) -> Iterator[Diagnostic]:
    for rule, layout in zip(resolved.rules, layouts, strict=True):
        shapes = [shape for side in layout.shapes for shape in side]
        if rule.arrow == "<->" and None in shapes:
            message = "in a map with a mesh every tensor needs a shape"
            yield Diagnostic("X307", message, (rule.span,), help="write it as `KEY [f d]`: its axes say how it is cut")


def cut_routers(resolved: ir.Map, layouts: Sequence[Layout]) -> Iterator[Diagnostic]:
    """L708 for an index of names, of experts say, that is cut in a shape of both sides: every rank needs all of it.

    A stack of matrices on both sides is none of a router's.
    """
    cut = {axis.name for mesh in resolved.meshes for axis in mesh.axes} & set(resolved.indices)
    for rule, layout in zip(resolved.rules, layouts, strict=True):
        named = {*layout.matched, *layout.in_names[0], *layout.in_names[1]}
        for name in sorted(cut - named):
            shapes = [[shape for shape in side if shape is not None] for side in layout.shapes]
            if any(len(shape.dimensions) > 2 for side in shapes for shape in side):
                continue
            if all(any(axis.name == name for shape in side for axis in ir.axes_of(shape)) for side in shapes):
                message = f"`{name}` is cut here too, though nothing is stacked: is this a router, whole on every rank?"
                advice = "then give its axis a name of its own, `[x d]`"
                yield Diagnostic("L708", message, (rule.span,), help=advice)


def _bare(exprs: Iterable[tree.Expr], meshes: set[str]) -> Iterator[tree.Name]:
    """Names of meshes outside of `size` and `rank`."""
    pending = list(exprs)
    while pending:
        expr = pending.pop()
        if isinstance(expr, tree.Name) and expr.path in meshes:
            yield expr
        pending += () if isinstance(expr, tree.Call) and expr.function in _OF_RANKS else ir.children(expr)


def _calls_in(exprs: Iterable[tree.Expr]) -> Iterator[tree.Call]:
    pending = list(exprs)
    while pending:
        expr = pending.pop()
        if isinstance(expr, tree.Call) and expr.function in _OF_RANKS:
            yield expr
        pending += ir.children(expr)


def _tensors(resolved: ir.Map) -> Iterator[ir.Tensor]:
    return (tensor for rule in resolved.rules for tensor in (*rule.left, *rule.right))


def _is_zero(bound: tree.Expr) -> bool:
    return isinstance(bound, tree.Number) and bound.value == 0
