"""Values of expressions: what a param, an index bound or a guard says for one config.

The semantics is that of Python, without its leniencies: a boolean is no number, a position is never negative, and
`and`, `or` and `not` take booleans only.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from mapdsl.compiler.ir import names_in
from mapdsl.language import tree
from mapdsl.language.rewrite import rewrite
from mapdsl.language.tree import Expr


class EvaluationError(Exception):
    """An expression has no value: a type that does not fit, a position outside of its list, a division by zero."""

    def __init__(self, message: str, expr: Expr) -> None:
        super().__init__(message)
        self.message = message
        self.expr = expr


class MissingValueError(EvaluationError):
    """A name is absent, or null. This is what `??` is for."""


def evaluate(expr: Expr, values: Mapping[str, Any]) -> Any:
    """The value of `expr`; raises `EvaluationError`.

    `values` holds params, indices and config fields under their names (a nested field under its dotted path). What the
    caller alone can know stands there under its text: `has(lm_head.weight)`, `size(tp)`.
    """
    match expr:
        case tree.Number(value=value) | tree.String(value=value) | tree.Boolean(value=value):
            return value
        case tree.ListLiteral(items=items):
            return [evaluate(item, values) for item in items]
        case tree.Name(path=path):
            return _present(values.get(path), expr)
        case tree.Has():
            return _boolean(_present(values.get(show(expr)), expr), expr)
        case tree.Lookup(value=value, index=index):
            return _element(evaluate(value, values), evaluate(index, values), expr)
        case tree.Call():
            return _call(expr, values)
        case tree.Default(options=options):
            return _first_present(options, values)
        case tree.Operation():
            return _operation(expr, values)


def evaluate_params(
    params: Mapping[str, Expr], config: Mapping[str, Any], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The values of all params, in any order of declaration; `given` ones win over their definitions.

    `config` holds the fields under dotted paths. Raises `EvaluationError`, also where params need each other in a ring.
    """
    known: dict[str, Any] = dict(given or {})

    def resolve(name: str, needed_by: tuple[str, ...]) -> Any:
        if name not in known:
            definition = params[name]
            scope = dict(config)
            for other in names_in(definition):
                if other in params and other != name:
                    if other in needed_by:
                        raise EvaluationError(f"params need each other: {', '.join(needed_by)}", definition)
                    scope[other] = resolve(other, (*needed_by, other))
            known[name] = evaluate(definition, scope)
        return known[name]

    for name in params:
        resolve(name, (name,))
    return known


# --- expressions as text and as trees ------------------------------------------------------------------------------


def show(node: Expr | tree.Template) -> str:
    """One text for equal expressions, close to how they are written; operands that are no atoms stand in brackets."""
    match node:
        case tree.Number(value=value):
            return str(value)
        case tree.String(value=value):
            return f'"{value}"'
        case tree.Boolean(value=value):
            return "true" if value else "false"
        case tree.ListLiteral(items=items):
            return f"[{', '.join(map(show, items))}]"
        case tree.Name(path=path):
            return path
        case tree.Lookup(value=value, index=index):
            return f"{_show_operand(value)}[{show(index)}]"
        case tree.Call(function=function, arguments=arguments):
            return f"{function}({', '.join(map(show, arguments))})"
        case tree.Has(template=template):
            return f"has({show(template)})"
        case tree.Default(options=options):
            return " ?? ".join(map(_show_operand, options))
        case tree.Operation(operator=symbol, operands=(operand,)):
            return f"{'not ' if symbol == 'not' else symbol}{_show_operand(operand)}"
        case tree.Operation(operator=symbol, operands=operands):
            return f" {symbol} ".join(map(_show_operand, operands))
        case tree.Template(parts=parts):
            return "".join(map(_show_part, parts))


def rename(expr: Expr, names: Mapping[str, str]) -> Expr:
    """The expression with some of its names replaced, all at once: the indices of a second rule are set apart so."""

    def change(node: Any) -> Any:
        if isinstance(node, tree.Name) and node.path in names:
            return tree.Name(names[node.path], span=node.span)
        return node

    return rewrite(expr, change)


def _show_operand(expr: Expr) -> str:
    text = show(expr)
    return f"({text})" if isinstance(expr, (tree.Operation, tree.Default)) else text


