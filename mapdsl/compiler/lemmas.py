"""Laws of config fields and of uninterpreted functions, stated where a model breaks them: stating all is too much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product

from mapdsl.compiler.arithmetic import Budget, Linear, at_least, equal
from mapdsl.compiler.logic import FIRST_STRING, Application, Conjunction, Disjunction, Formula, Scope, Symbols


def violated_range(symbols: Symbols, model: Mapping[str, int]) -> Formula | None:
    """A field that is no string is no negative number: the law for one that is, or None."""
    for (kind, _), name in symbols.variables.items():
        if kind == "field" and FIRST_STRING < model.get(name, 0) < 0:
            field = Linear.variable(name)
            return Disjunction((at_least(field, 0), at_least(-field, -FIRST_STRING)))
    return None


def violated_law(
    scope: Scope, symbols: Symbols, applications: Sequence[Application], model: Mapping[str, int], budget: Budget
) -> Formula | None:
    """A law of functions that these applications break under the model, or None."""
    distinct = _distinct_lists(scope, symbols, model)
    by_function: dict[tuple[str, ...], list[Application]] = {}
    for application in dict.fromkeys(applications):
        by_function.setdefault(application.function, []).append(application)
        kind, name, *_ = (*application.function, "")
        if kind == "list" and name in distinct and model.get(application.value, 0) < 0:
            return Disjunction((at_least(_value(application), 0), *distinct[name]))
        if kind == "positions" and model.get(application.value, 0) < application.arguments[0].value(model):
            return at_least(_value(application), application.arguments[0])  # as many stand before it
    for function, group in by_function.items():
        members = by_function.get(("member", function[1]), []) if function[0] == "list" else []
        for element, member in product(group, members):
            budget.spend(1)
            if (law := _is_member(element, member, model)) is not None:
                return law
    for function, group in by_function.items():
        for first, second in combinations(group, 2):
            budget.spend(1)
            law = _congruence(first, second, model)
            if law is None and function[0] == "*":
                law = _monotone_product(first, second, model)
            if law is None and function[0] == "positions":
                law = _increasing(first, second, model)
            if law is None and function[0] == "list" and function[1] in distinct:
                law = _distinct(first, second, model, distinct[function[1]])
            if law is not None:
                return law
    return None


def _congruence(first: Application, second: Application, model: Mapping[str, int]) -> Formula | None:
    """Equal arguments give equal values."""
    pairs = list(zip(first.arguments, second.arguments, strict=True))
    if model.get(first.value, 0) == model.get(second.value, 0):
        return None
    if any(a.value(model) != b.value(model) for a, b in pairs):
        return None
    same = Conjunction((*(equal(a, b) for a, b in pairs), equal(_value(first), _value(second))))
    differs = [side for a, b in pairs for side in _apart(a, b)]
    return Disjunction((same, *differs))


def _distinct_lists(scope: Scope, symbols: Symbols, model: Mapping[str, int]) -> dict[str, list[Formula]]:
    """The fields that are index tables under the model, with what else may hold: that another one goes before."""
    found: dict[str, list[Formula]] = {}
    for name, earlier in scope.distinct_fields().items():
        presences = [symbols.variables.get(("present", field)) for field in earlier]
        if all(presence is not None and model.get(presence, 0) == 0 for presence in presences):
            found[name] = [equal(Linear.variable(presence), 1) for presence in presences if presence is not None]
    return found


def _distinct(
    first: Application, second: Application, model: Mapping[str, int], otherwise: Sequence[Formula]
) -> Formula | None:
    """Different positions hold different values."""
    (a,), (b,) = first.arguments, second.arguments
    if a.value(model) == b.value(model) or model.get(first.value, 0) != model.get(second.value, 0):
        return None
    return Disjunction((equal(a, b), *_apart(_value(first), _value(second)), *otherwise))


def _is_member(element: Application, member: Application, model: Mapping[str, int]) -> Formula | None:
    """What stands in a list is in it."""
    (sought,) = member.arguments
    if sought.value(model) != model.get(element.value, 0) or model.get(member.value, 0) == 1:
        return None
    return Disjunction((equal(_value(member), 1), *_apart(sought, _value(element))))


def _increasing(first: Application, second: Application, model: Mapping[str, int]) -> Formula | None:
    """Later positions hold greater values: as much greater at least as they are later."""
    (a,), (b,) = first.arguments, second.arguments
    x, y = _value(first), _value(second)
    apart, grows = b.value(model) - a.value(model), y.value(model) - x.value(model)
    if not apart or grows * apart >= apart * apart:
        return None
    above = Conjunction((at_least(a, b + 1), at_least(x - y, a - b)))
    below = Conjunction((at_least(b, a + 1), at_least(y - x, b - a)))
    return Disjunction((equal(a, b), above, below))


def _monotone_product(first: Application, second: Application, model: Mapping[str, int]) -> Formula | None:
    """`P*a >= P*b + P` where `a > b` and `P >= 0`: what makes `{P*o+s}` with `s < P` injective."""
    x, y = _value(first), _value(second)
    for factor, a, b in _shared_factor(first, second):
        size = factor.value(model)
        more, less = (x, y) if a.value(model) > b.value(model) else (y, x)
        if a.value(model) == b.value(model) or size < 0 or more.value(model) >= less.value(model) + size:
            continue
        above = Conjunction((at_least(a, b + 1), at_least(x, y + factor)))
        below = Conjunction((at_least(b, a + 1), at_least(y, x + factor)))
        return Disjunction((equal(a, b), above, below, at_least(-factor, 1)))
    return None


def _shared_factor(first: Application, second: Application) -> Iterator[tuple[Linear, Linear, Linear]]:
    for here in (0, 1):
        for there in (0, 1):
            if first.arguments[here] == second.arguments[there]:
                yield first.arguments[here], first.arguments[1 - here], second.arguments[1 - there]


def _value(application: Application) -> Linear:
    return Linear.variable(application.value)


def _apart(a: Linear, b: Linear) -> tuple[Formula, Formula]:
    return at_least(a, b + 1), at_least(b, a + 1)
