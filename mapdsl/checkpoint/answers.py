"""What the names of a checkpoint answer to the `has(...)` of a map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mapdsl.compiler.check import Checked
from mapdsl.compiler.formula import show
from mapdsl.compiler.names import patterns, read
from mapdsl.language import tree


def has_answers(checked: Checked, names: Mapping[str, Any]) -> dict[str, bool]:
    """The answers of every `has(...)` of a map, by its text, for the names of a checkpoint."""
    answers: dict[str, bool] = {}
    for param in checked.map.params.values():
        for node in _has_nodes(param.value):
            shapes = patterns(node.template)
            answers[show(node)] = any(read(p, name) is not None for name in names for p in shapes)
    return answers


def _has_nodes(expr: tree.Expr) -> Iterator[tree.Has]:
    match expr:
        case tree.Has():
            yield expr
        case tree.Default(options=items) | tree.Operation(operands=items) | tree.Call(arguments=items):
            for item in items:
                yield from _has_nodes(item)
