"""Guards as formulas of Presburger arithmetic with uninterpreted functions.

Each boolean expression becomes `and` and `or` over linear integer constraints. What is no linear arithmetic becomes the
application of an uninterpreted function: lists of the config (`compress_ratios[i]`) exactly, and `i % P`, products and
the like as a relaxation, for which equal arguments give equal values and little else is known. A relaxed formula holds
wherever the guard holds, so where it is empty the guard is never true.

Integers, strings and booleans share one domain: a string is an integer far below all numbers that a config holds;
`true` and `false` are 1 and 0, as in Python.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

from mapdsl.compiler.arithmetic import Budget, Linear, at_least, equal
from mapdsl.compiler.evaluation import show
from mapdsl.compiler.ir import children
from mapdsl.compiler.logic import (
    FALSE,
    FIELD,
    TRUE,
    Application,
    Conjunction,
    Disjunction,
    Formula,
    Scope,
    Symbols,
    Term,
    compared,
    division_facts,
    within,
)
from mapdsl.language import tree
from mapdsl.language.tree import Expr

_NEGATED = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_ARITHMETIC = ("+", "-", "*", "//", "%")


class Translator:
    """Makes formulas of expressions; `pins` are terms that are taken to have a given value, to escape a relaxation."""

    def __init__(self, scope: Scope, symbols: Symbols, budget: Budget, pins: Mapping[Linear, int]) -> None:
        self.scope = scope
        self.symbols = symbols
        self.budget = budget
        self.pins = pins
        self.applications: dict[Application, None] = {}
        self._defaulted: set[str] = set()  # fields that some `??` takes for absent
        self._sparse: set[str] = set()  # lists of which it takes an element for absent
        self._params: dict[tuple[str, bool], Term] = {}

    # --- boolean expressions ---------------------------------------------------------------------------------------

    def fact(self, expr: Expr, positive: bool = True) -> Formula:
        """`expr` is true, or (not `positive`) false. An expression in error is neither."""
        self.budget.spend(1)
        match expr:
            case tree.Boolean(value=value):
                return TRUE if value is positive else FALSE
            case tree.Name(path=path) if self.scope.is_param(path):
                return self.fact(self.scope.definition(path), positive)
            case tree.Default(options=options):
                return Disjunction(tuple(Conjunction((c, self.fact(o, positive))) for c, o in self._cases(options)))
            case tree.Operation(operator="not", operands=(operand,)):
                return self.fact(operand, not positive)
            case tree.Operation(operator="and" | "or" as symbol, operands=operands):
                parts = tuple(self.fact(operand, positive) for operand in operands)
                return Conjunction(parts) if (symbol == "and") is positive else Disjunction(parts)
            case tree.Operation(operator="in", operands=(item, items)):
                return self._membership(item, items, positive)
            case tree.Operation(operator=symbol, operands=(left, right)) if symbol in _NEGATED:
                return self._comparison(symbol if positive else _NEGATED[symbol], left, right)
            case tree.Name() | tree.Has() | tree.Lookup() | tree.Call():
                return self._truth(expr, positive)
            case _:
                return FALSE

    def _truth(self, expr: Expr, positive: bool) -> Formula:
        linear, sides = self.term(expr)
        self.symbols.booleans.update(linear.names)
        return Conjunction((*sides, equal(linear, int(positive))))

    def _comparison(self, symbol: str, left: Expr, right: Expr) -> Formula:
        # What equals a number is one; what differs from a number may be a string.
        as_number = symbol != "!=" and (symbol != "==" or self._is_number(left) or self._is_number(right))
        return compared(symbol, self.term(left, as_number), self.term(right, as_number))

    def _is_number(self, expr: Expr) -> bool:
        match expr:
            case tree.Name(path=path):
                if self.scope.is_param(path):
                    return self._is_number(self.scope.definition(path))
                return path in self.scope.indices
            case tree.Default(options=options):
                return any(map(self._is_number, options))
            case tree.Operation(operator=symbol):
                return symbol in _ARITHMETIC
            case tree.Call(function=function):
                return function in ("len", "size", "rank")
            case _:
                return isinstance(expr, tree.Number)

    def _membership(self, item: Expr, items: Expr, positive: bool) -> Formula:
        self.budget.spend(1)
        match items:
            case tree.Name(path=path) if self.scope.is_param(path):
                return self._membership(item, self.scope.definition(path), positive)
            case tree.Default(options=options):
                cases = [Conjunction((c, self._membership(item, o, positive))) for c, o in self._cases(options)]
                return Disjunction(tuple(cases))
            case tree.ListLiteral(items=elements):
                parts = tuple(self._comparison("==" if positive else "!=", item, element) for element in elements)
                return Disjunction(parts) if positive else Conjunction(parts)
            case tree.Call(function="positions", arguments=(source, sought)):
                return self._is_position(self.term(item), source, sought, positive)
            case _:
                # A list as the set of what it holds: any finite set of answers is given by some list.
                linear, sides = self.term(item)
                held, application = self._apply(("member", self._list_name(items)), (linear,))
                return Conjunction((*sides, *self._list_is_there(items), application, equal(held, int(positive))))

    def _is_position(self, position: Term, source: Expr, sought: Expr, positive: bool) -> Formula:
        length = self._length(source)
        element = self._element(source, position.linear)
        sides = Conjunction((*position.sides, *length.sides))
        if positive:
            return Conjunction((sides, compared("==", element, self.term(sought))))
        outside = (at_least(-position.linear, 1), at_least(position.linear, length.linear))
        return Conjunction((sides, Disjunction((*outside, compared("!=", element, self.term(sought))))))

    # --- presence: `a ?? b` ----------------------------------------------------------------------------------------

    def _cases(self, options: tuple[Expr, ...]) -> Iterator[tuple[Formula, Expr]]:
        """Each option with the condition under which it is the first that is present."""
        absent: list[Formula] = []
        for option in options[:-1]:
            yield Conjunction((*absent, self._presence(option, True))), option
            absent.append(self._presence(option, False))
        yield Conjunction(tuple(absent)), options[-1]

    def _presence(self, expr: Expr, positive: bool) -> Formula:
        self.budget.spend(1)
        match expr:
            case tree.Name(path=path) if self.scope.is_param(path):
                return self._presence(self.scope.definition(path), positive)
            case tree.Name(path=path) if path in self.scope.indices:
                return TRUE if positive else FALSE
            case tree.Name(path=path):
                path = path.removeprefix(FIELD)
                self._defaulted.add(path)
                return equal(self._variable("present", path), int(positive))
            case tree.Has():
                return equal(self._variable("present", show(expr)), int(positive))
            case tree.Operation(operator="and" | "or"):
                return self._foreign_truth(tree.Call("present", (expr,), span=expr.span), positive)
            case tree.Default(options=parts):
                presences = tuple(self._presence(part, positive) for part in parts)
                return Disjunction(presences) if positive else Conjunction(presences)
            case _:
                found = [self._presence(part, positive) for part in children(expr)]
                if isinstance(expr, tree.Lookup):
                    found.append(self._element_presence(expr, positive))
                return Conjunction(tuple(found)) if positive else Disjunction(tuple(found))

    def _element_presence(self, expr: tree.Lookup, positive: bool) -> Formula:
        index, sides = self.term(expr.index, True)
        path = self._list_name(expr.value)
        self._sparse.add(path)
        there, application = self._apply(("present", path), (index,))
        return Conjunction((*sides, application, equal(there, int(positive))))

    def _use(self, path: str) -> tuple[Formula, ...]:
        """A field is present where its value is used. Those that no `??` asks for always are."""
        return (equal(self._variable("present", path), 1),) if path in self._defaulted else ()

    def _element_use(self, path: str, index: Linear) -> tuple[Formula, ...]:
        """The same for an element of a list."""
        if path not in self._sparse:
            return ()
        there, application = self._apply(("present", path), (index,))
        return application, equal(there, 1)

    # --- values ----------------------------------------------------------------------------------------------------

    def term(self, expr: Expr, as_number: bool = False) -> Term:
        """The value of an expression; `as_number` where nothing but an integer will do."""
        self.budget.spend(1)
        match expr:
            case tree.Number(value=int(value)):
                return Term(Linear.number(value))
            case tree.String(value=text):
                return Term(Linear.number(self.symbols.code(text)), (FALSE,) if as_number else ())
            case tree.Boolean(value=value):
                return Term(Linear.number(int(value)))
            case tree.Name(path=path):
                return self._named(path, as_number)
            case tree.Lookup(value=items, index=index):
                position = self.term(index, True)
                element = self._element(items, position.linear, as_number)
                return Term(element.linear, (*position.sides, *element.sides))
            case tree.Call(function="len", arguments=(items,)):
                return self._length(items)
            case tree.Call(function="size"):
                size = self._variable("call", show(expr))
                return Term(size, (at_least(size, 1),))
            case tree.Call(function="rank", arguments=(mesh,)):
                place = self._variable("call", show(expr))
                size = self._variable("call", f"size({show(mesh)})")
                return Term(place, (at_least(place, 0), at_least(size - place, 1)))
            case tree.Has():
                holds = self._variable("has", show(expr))
                return Term(holds, (at_least(holds, 0), at_least(-holds, -1)))
            case tree.Default(options=options):
                cases = [(c, self.term(option, as_number)) for c, option in self._cases(options)]
                return self._choice(("value", expr), cases)
            case tree.Operation(operator=symbol) if symbol in _ARITHMETIC:
                return self._arithmetic(expr)
            case tree.Operation():
                cases = [(self.fact(expr, truth), Term(Linear.number(int(truth)))) for truth in (False, True)]
                return self._choice(("truth", expr), cases)
            case _:
                return Term(self._foreign(expr))

    def _named(self, name: str, as_number: bool) -> Term:
        if name in self.scope.indices:
            return Term(self._variable("index", name))
        if self.scope.is_param(name):
            if (name, as_number) not in self._params:
                self._params[name, as_number] = self._param(self.scope.definition(name), as_number)
            return self._params[name, as_number]
        path = name.removeprefix(FIELD)
        value = self._variable("field", path)
        return Term(value, (*self._use(path), at_least(value, 0)) if as_number else self._use(path))

    def _param(self, definition: Expr, as_number: bool) -> Term:
        linear, sides = self.term(definition, as_number)
        computed = isinstance(definition, tree.Operation) and definition.operator in _ARITHMETIC
        if computed or (as_number and not isinstance(definition, (tree.Name, tree.Number))):
            sides = (*sides, at_least(linear, 0))
        return Term(linear, sides)

    def _arithmetic(self, expr: tree.Operation) -> Term:
        operands = [self.term(operand, True) for operand in expr.operands]
        sides = tuple(side for operand in operands for side in operand.sides)
        total = operands[0].linear
        if len(operands) == 1:
            return Term(-total, sides)
        for operand in operands[1:]:
            if expr.operator == "+":
                total = total + operand.linear
            elif expr.operator == "-":
                total = total - operand.linear
            elif expr.operator == "*":
                total, more = self._product(total, operand.linear, expr)
                sides += more
            else:
                total, more = self._division(expr, total, operand.linear)
                sides += more
        return Term(total, sides)

    def _product(self, left: Linear, right: Linear, expr: Expr) -> Term:
        if left.is_constant:
            return Term(right * left.constant)
        if right.is_constant:
            return Term(left * right.constant)
        for factor, other in ((left, right), (right, left)):
            if factor in self.pins:
                return Term(other * self.pins[factor], (equal(factor, self.pins[factor]),))
        first, second = sorted((left, right), key=lambda factor: factor.terms)
        value, application = self._apply(("*",), (first, second))
        pinned = min((left, right), key=lambda factor: (self._counts_indices(factor), len(factor.terms)))
        self._relax(expr, pinned)
        natural = Conjunction((at_least(left, 0), at_least(right, 0), at_least(value, 0)))
        return Term(value, (application, Disjunction((natural, at_least(-left, 1), at_least(-right, 1)))))

    def _division(self, expr: tree.Operation, left: Linear, right: Linear) -> Term:
        if right in self.pins:
            result = self._division(expr, left, Linear.number(self.pins[right]))
            return Term(result.linear, (*result.sides, equal(right, self.pins[right])))
        if right.is_constant and right.constant:
            quotient = self._variable("quotient", (left, right))
            rest = left - quotient * right.constant
            sign = 1 if right.constant > 0 else -1
            sides = (at_least(rest * sign, 0), at_least(rest * -sign, 1 - abs(right.constant)))
            return Term(quotient if expr.operator == "//" else rest, sides)
        if right.is_constant:
            return Term(right, (FALSE,))
        value, application = self._apply((expr.operator,), (left, right))
        self._relax(expr, right)
        return Term(value, (application, division_facts(expr.operator, left, right, value)))

    def _choice(self, key: Hashable, cases: list[tuple[Formula, Term]]) -> Term:
        """A value that is one of several, each under its condition."""
        value = self._variable("choice", key)
        parts = tuple(Conjunction((c, *term.sides, equal(value, term.linear))) for c, term in cases)
        return Term(value, (Disjunction(parts),))

    # --- lists -----------------------------------------------------------------------------------------------------

    def _element(self, items: Expr, index: Linear, as_number: bool = False) -> Term:
        self.budget.spend(1)
        match items:
            case tree.Name(path=path) if self.scope.is_param(path):
                return self._element(self.scope.definition(path), index, as_number)
            case tree.Name(path=path):
                path = path.removeprefix(FIELD)
                value, application = self._apply(("list", path), (index,))
                length = self._variable("length", path)
                uses = (*self._use(path), *self._element_use(path, index))
                return Term(value, (*uses, *within(index, length), application))
            case tree.ListLiteral(items=elements):
                cases: list[tuple[Formula, Term]] = [
                    (equal(index, position), self.term(element, as_number)) for position, element in enumerate(elements)
                ]
                return self._choice(("element", items, index), cases)
            case tree.Default(options=options):
                cases = [(c, self._element(option, index, as_number)) for c, option in self._cases(options)]
                return self._choice(("element", items, index), cases)
            case tree.Call(function="positions", arguments=(source, sought)):
                value, application = self._apply(("positions", self._list_name(items)), (index,))
                self._relax(items)
                count = self._length(items)
                found = compared("==", self._element(source, value), self.term(sought))
                return Term(value, (*count.sides, *within(index, count.linear), application, found))
            case tree.Lookup(value=outer, index=outer_index):
                position = self.term(outer_index, True)
                value, application = self._apply(("lists", self._list_name(outer)), (position.linear, index))
                self._relax(items)
                return Term(value, (*position.sides, at_least(index, 0), application))
            case _:
                return Term(index, (FALSE,))

    def _length(self, items: Expr) -> Term:
        self.budget.spend(1)
        match items:
            case tree.Name(path=path) if self.scope.is_param(path):
                return self._length(self.scope.definition(path))
            case tree.Name(path=path):
                path = path.removeprefix(FIELD)
                length = self._variable("length", path)
                self.symbols.variable("counted", path)
                return Term(length, (*self._use(path), at_least(length, 0)))
            case tree.ListLiteral(items=elements):
                return Term(Linear.number(len(elements)))
            case tree.Default(options=options):
                return self._choice(("length", items), [(c, self._length(o)) for c, o in self._cases(options)])
            case tree.Call(function="positions", arguments=(source, _)):
                count, whole = self._foreign(items), self._length(source)
                return Term(count, (*whole.sides, at_least(count, 0), at_least(whole.linear, count)))
            case _:
                length = self._foreign(tree.Call("len", (items,), span=items.span))
                return Term(length, (at_least(length, 0),))

    def _list_name(self, items: Expr) -> str:
        return show(self.scope.aliased(items)).removeprefix(FIELD)

    def _list_is_there(self, items: Expr) -> tuple[Formula, ...]:
        if isinstance(items, tree.Name) and items.path not in self.scope.indices:
            return self._use(items.path.removeprefix(FIELD))
        self._relax(items)
        return ()

    # --- what is no linear arithmetic ------------------------------------------------------------------------------

    def _variable(self, kind: str, key: Hashable) -> Linear:
        return Linear.variable(self.symbols.variable(kind, key))

    def _apply(self, function: tuple[str, ...], arguments: tuple[Linear, ...]) -> tuple[Linear, Application]:
        name = self.symbols.variable("value", (function, arguments))
        application = Application(function, arguments, name)
        self.applications[application] = None
        return Linear.variable(name), application

    def _foreign(self, expr: Expr) -> Linear:
        self._relax(expr)
        return self._variable("foreign", self.scope.aliased(expr))

    def _foreign_truth(self, expr: Expr, positive: bool) -> Formula:
        return equal(self._foreign(expr), int(positive))

    def _relax(self, expr: Expr, pinned: Linear | None = None) -> None:
        """Note that from here on the formula says less than the expression; a value for `pinned` would mend that."""
        self.symbols.relaxed[show(expr).replace(FIELD, "")] = None
        if pinned is not None:
            self.symbols.pinnable[pinned] = None

    def _counts_indices(self, linear: Linear) -> int:
        indices = [self.symbols.variables.get(("index", index)) for index in self.scope.indices]
        return sum(name in indices for name in linear.names)
