"""Shapes as the runtime's patterns write them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mapdsl.compiler import ir
from mapdsl.compiler.shapes import with_padded_axes
from mapdsl.emit.expressions import local
from mapdsl.language import tree
from mapdsl.language.rewrite import rewrite
from mapdsl.language.unparse import unparse_shape


def pattern_of(shape: tree.Shape) -> str:
    """A shape as a pattern, axes by their local names, with no word on which of them are copies."""

    def change(node: tree.Node) -> tree.Node:
        is_named = isinstance(node, tree.Axis) and node.name is not None
        return replace(node, name=local(node.name), repeat=False) if is_named else node  # type: ignore

    return unparse_shape(rewrite(with_padded_axes(shape), change))[1:-1]


def named_axes(shapes: Iterable[tree.Shape]) -> list[str]:
    """The axes of some shapes that have names, each once; a padded one as such."""
    axes = (axis.name for shape in shapes for axis in ir.axes_of(with_padded_axes(shape)))
    return list(dict.fromkeys(name for name in axes if name))


def holds_sum(dimension: tree.Dimension) -> bool:
    """Whether a dimension is made of terms: with one of them empty its size would not tell that."""
    return isinstance(dimension, tree.Sum) or any(isinstance(f, tree.Sum) for f in getattr(dimension, "factors", ()))
