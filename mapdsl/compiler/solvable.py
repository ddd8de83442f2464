"""Sizes follow in each direction: what the tensors of one side and the config do not tell must not be needed."""

from __future__ import annotations

import re

from mapdsl.compiler import ir
from mapdsl.compiler.shapes import Layout
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic
from mapdsl.language.unparse import unparse_shape
from mapdsl.runtime.sizes import unsolved_axes


def check_sizes(rule: ir.Rule, layout: Layout, resolved: ir.Map) -> list[Diagnostic]:
    """X304 for every axis whose size cannot be found in one direction; N118 for an axis that is no size."""
    found: list[Diagnostic] = []
    if layout.pieces:
        for source, name in enumerate((resolved.left, resolved.right)):
            patterns = [size_pattern(shape) for shape in layout.shapes[source] if shape is not None]
            for axis in sorted(unsolved_axes(patterns, known_axes(rule, resolved))):
                message = f"the size of `{axis}` does not follow from the `{name}` tensors"
                hint = f"declare it: `param {axis} = ...`, or give it a dimension of its own"
                found.append(Diagnostic("X304", message, (rule.span,), help=hint))
    if rule.value is not None and isinstance(rule.value.content, tree.Number) and bool(rule.left) != bool(rule.right):
        found += _constant(rule, resolved)
    return found


def _constant(rule: ir.Rule, resolved: ir.Map) -> list[Diagnostic]:
    """A constant is made from nothing, so its shape is stated and every axis known."""
    found = []
    for tensor in rule.left or rule.right:
        if tensor.shape is None:
            found.append(Diagnostic("X307", "a constant needs a shape", (tensor.span,), help="`KEY [n] = 1`, or `[]`"))
            continue
        for axis in ir.axes_of(tensor.shape):
            if axis.name is not None and axis.name not in known_axes(rule, resolved):
                message = f"the size of `{axis.name}` is not known, so the constant cannot be made"
                found.append(Diagnostic("X304", message, (axis.span,), help=f"declare it: `param {axis.name} = ...`"))
    return found


def known_axes(rule: ir.Rule, resolved: ir.Map) -> set[str]:
    """Axes whose size follows from the config alone."""
    bounded = {name for name, index in resolved.indices.items() if index.upper is not None}
    return set(resolved.params) | bounded | set(rule.enumerations)


def size_pattern(shape: tree.Shape) -> str:
    """A shape as the size solver reads it: `e d (j f)`."""
    return re.sub(r"\brepeat ", "", unparse_shape(shape)[1:-1])
