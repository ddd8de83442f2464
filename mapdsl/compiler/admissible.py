"""What configs a map is proved for: integers from 0 where it counts, and index tables of distinct numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mapdsl.compiler import ir
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic, MapError
from mapdsl.language.source import Span


def check_admissible(resolved: ir.Map, fields: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """MapError C505 or N118 where fields of a config, or values of params, are none that the proofs speak of."""
    for path, value in fields.items():
        if isinstance(value, int) and value < 0:
            _refuse("C505", f"the config's `{path}` is {value}; expected an integer from 0", _reader(resolved, path))
    for name in _counted(resolved):
        fractions = [v for v in _elements(values.get(name)) if isinstance(v, float)]
        if fractions:
            message = f"`{name}` holds {fractions[0]}, where the map counts or compares; expected an integer"
            _refuse("N118", message, resolved.params[name].span)
    for name in index_tables(resolved):
        numbers = _elements(values.get(name))
        bad = [v for v in numbers if type(v) is not int or v < 0]
        if bad:
            message = f"`{name}` holds {bad[0]!r}, but is an index table; expected integers from 0"
            _refuse("C505", message, resolved.params[name].span)
        if len(set(numbers)) < len(numbers):
            twice = next(number for number in numbers if numbers.count(number) > 1)
            message = f"`{name}` holds {twice} twice, so two tensors would have one name"
            _refuse("C505", message, resolved.params[name].span)


def index_tables(resolved: ir.Map) -> list[str]:
    """The list params whose elements stand in names: `{A[a]}`."""
    found: dict[str, None] = {}
    for rule in resolved.rules:
        for tensor in (*rule.left, *rule.right):
            for part in tensor.template.parts:
                match part:
                    case tree.NumberHole(value=tree.Lookup(value=tree.Name(path=name))) if name in resolved.params:
                        found[name] = None
    return list(found)


def _refuse(code: str, message: str, span: Span | None) -> None:
    raise MapError([Diagnostic(code, message, (span,) if span else ())])


def _reader(resolved: ir.Map, path: str) -> Span | None:
    return next((param.span for param in resolved.params.values() if path in ir.names_in(param.value)), None)


def _elements(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _counted(resolved: ir.Map) -> list[str]:
    """The params that guards, ranges, names and shapes are made of, by way of other params too."""
    found: dict[str, None] = {}
    waiting = [name for expr in _counting(resolved) for name in ir.names_in(expr)]
    shapes = [t.shape for rule in resolved.rules for t in (*rule.left, *rule.right) if t.shape is not None]
    waiting += [axis.name for shape in shapes for axis in ir.axes_of(shape) if axis.name]
    while waiting:
        name = waiting.pop()
        if name in resolved.params and name not in found:
            found[name] = None
            waiting += ir.names_in(resolved.params[name].value)
    return list(found)


def _counting(resolved: ir.Map) -> Iterator[tree.Expr]:
    for index in resolved.indices.values():
        yield from (bound for bound in (index.lower, index.upper) if bound is not None)
    guards = [*(rule.guard for rule in resolved.rules), *(accept.guard for accept in resolved.accepts)]
    yield from (guard for guard in guards if guard is not None)
    for template in (t.template for rule in resolved.rules for t in (*rule.left, *rule.right)):
        yield from (part.value for part in template.parts if isinstance(part, tree.NumberHole))