def _show_part(part: tree.Part) -> str:
    match part:
        case tree.Text(text=text):
            return text
        case tree.NumberHole(value=value, local=local, repeat=repeat):
            return f"{{{'local ' * local}{'repeat ' * repeat}{show(value)}}}"
        case tree.EnumHole(name=name, spellings=spellings, repeat=repeat):
            return f"{{{'repeat ' * repeat}{name}:{'|'.join(spellings)}}}"
        case tree.WildcardHole(name=name, many=many):
            return f"{{{name + ':' if name else ''}{'..' if many else '*'}}}"


# --- operations ----------------------------------------------------------------------------------------------------

_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}
_TOO_LARGE = 1 << 1024
_ORDER: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def _operation(expr: tree.Operation, values: Mapping[str, Any]) -> Any:
    symbol, operands = expr.operator, expr.operands
    if symbol in ("and", "or"):
        ends_with = symbol == "or"
        for operand in operands:
            if _boolean(evaluate(operand, values), operand) is ends_with:
                return ends_with
        return not ends_with
    if symbol == "not":
        return not _boolean(evaluate(operands[0], values), operands[0])
    results = [evaluate(operand, values) for operand in operands]
    if symbol in ("==", "!="):
        return (results[0] == results[1]) is (symbol == "==")
    if symbol == "in":
        return results[0] in _list(results[1], operands[1])
    for result, operand in zip(results, operands, strict=True):
        _number(result, operand)
    if symbol in _ORDER:
        return _ORDER[symbol](*results)
    if len(results) == 1:
        return -results[0]
    total = results[0]
    for result in results[1:]:
        if symbol in ("//", "%") and not result:
            raise EvaluationError("division by zero", expr)
        try:
            total = _ARITHMETIC[symbol](total, result)
        except OverflowError:  # an integer that no float can hold
            total = math.inf
        # Params multiplied in a chain double their digits at every step: no size of a tensor is near this.
        if abs(total) >= _TOO_LARGE:
            raise EvaluationError(f"{show(expr)} is absurdly large", expr)
    return total


def _call(expr: tree.Call, values: Mapping[str, Any]) -> Any:
    function, arguments = expr.function, expr.arguments
    if function == "len" and len(arguments) == 1:
        return len(_sequence(evaluate(arguments[0], values), arguments[0]))
    if function == "positions" and len(arguments) == 2:
        sought = evaluate(arguments[1], values)
        items = _sequence(evaluate(arguments[0], values), arguments[0])
        return [position for position, item in enumerate(items) if item == sought]
    return _present(values.get(show(expr)), expr)


def _first_present(options: tuple[Expr, ...], values: Mapping[str, Any]) -> Any:
    for option in options[:-1]:
        with suppress(MissingValueError):
            return evaluate(option, values)
    return evaluate(options[-1], values)


def _element(items: Any, position: Any, expr: tree.Lookup) -> Any:
    items = _list(items, expr.value)
    if not isinstance(position, int) or isinstance(position, bool):
        raise EvaluationError(f"a position is an integer, not {_kind(position)}", expr.index)
    if not 0 <= position < len(items):
        raise EvaluationError(f"{show(expr.value)} has {len(items)} elements, and no element {position}", expr)
    return _present(items[position], expr)


def _present(value: Any, expr: Expr) -> Any:
    if value is None:
        raise MissingValueError(f"{show(expr)} has no value", expr)
    return value


def _boolean(value: Any, expr: Expr) -> bool:
    if not isinstance(value, bool):
        raise EvaluationError(f"{show(expr)} is {_kind(value)}, where true or false is needed", expr)
    return value


def _number(value: Any, expr: Expr) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise EvaluationError(f"{show(expr)} is {_kind(value)}, where a number is needed", expr)


def _list(value: Any, expr: Expr) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise EvaluationError(f"{show(expr)} is {_kind(value)}, where a list is needed", expr)
    return value


def _sequence(value: Any, expr: Expr) -> list[Any] | tuple[Any, ...] | str:
    """A list, or a string: some configs spell the kinds of their layers with a letter each."""
    return value if isinstance(value, str) else _list(value, expr)


def _kind(value: Any) -> str:
    kinds = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list", tuple: "a list"}
    return kinds.get(type(value), "an object")
