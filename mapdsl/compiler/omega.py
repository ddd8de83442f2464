"""The Omega test: has a system of linear integer equalities and inequalities a solution?

W. Pugh, "The Omega Test: a fast and practical integer programming algorithm for dependence analysis",
Supercomputing 1991. Equalities go by substitution, inequalities by Fourier-Motzkin elimination, made exact for integers
by the dark shadow and by splinters. The answer is never wrong, but may take exponential time: work is counted, and
`BudgetExceeded` ends what would take too long.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

Terms = tuple[tuple[str, int], ...]  # variables with their coefficients, none 0, sorted by name
Row = tuple[Terms, int]  # terms and a constant
Bounds = list[tuple[int, Row]]  # rows that bound one variable, each with the size of its coefficient

DEFAULT_STEPS = 20_000
_BITS_PER_STEP = 64


class BudgetExceeded(Exception):
    """The question was given up: it is neither proved nor refuted."""


class Budget:
    """Counts steps (about a microsecond each) over one question, however many systems it takes."""

    def __init__(self, steps: int = DEFAULT_STEPS) -> None:
        self.steps = steps
        self.remaining = steps
        self._names = 0

    def spend(self, steps: int) -> None:
        """Count `steps`; raises `BudgetExceeded` when none are left."""
        self.remaining -= steps
        if self.remaining < 0:
            raise BudgetExceeded(f"given up after {self.steps} steps")

    def fresh_name(self) -> str:
        """A variable that no caller uses."""
        self._names += 1
        return f"~{self._names}"


class Contradiction(Exception):
    """A system was seen to be empty."""


class System:
    """Equalities and inequalities divided by their gcds; of parallel inequalities only the tightest is kept."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.equalities: list[Row] = []
        self.inequalities: dict[Terms, int] = {}

    def copy(self) -> System:
        """A system of its own with the same rows."""
        twin = System(self.budget)
        twin.equalities = list(self.equalities)
        twin.inequalities = dict(self.inequalities)
        return twin

    def require(self, kind: str, terms: Terms, constant: int) -> None:
        """Add a row of either kind: `=` or `>=`."""
        if kind == "=":
            self.require_zero(terms, constant)
        else:
            self.require_nonnegative(terms, constant)

    def require_zero(self, terms: Terms, constant: int) -> None:
        """Add `terms + constant = 0`; raises `Contradiction` where no integer can do that."""
        self.budget.spend(1)
        if not terms:
            if constant:
                raise Contradiction
            return
        divisor = _content(terms)
        if constant % divisor:
            raise Contradiction
        self.equalities.append((_divided(terms, divisor), constant // divisor))

    def require_nonnegative(self, terms: Terms, constant: int) -> None:
        """Add `terms + constant >= 0`; raises `Contradiction` where an opposite row forbids that."""
        self.budget.spend(1)
        if not terms:
            if constant < 0:
                raise Contradiction
            return
        divisor = _content(terms)
        # Over the integers 2x >= 3 is x >= 2: rounding is what makes the test stronger than one over the rationals.
        terms, constant = _divided(terms, divisor), constant // divisor
        known = self.inequalities.get(terms)
        if known is not None and known <= constant:
            return
        opposite = tuple((name, -c) for name, c in terms)
        limit = self.inequalities.get(opposite)
        if limit is not None and constant + limit < 0:
            raise Contradiction
        if limit is not None and constant + limit == 0:
            del self.inequalities[opposite]
            self.inequalities.pop(terms, None)
            self.equalities.append((terms, constant))
            return
        self.inequalities[terms] = constant

    def substitute(self, name: str, coefficient: int, equality: Row) -> None:
        """Use an equality in which `name` has the coefficient 1 or -1 to remove `name` everywhere."""
        equalities, inequalities = self.equalities, self.inequalities
        self.equalities, self.inequalities = [], {}
        changed: list[Row] = []
        # Rows without the variable stay as they are, and stand first: the changed ones are then compared with them.
        for row in inequalities.items():
            factor = coefficient_of(row[0], name)
            if factor:
                changed.append(self._replaced(row, factor * coefficient, equality))
            else:
                self.inequalities[row[0]] = row[1]
        for row in equalities:
            factor = coefficient_of(row[0], name)
            if factor:
                self.require_zero(*self._replaced(row, factor * coefficient, equality))
            else:
                self.equalities.append(row)
        for row in changed:
            self.require_nonnegative(*row)

    def _replaced(self, row: Row, factor: int, equality: Row) -> Row:
        self.budget.spend(len(row[0]) + abs(factor).bit_length() // _BITS_PER_STEP)
        return combine(row, 1, equality, -factor)


def has_solution(system: System) -> bool:
    """Pugh's algorithm: eliminates variables until none is left. Raises `Contradiction`, too, where there is none."""
    while True:
        _eliminate_equalities(system)
        if not system.inequalities:
            return True
        name, lowers, uppers = _cheapest(system)
        if not _is_exact(lowers, uppers):
            return _has_solution_between_shadows(system, name, lowers, uppers)
        system = _shadow(system, name, lowers, uppers, dark=False)


def _eliminate_equalities(system: System) -> None:
    while system.equalities:
        terms, constant = system.equalities.pop()
        name, coefficient = min(terms, key=lambda term: abs(term[1]))
        if abs(coefficient) > 1:
            # No unit coefficient: Pugh's substitution. Modulo |a|+1 the coefficient a is a unit, so an equality with
            # a fresh variable follows that can be solved for `name`; the first one shrinks and is met again.
            system.equalities.append((terms, constant))
            modulus = abs(coefficient) + 1
            reduced = {other: _balanced_remainder(c, modulus) for other, c in terms}
            reduced[system.budget.fresh_name()] = -modulus
            coefficient = reduced[name]
            terms, constant = canonical(reduced), _balanced_remainder(constant, modulus)
        system.substitute(name, coefficient, (terms, constant))


def _cheapest(system: System) -> tuple[str, Bounds, Bounds]:
    """The variable to eliminate next, with its lower and upper bounds: exact ones first, then by the rows it makes.

    A variable that is bounded from one side only makes none: its rows can always be met, and go with it.
    """
    bounds: dict[str, tuple[Bounds, Bounds]] = {}
    for row in system.inequalities.items():
        for name, c in row[0]:
            bounds.setdefault(name, ([], []))[c < 0].append((abs(c), row))
    candidates = [(name, lowers, uppers) for name, (lowers, uppers) in bounds.items()]
    return min(candidates, key=lambda c: (not _is_exact(c[1], c[2]), len(c[1]) * len(c[2])))


def _is_exact(lowers: Bounds, uppers: Bounds) -> bool:
    """Has each pair of bounds a unit coefficient? Then the shadow over the rationals is that over the integers."""
    return all(b == 1 for b, _ in lowers) or all(a == 1 for a, _ in uppers)


def _shadow(system: System, name: str, lowers: Bounds, uppers: Bounds, *, dark: bool) -> System:
    """Fourier-Motzkin: the system without `name`, each lower bound paired with each upper bound.

    The real shadow holds all solutions and maybe more. The dark shadow leaves room for an integer between each pair,
    so it holds solutions only, but maybe not all.
    """
    shadow = System(system.budget)
    for terms, constant in system.inequalities.items():
        if not coefficient_of(terms, name):
            shadow.inequalities[terms] = constant
    for b, lower in lowers:
        for a, upper in uppers:
            system.budget.spend(len(lower[0]) + len(upper[0]) + (a * b).bit_length() // _BITS_PER_STEP)
            terms, constant = combine(lower, a, upper, b)
            shadow.require_nonnegative(terms, constant - (a - 1) * (b - 1) if dark else constant)
    return shadow


def _has_solution_between_shadows(system: System, name: str, lowers: Bounds, uppers: Bounds) -> bool:
    if not _shadow_has_solution(system, name, lowers, uppers, dark=False):
        return False
    if _shadow_has_solution(system, name, lowers, uppers, dark=True):
        return True
    return _splinter_has_solution(system, name, lowers, uppers)


def _shadow_has_solution(system: System, name: str, lowers: Bounds, uppers: Bounds, *, dark: bool) -> bool:
    try:
        return has_solution(_shadow(system, name, lowers, uppers, dark=dark))
    except Contradiction:
        return False


def _splinter_has_solution(system: System, name: str, lowers: Bounds, uppers: Bounds) -> bool:
    """Solutions outside of the dark shadow lie close above a lower bound `b*name >= t`: try `b*name = t + i`."""
    a = max(size for size, _ in uppers)
    for b, (terms, constant) in lowers:
        for i in range((a * b - a - b) // a + 1):
            splinter = system.copy()
            try:
                splinter.require_zero(terms, constant - i)
                if has_solution(splinter):
                    return True
            except Contradiction:
                continue
    return False


# --- rows ----------------------------------------------------------------------------------------------------------


def combine(left: Row, a: int, right: Row, b: int) -> Row:
    """`a*left + b*right`."""
    sums = {name: a * c for name, c in left[0]}
    for name, c in right[0]:
        sums[name] = sums.get(name, 0) + b * c
    return canonical(sums), a * left[1] + b * right[1]


def canonical(coefficients: Mapping[str, int]) -> Terms:
    """Sorted terms without zeros."""
    return tuple(sorted([term for term in coefficients.items() if term[1]]))


def coefficient_of(terms: Terms, name: str) -> int:
    """The coefficient of a variable, 0 where it does not occur."""
    for other, c in terms:
        if other == name:
            return c
    return 0


def _content(terms: Terms) -> int:
    """The greatest common divisor of the coefficients."""
    divisor = 0
    for _, c in terms:
        divisor = gcd(divisor, c)
        if divisor == 1:
            break
    return divisor


def _divided(terms: Terms, divisor: int) -> Terms:
    return terms if divisor == 1 else tuple((name, c // divisor) for name, c in terms)


def _balanced_remainder(a: int, modulus: int) -> int:
    """The residue of `a` that is nearest to 0: Pugh's symmetric modulus, in [-modulus/2, modulus/2)."""
    return a - modulus * ((2 * a + modulus) // (2 * modulus))
