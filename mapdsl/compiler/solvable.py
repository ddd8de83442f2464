"""Sizes follow in each direction: what the tensors of one side and the config do not tell must not be needed."""

from __future__ import annotations

import re

from mapdsl.compiler import ir
from mapdsl.compiler.codecs import AnyCodec, codec_key
from mapdsl.compiler.shapes import Layout, name_axes, with_padded_axes
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic
from mapdsl.language.unparse import unparse_shape
from mapdsl.runtime.shares import padded
from mapdsl.runtime.sizes import unsolved_axes


def check_sizes(rule: ir.Rule, layout: Layout, resolved: ir.Map) -> list[Diagnostic]:
    """X304 for every axis whose size cannot be found in one direction; N118 for an axis that is no size."""
    found = _dependent_ranges(rule, layout, resolved)
    known = known_axes(rule, resolved)
    for source, name in enumerate((resolved.left, resolved.right)):
        patterns = [[size_pattern(shape) for shape in layout.shapes[source] if shape is not None]]
        if not layout.pieces:
            patterns = [[pattern] for pattern in _held_against(rule, layout, source)]
        unsolved = {axis for group in patterns for axis in unsolved_axes(group, known)}
        for axis in sorted(unsolved | _lacking(rule, layout, resolved, source)):
            message = f"the size of `{axis}` does not follow from the `{name}` tensors"
            hint = f"declare it: `param {axis} = ...`, or give it a dimension of its own"
            found.append(Diagnostic("X304", message, (rule.span,), help=hint))
    return found


def _lacking(rule: ir.Rule, layout: Layout, resolved: ir.Map, source: int) -> set[str]:
    """Axes of zeros that the other side is made with, and that `source` does not have."""
    known = known_axes(rule, resolved)
    here = {axis.name for shape in layout.shapes[source] if shape is not None for axis in ir.axes_of(shape)}
    axes = {axis for piece in layout.zeros[1 - source] for axis in piece.axes if not axis[0].isdigit()}
    return axes - known - here


def _held_against(rule: ir.Rule, layout: Layout, source: int) -> list[str]:
    """Shapes that tensors which are not moved are held against, each by itself; told of one side of a rename.

    A number that fills a tensor needs every size of it, which is seen to where it is made.
    """
    if rule.arrow != "<->" or (source == 1 and rule.left):
        return []
    if rule.value is not None and isinstance(rule.value.content, tree.Number):
        return []
    return [size_pattern(shape) for shape in layout.shapes[source] if shape is not None]


def _dependent_ranges(rule: ir.Rule, layout: Layout, resolved: ir.Map) -> list[Diagnostic]:
    """A range that depends on an index has one length for each match only if that index is part of the match."""
    used = {a for side in rule.sides for t in side for a in name_axes(t.template, resolved.indices)}
    shapes = [shape for side in layout.shapes for shape in side if shape is not None]
    used |= {axis.name for shape in shapes for axis in ir.axes_of(shape) if axis.name is not None}
    for name in sorted(used & resolved.indices.keys()):
        index = resolved.indices[name]
        bounds = [bound for bound in (index.lower, index.upper) if bound is not None]
        for other in (n for bound in bounds for n in ir.names_in(bound) if n in resolved.indices):
            if other not in layout.matched:
                message = f"the range of `{name}` depends on `{other}`, which does not stand in the names of both sides"
                return [Diagnostic("X304", message, (rule.span, index.span))]
    return []


def check_fit(rule: ir.Rule, layout: Layout, codecs: dict[str, AnyCodec]) -> list[Diagnostic]:
    """D401 for every tensor whose stated shape its codec cannot hold."""
    found: list[Diagnostic] = []
    for side, shapes in zip(rule.sides, layout.shapes, strict=True):
        for tensor, shape in zip(side, shapes, strict=True):
            for codec in (codecs[codec_key(spec)] for spec in tensor.codecs):
                if shape is not None and len(shape.dimensions) < codec.needs_dimensions():
                    needed = f"`{codec.name}` needs {codec.needs_dimensions()} dimensions"
                    message = f"{needed}, but the tensor has the shape {unparse_shape(shape)}"
                    found.append(Diagnostic("D401", message, (tensor.span,)))
    return found


def known_axes(rule: ir.Rule, resolved: ir.Map) -> set[str]:
    """Axes whose size follows from the config alone."""
    bounded = {name for name, index in resolved.indices.items() if index.upper is not None}
    return set(resolved.params) | {padded(name) for name in resolved.params} | bounded | set(rule.enumerations)


def size_pattern(shape: tree.Shape) -> str:
    """A shape as the size solver reads it: `e d (j f)`."""
    return re.sub(r"\brepeat ", "", unparse_shape(with_padded_axes(shape))[1:-1])
