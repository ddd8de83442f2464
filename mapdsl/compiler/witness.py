"""A config from a model of a formula, and the proof that it is one: the facts are evaluated with it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mapdsl.compiler.evaluation import EvaluationError, evaluate, evaluate_params, show
from mapdsl.compiler.ir import children, names_in
from mapdsl.compiler.logic import FIELD, FIRST_STRING, Application, Scope, Symbols
from mapdsl.language import tree
from mapdsl.language.tree import Expr

_LONGEST_LIST = 100_000


@dataclass(frozen=True)
class Witness:
    """`values` for `evaluate`, and what of them is `shown` to people."""

    values: dict[str, Any]
    shown: tuple[tuple[str, Any], ...]


def build_witness(
    scope: Scope,
    claims: Sequence[Expr],
    symbols: Symbols,
    applications: Iterable[Application],
    model: Mapping[str, int],
) -> Witness | None:
    """The config that a model describes, or None where a claim is not true of it (the formula said too little)."""
    try:
        values = _Decoder(scope, symbols, applications, model).values()
        mentioned = _mentioned_params(scope, claims)
        params = evaluate_params({name: scope.params[name] for name in mentioned}, values)
        values = {**values, **params, **_index_values(scope, symbols, model)}
        sizes = [value for value in params.values() if isinstance(value, int)]
        if (
            any(size < 0 for size in sizes)
            or not _tables_hold(scope, symbols, values)
            or not all(evaluate(claim, values) is True for claim in claims)
        ):
            return None
    except EvaluationError:
        return None
    return Witness(values, _shown(scope, claims, values))


def _tables_hold(scope: Scope, symbols: Symbols, values: Mapping[str, Any]) -> bool:
    """Whether index tables hold distinct integers from 0: other configs are refused when they are met."""
    absent = {key for kind, key in symbols.variables if kind == "present"} - values.keys()
    for name, earlier in scope.distinct_fields().items():
        items = values.get(name)
        if isinstance(items, list) and absent.issuperset(earlier):
            whole = all(type(item) is int and item >= 0 for item in items)
            if not whole or len(set(items)) < len(items):
                return False
    return True


def _index_values(scope: Scope, symbols: Symbols, model: Mapping[str, int]) -> dict[str, int]:
    variables = {name: symbols.variables.get(("index", name)) for name in scope.indices}
    return {name: model.get(variable, 0) for name, variable in variables.items() if variable}


def _mentioned_params(scope: Scope, claims: Sequence[Expr]) -> list[str]:
    """The params that claims mention, and those that these are made of."""
    waiting = [name for claim in claims for name in names_in(claim) if scope.is_param(name)]
    found: dict[str, None] = {}
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = None
            waiting += [other for other in names_in(scope.params[name]) if scope.is_param(other)]
    return [name for name in scope.params if name in found]


class _Decoder:
    """Config fields, `has(...)` and sizes from the integers of a model."""

    def __init__(
        self, scope: Scope, symbols: Symbols, applications: Iterable[Application], model: Mapping[str, int]
    ) -> None:
        self.scope = scope
        self.symbols = symbols
        self.applications = list(applications)
        self.model = model
        self.texts = {code: text for text, code in symbols.strings.items()}

    def values(self) -> dict[str, Any]:
        """The fields that are present, and what stands beside them under its text."""
        values: dict[str, Any] = {}
        for (kind, key), name in self.symbols.variables.items():
            if kind in ("field", "call"):
                values[str(key)] = self._value(name)
            elif kind == "has":
                values[str(key)] = bool(self.model.get(name, 0))
        for path in self._list_paths():
            values[path] = self._list(path)
        for (kind, key), name in self.symbols.variables.items():
            if kind == "present" and self.model.get(name, 1) == 0:
                values.pop(str(key), None)
        return values

    def _value(self, name: str) -> Any:
        return self._decoded(self.model.get(name, 0), name in self.symbols.booleans)

    def _decoded(self, value: int, boolean: bool = False) -> Any:
        if value <= FIRST_STRING:
            return self.texts.get(value, f"other{FIRST_STRING - value}")
        return bool(value) if boolean and value in (0, 1) else value

    def _list_paths(self) -> dict[str, None]:
        functions = [a.function for a in self.applications if a.function[0] in ("list", "member")]
        lengths = [str(key) for kind, key in self.symbols.variables if kind == "length"]
        return dict.fromkeys([function[1] for function in functions] + lengths)

    def _list(self, path: str) -> list[Any]:
        """What is looked up stands at its position; members that are nowhere yet follow."""
        elements = self._elements(path)
        length = min(self._length(path), _LONGEST_LIST)
        tables = [table for table in _tables(self.scope) if path in _fields(table.arguments[0], self.scope)]
        for table in tables:
            self._make_true(table, elements, length)
        avoided = [_literal(table) for table in tables]
        if path in self.scope.distinct_fields():
            others = (number for number in itertools.count() if number not in [*elements.values(), *avoided])
            items = [elements[position] if position in elements else next(others) for position in range(length)]
        else:
            filler = _filler(elements.values(), avoided)
            items = [elements.get(position, filler) for position in range(length)]
        return items + [member for member in self._members(path) if member not in items]

    def _make_true(self, table: tree.Call, elements: dict[int, Any], length: int) -> None:
        """Let a list hold what is sought so often before each position of a table as the table has positions before."""
        sought, named = _literal(table), self.scope.aliased(table)
        applications = self._of(("positions", show(named)))
        known = {a.arguments[0].value(self.model): self.model.get(a.value, 0) for a in applications}
        if (count := self.symbols.variables.get(("foreign", named))) is not None:
            known.setdefault(self.model.get(count, 0), length)  # as if one more stood behind the end
        before, start = 0, 0
        for number, position in sorted(known.items()):
            span = range(start, position)
            missing = number - before - sum(elements.get(place) == sought for place in span)
            for place in [place for place in span if place not in elements][: max(missing, 0)]:
                elements[place] = sought
            before, start = number + 1, position + 1

    def _elements(self, path: str) -> dict[int, Any]:
        elements: dict[int, Any] = {}
        for application in self._of(("present", path)):
            if self.model.get(application.value, 1) == 0:
                elements[application.arguments[0].value(self.model)] = None
        for application in self._of(("list", path)):
            if application.value in self.model:
                elements[application.arguments[0].value(self.model)] = self._value(application.value)
        return elements

    def _length(self, path: str) -> int:
        """Long enough for every lookup, unless the facts speak of the length."""
        length = self.model.get(self.symbols.variable("length", path), 0)
        if ("counted", path) in self.symbols.variables:
            return length
        positions = [application.arguments[0].value(self.model) for application in self._of(("list", path))]
        return max([length, *(position + 1 for position in positions)])

    def _members(self, path: str) -> list[Any]:
        held = [a for a in self._of(("member", path)) if self.model.get(a.value, 0) == 1]
        return [self._decoded(application.arguments[0].value(self.model)) for application in held]

    def _of(self, function: tuple[str, str]) -> list[Application]:
        return [application for application in self.applications if application.function == function]


def _filler(elements: Collection[Any], avoided: Collection[Any]) -> Any:
    """Something of the same type for the positions that do not matter, which no table seeks."""
    known = [*elements, *avoided]
    if any(isinstance(value, str) for value in known):
        return ""
    if known and all(isinstance(value, bool) for value in known):
        return False in avoided
    return next(number for number in itertools.count() if number not in avoided)


# --- tables: `positions(X, v)` -------------------------------------------------------------------------------------


def _tables(scope: Scope) -> list[tree.Call]:
    """The tables that params are made of, each once; those that seek no literal are left out."""
    found: dict[tree.Call, None] = {}
    waiting = [scope.definition(name) for name in scope.params]
    while waiting:
        match waiting.pop():
            case (
                tree.Call(function="positions", arguments=(_, tree.Number() | tree.String() | tree.Boolean())) as table
            ):
                found[table] = None
            case expr:
                waiting += children(expr)
    return list(found)


def _literal(table: tree.Call) -> Any:
    sought = table.arguments[1]
    return sought.value if isinstance(sought, (tree.Number, tree.String, tree.Boolean)) else None


def _fields(source: Expr, scope: Scope) -> set[str]:
    """The config fields that a list may be."""
    match source:
        case tree.Name(path=path) if scope.is_param(path):
            return _fields(scope.definition(path), scope)
        case tree.Name(path=path):
            return {path.removeprefix(FIELD)}
        case tree.Default(options=options):
            return set().union(*(_fields(option, scope) for option in options))
    return set()


# --- what is shown -------------------------------------------------------------------------------------------------


def _shown(scope: Scope, claims: Sequence[Expr], values: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Numbers, strings, looked-up elements and list lengths, in the order of mention, params before indices."""
    found: dict[str, Any] = {}
    for claim in claims:
        for text, value in _mentions(claim, values):
            found.setdefault(text, value)
    return tuple(sorted(found.items(), key=lambda item: item[0] in scope.indices))


def _mentions(expr: Expr, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for child in children(expr):
        yield from _mentions(child, values)
    try:
        match expr:
            case tree.Name() | tree.Has():
                value = evaluate(expr, values)
                if not isinstance(value, list):
                    yield show(expr), value
            case tree.Lookup(value=items, index=index):
                yield f"{show(items)}[{evaluate(index, values)}]", evaluate(expr, values)
            case tree.Call(function="len" | "size" | "rank"):
                yield show(expr), evaluate(expr, values)
            case tree.Operation(operator="in", operands=(_, items)) if not isinstance(items, tree.ListLiteral):
                yield show(items), evaluate(items, values)
    except EvaluationError:  # in a part of a guard that does not count here
        return
