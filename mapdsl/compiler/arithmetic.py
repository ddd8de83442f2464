"""Conjunctions of linear integer constraints: is there a solution, and which is the smallest?

Terms and constraints as the checker builds them; the decision itself is the Omega test (`omega.py`, W. Pugh, "The Omega
Test", 1991).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mapdsl.compiler.omega import (
    Budget,
    BudgetExceeded,
    Contradiction,
    System,
    Terms,
    canonical,
    coefficient_of,
    combine,
    has_solution,
)

__all__ = [
    "Budget",
    "BudgetExceeded",
    "Constraint",
    "Linear",
    "at_least",
    "equal",
    "satisfiable",
    "smallest_model",
    "solve",
]


@dataclass(frozen=True)
class Linear:
    """`3*i - k + 2`: terms sorted by name, without zero coefficients, and a constant."""

    terms: Terms
    constant: int

    @classmethod
    def of(cls, coefficients: Mapping[str, int], constant: int = 0) -> Linear:
        """The canonical form of a sum given as a mapping."""
        return cls(canonical(coefficients), constant)

    @classmethod
    def variable(cls, name: str) -> Linear:
        """One variable."""
        return cls(((name, 1),), 0)

    @classmethod
    def number(cls, value: int) -> Linear:
        """A constant."""
        return cls((), value)

    @property
    def is_constant(self) -> bool:
        """Does no variable occur?"""
        return not self.terms

    @property
    def names(self) -> tuple[str, ...]:
        """The variables that occur, sorted."""
        return tuple(name for name, _ in self.terms)

    def __add__(self, other: Linear | int) -> Linear:
        if isinstance(other, int):
            return Linear(self.terms, self.constant + other)
        if not other.terms:
            return Linear(self.terms, self.constant + other.constant)
        return Linear(*combine((self.terms, self.constant), 1, (other.terms, other.constant), 1))

    def __sub__(self, other: Linear | int) -> Linear:
        return self + -other

    def __neg__(self) -> Linear:
        return self * -1

    def __mul__(self, factor: int) -> Linear:
        if not factor:
            return Linear((), 0)
        return Linear(tuple((name, c * factor) for name, c in self.terms), self.constant * factor)

    def value(self, model: Mapping[str, int]) -> int:
        """The value under a model; a variable that the model leaves out is 0."""
        return self.constant + sum(c * model.get(name, 0) for name, c in self.terms)


@dataclass(frozen=True)
class Constraint:
    """`linear = 0` or `linear >= 0`."""

    linear: Linear
    kind: Literal["=", ">="]

    def holds(self, model: Mapping[str, int]) -> bool:
        """Is the constraint true under a model?"""
        value = self.linear.value(model)
        return value == 0 if self.kind == "=" else value >= 0


def equal(left: Linear, right: Linear | int) -> Constraint:
    """`left = right`."""
    return Constraint(left - right, "=")


def at_least(left: Linear, right: Linear | int) -> Constraint:
    """`left >= right`."""
    return Constraint(left - right, ">=")


def satisfiable(constraints: Iterable[Constraint], *, budget: Budget | None = None) -> bool:
    """Have the constraints an integer solution? Exact; raises `BudgetExceeded`."""
    budget = budget or Budget()
    try:
        system = System(budget)
        for constraint in constraints:
            system.require(constraint.kind, constraint.linear.terms, constraint.linear.constant)
        return has_solution(system)
    except Contradiction:
        return False


def solve(
    constraints: Iterable[Constraint], *, order: Sequence[str] = (), budget: Budget | None = None
) -> dict[str, int] | None:
    """The smallest integer solution, or None when there is none; raises `BudgetExceeded`.

    Variables are settled one by one, those of `order` first, the others by name: each gets its smallest value >= 0
    that the variables before it leave open, or, where only negative values are left, the one nearest to 0. With all
    variables >= 0 the solution is the lexicographically least.
    """
    system = list(constraints)
    budget = budget or Budget()
    return smallest_model(system, order=order, budget=budget) if satisfiable(system, budget=budget) else None


def smallest_model(constraints: Iterable[Constraint], *, order: Sequence[str], budget: Budget) -> dict[str, int]:
    """What `solve` gives, for constraints that are known to have a solution."""
    system = list(constraints)
    occurring = {name for constraint in system for name in constraint.linear.names}
    model: dict[str, int] = {}
    for name in [*(name for name in dict.fromkeys(order) if name in occurring), *sorted(occurring.difference(order))]:
        model[name] = _smallest_value(system, name, budget)
        system = [_assign(constraint, name, model[name]) for constraint in system]
    return model


# --- the smallest value of one variable ----------------------------------------------------------------------------


def _smallest_value(system: list[Constraint], name: str, budget: Budget) -> int:
    """The value of `name` nearest to 0 in a system that has a solution, values >= 0 preferred."""
    lowest, highest = _own_bounds(system, name)
    nearest = max(lowest or 0, 0) if highest is None or highest >= 0 else highest
    if lowest == highest == nearest or _fits(system, name, nearest, budget):
        return nearest
    up = Linear.variable(name)
    if satisfiable([*system, at_least(up, 1)], budget=budget):
        return _first_reached(system, up, budget)
    return -_first_reached(system, -up, budget)


def _own_bounds(system: list[Constraint], name: str) -> tuple[int | None, int | None]:
    """The bounds that constraints on this variable alone give it."""
    lowest: int | None = None
    highest: int | None = None
    for constraint in system:
        if constraint.linear.names == (name,):
            c, constant = constraint.linear.terms[0][1], constraint.linear.constant
            if c > 0 or constraint.kind == "=":
                bound = -(constant // c) if c > 0 else constant // -c
                lowest = bound if lowest is None else max(lowest, bound)
            if c < 0 or constraint.kind == "=":
                bound = constant // -c if c < 0 else -(constant // c)
                highest = bound if highest is None else min(highest, bound)
    return lowest, highest


def _first_reached(system: list[Constraint], distance: Linear, budget: Budget) -> int:
    """The least value >= 1 of `distance`. `1 <= distance <= n` once true stays true as n grows, hence the bisection."""
    known = [*system, at_least(distance, 1)]
    below, limit = 0, 1
    while not satisfiable([*known, at_least(-distance, -limit)], budget=budget):
        below, limit = limit, limit * 2
    while limit - below > 1:
        middle = (below + limit) // 2
        if satisfiable([*known, at_least(-distance, -middle)], budget=budget):
            limit = middle
        else:
            below = middle
    return limit


def _fits(system: list[Constraint], name: str, value: int, budget: Budget) -> bool:
    return satisfiable([_assign(constraint, name, value) for constraint in system], budget=budget)


def _assign(constraint: Constraint, name: str, value: int) -> Constraint:
    linear = constraint.linear
    coefficient = coefficient_of(linear.terms, name)
    if not coefficient:
        return constraint
    rest = tuple(term for term in linear.terms if term[0] != name)
    return Constraint(Linear(rest, linear.constant + coefficient * value), constraint.kind)
