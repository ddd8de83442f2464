"""Formulas over linear constraints and uninterpreted functions, and the names that they are about."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Union

from mapdsl.compiler.arithmetic import Constraint, Linear, at_least
from mapdsl.compiler.evaluation import rename
from mapdsl.compiler.ir import names_in
from mapdsl.language.node import Node
from mapdsl.language.rewrite import rewrite
from mapdsl.language.tree import Default, Expr, Name

FIELD = "field "  # marks a config field inside of a param's definition, where it may be called as an index is
FIRST_STRING = -(1 << 60)


@dataclass(frozen=True)
class Application:
    """`value` is what `function` gives for `arguments`: equal arguments, equal values."""

    function: tuple[str, ...]
    arguments: tuple[Linear, ...]
    value: str


@dataclass(frozen=True)
class Conjunction:
    """All parts hold; without parts true."""

    parts: tuple[Formula, ...]


@dataclass(frozen=True)
class Disjunction:
    """One of the parts holds; without parts false."""

    parts: tuple[Formula, ...]


Formula = Union[Constraint, Application, Conjunction, Disjunction]
TRUE = Conjunction(())
FALSE = Disjunction(())


class Term(NamedTuple):
    """A value, and what must hold for the expression to have one (a position inside of its list, a field >= 0)."""

    linear: Linear
    sides: tuple[Formula, ...] = ()


@dataclass(frozen=True)
class Scope:
    """What names mean: params by their definitions, indices by their bounds (None: from 0, without end).

    A name that is neither is a config field. `distinct` names the list params whose values do not repeat.
    """

    params: Mapping[str, Expr]
    indices: Mapping[str, tuple[Expr | None, Expr | None]]
    distinct: frozenset[str] = frozenset()
    memo: dict[Hashable, object] = field(default_factory=dict, compare=False, repr=False)

    def definition(self, param: str) -> Expr:
        """The definition of a param, its fields marked with `FIELD`."""
        key = ("definition", param)
        if key not in self.memo:
            expr = self.params[param]
            fields = [name for name in names_in(expr) if name == param or name not in self.params]
            self.memo[key] = rename(expr, {name: FIELD + name for name in fields})
        return self.memo[key]  # type: ignore[return-value]

    def distinct_fields(self) -> dict[str, tuple[str, ...]]:
        """The config fields that hold the lists of `distinct`, each with the fields that must be absent for that.

        Of `a ?? b` the values of `b` do not repeat where there is no `a`; where there is one, `b` may be any list.
        """
        found: dict[str, tuple[str, ...]] = {}
        for param in sorted(self.distinct):
            fields, _ = self._lists(self.definition(param))
            for place, name in enumerate(fields):
                found[name] = min(found.get(name, tuple(fields)), tuple(fields[:place]), key=len)
        return found

    def _lists(self, expr: Expr) -> tuple[list[str], bool]:
        """The fields that a list is, in the order in which they are asked for; whether there may be more behind."""
        match expr:
            case Name(path=path) if self.is_param(path):
                return self._lists(self.definition(path))
            case Name(path=path):
                return [path.removeprefix(FIELD)], True
            case Default(options=options):
                fields: list[str] = []
                for option in options:
                    more, goes_on = self._lists(option)
                    fields += more
                    if not goes_on:
                        return fields, False
                return fields, True
        return [], False  # a literal is always there, and what is computed holds values of its own

    def aliased(self, expr: Expr) -> Expr:
        """The expression with params that are but other names (`param X = layer_types`) replaced by what they name."""

        def change(node: Node) -> Node:
            while isinstance(node, Name) and self.is_param(node.path):
                definition = self.definition(node.path)
                if not isinstance(definition, Name):
                    break
                node = definition
            return node

        return rewrite(expr, change)

    def is_param(self, name: str) -> bool:
        """A param, and no index of this name?"""
        return name in self.params and name not in self.indices


@dataclass
class Symbols:
    """The variables of a query, by what they stand for, and what is known of them."""

    variables: dict[tuple[str, Hashable], str] = field(default_factory=dict)
    strings: dict[str, int] = field(default_factory=dict)
    booleans: set[str] = field(default_factory=set)
    relaxed: dict[str, None] = field(default_factory=dict)
    pinnable: dict[Linear, None] = field(default_factory=dict)

    def variable(self, kind: str, key: Hashable) -> str:
        """The variable for a thing: the same one whenever it is asked again."""
        return self.variables.setdefault((kind, key), f"v{len(self.variables)}")

    def code(self, text: str) -> int:
        """The integer that stands for a string."""
        return self.strings.setdefault(text, FIRST_STRING - len(self.strings))


def compared(symbol: str, left: Term, right: Term) -> Formula:
    """A comparison of two values, with what must hold for them to be values."""
    difference = left.linear - right.linear
    match symbol:
        case "==":
            relation: Formula = Constraint(difference, "=")
        case "!=":
            relation = Disjunction((at_least(-difference, 1), at_least(difference, 1)))
        case ">=" | ">":
            relation = at_least(difference, int(symbol == ">"))
        case _:
            relation = at_least(-difference, int(symbol == "<"))
    return Conjunction((*left.sides, *right.sides, relation))


def within(index: Linear, length: Linear) -> tuple[Formula, ...]:
    """`0 <= index < length`."""
    return at_least(index, 0), at_least(length, index + 1)


def division_facts(symbol: str, left: Linear, right: Linear, value: Linear) -> Formula:
    """What is known of a quotient or remainder whose divisor is unknown: its sign, and that it is small."""
    if symbol == "%":
        above = Conjunction((at_least(right, 1), at_least(value, 0), at_least(right, value + 1)))
        below = Conjunction((at_least(-right, 1), at_least(-value, 0), at_least(value, right + 1)))
        return Disjunction((above, below))
    natural = Conjunction((at_least(right, 1), at_least(left, 0), at_least(value, 0), at_least(left, value)))
    negative = Conjunction((at_least(right, 1), at_least(-left, 1), at_least(-value, 1), at_least(value, left)))
    return Disjunction((natural, negative, at_least(-right, 1)))
