"""The Omega test against enumeration, and on the systems that need each of its parts."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapdsl.compiler.arithmetic import Budget, BudgetExceeded, Constraint, Linear, at_least, equal, satisfiable, solve

X, Y, Z = (Linear.variable(name) for name in "xyz")


def box(low: int, high: int, *names: str) -> list[Constraint]:
    bounds = [(at_least(Linear.variable(n), low), at_least(-Linear.variable(n), -high)) for n in names]
    return [bound for pair in bounds for bound in pair]


def between(low: int, linear: Linear, high: int) -> list[Constraint]:
    return [at_least(linear, low), at_least(-linear, -high)]


def first_solution(constraints: list[Constraint], names: str, low: int, high: int) -> tuple[int, ...] | None:
    """By enumeration, in the order that `solve` promises: values >= 0 before others, small ones first."""
    values = sorted(range(low, high + 1), key=lambda value: (value < 0, abs(value)))
    for point in product(values, repeat=len(names)):
        if all(constraint.holds(dict(zip(names, point, strict=True))) for constraint in constraints):
            return point
    return None


# --- linear terms --------------------------------------------------------------------------------------------------


def test_linear_terms_are_canonical():
    assert X + Y == Y + X
    assert X + Y - Y == X
    assert Linear((), 3) == (X * 2 + 3) - (X * 2)
    assert Linear((), 0) == X * 0
    assert Linear.of({"b": 1, "a": 0}, 2) == Linear((("b", 1),), 2)
    assert (X * 3 - Y + 1).names == ("x", "y")
    assert (X * 3 - Y + 1).value({"x": 2}) == 7


# --- against enumeration -------------------------------------------------------------------------------------------


@st.composite
def systems(draw: st.DrawFn) -> tuple[str, int, int, list[Constraint]]:
    names = "xyz"[: draw(st.integers(1, 3))]
    low, high = draw(st.sampled_from([0, -3])), 4
    constraints = box(low, high, *names)
    for _ in range(draw(st.integers(1, 4))):
        terms = {name: draw(st.integers(-12, 12)) for name in names}
        linear = Linear.of(terms, draw(st.integers(-20, 20)))
        constraints.append(Constraint(linear, draw(st.sampled_from(["=", ">=", ">="]))))
    return names, low, high, draw(st.permutations(constraints))


@settings(max_examples=400, deadline=None)
@given(systems())
def test_solve_agrees_with_enumeration(system: tuple[str, int, int, list[Constraint]]):
    names, low, high, constraints = system
    expected = first_solution(constraints, names, low, high)
    found = solve(constraints, order=names, budget=Budget(5_000_000))
    assert (None if found is None else tuple(found[name] for name in names)) == expected


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9), st.integers(-30, 30), st.booleans()), max_size=4))
def test_models_of_unbounded_systems_hold(rows: list[tuple[int, int, int, bool]]):
    constraints = [Constraint(X * a + Y * b + c, "=" if exact else ">=") for a, b, c, exact in rows]
    model = solve(constraints, budget=Budget(5_000_000))
    if model is None:
        assert first_solution(constraints, "xy", -40, 40) is None
    else:
        assert all(constraint.holds(model) for constraint in constraints)


# --- each part of the method ---------------------------------------------------------------------------------------


def test_real_shadow_is_not_enough():
    """Pugh's example: rational solutions, but no integer one. Neither shadow decides; the splinters do."""
    constraints = [*between(27, X * 11 + Y * 13, 45), *between(-10, X * 7 - Y * 9, 4)]
    assert solve(constraints) is None


def test_splinters_find_what_the_dark_shadow_misses():
    """The dark shadow of x is empty: only x = 2, y = 3 does, with no room between the bounds of 6x = 4y."""
    constraints = [*between(0, X * 6 - Y * 4, 0), *between(12, X * 3 + Y * 2, 12)]
    assert solve(constraints) == {"x": 2, "y": 3}
    narrow = [*between(1, X * 5 - Y * 3, 1), *between(20, Y * 7 + X, 40)]
    assert solve(narrow) == {"x": 2, "y": 3}


def test_last_splinter_counts():
    """Found by search: the only solutions lie on the last of the splinters that Pugh's bound asks for."""
    assert satisfiable([at_least(X * 9 + Y * 6, 7), at_least(X * 2 - Y * 8, -3), at_least(Y * 4 - X * 8, -10)])
    rows = [X * -9 - Y * 7 + 9, Y * 4 - X - 18, X * 5 + Y * 3 + 1, X * 4 + Y * 9 - 7]
    assert satisfiable([at_least(row, 0) for row in rows])


def test_dark_shadow_is_no_wider():
    """Found by search: empty, but not for a dark shadow that is too wide by one."""
    rows = [X * -5 - Y + 6, Y + 11, X * 9 - Y * 4 + 7, X * -3 + Y * 8 - 9]
    assert not satisfiable([at_least(row, 0) for row in rows])


def test_gcd_closes_an_equality():
    assert solve([equal(X * 6 + Y * 4, 3)]) is None
    assert solve([equal(X * 6 + Y * 4, 2)]) is not None


def test_gcd_tightens_an_inequality():
    assert solve([*between(3, X * 4, 3)]) is None
    assert solve([*between(5, X * 2 + Y * 2, 5)]) is None


def test_pughs_substitution():
    """No unit coefficient anywhere: Pugh's example of section 2.3.1."""
    constraints = [
        equal(X * 7 + Y * 12 + Z * 31, 17),
        equal(X * 3 + Y * 5 + Z * 14, 7),
        *box(1, 40, "x"),
        *box(-50, 50, "y"),
    ]
    model = solve(constraints)
    assert model is not None
    assert all(constraint.holds(model) for constraint in constraints)


def test_opposite_inequalities_are_an_equality():
    assert solve([*between(0, X * 3 - Y * 2, 0), equal(X, 5), at_least(Y, 0)]) is None


@pytest.mark.parametrize("c", [1, 2, 3])
def test_contradiction_without_variables(c: int):
    assert not satisfiable([at_least(Linear.number(-c), 0)])
    assert not satisfiable([equal(Linear.number(c), 0)])
    assert satisfiable([at_least(Linear.number(c), c)])


# --- small models --------------------------------------------------------------------------------------------------


def test_order_decides_which_variable_is_small():
    constraints = [equal(X + Y, 7), at_least(X, 0), at_least(Y, 0)]
    assert solve(constraints, order=["x", "y"]) == {"x": 0, "y": 7}
    assert solve(constraints, order=["y", "x"]) == {"x": 7, "y": 0}


def test_smallest_value_behind_a_gap():
    """3x = 5y + 1 with x >= 3: 0, 1 and 2 are shut out, then the congruence shuts out 3 to 6."""
    assert solve([equal(X * 3 - Y * 5, 1), at_least(X, 3), at_least(Y, 0)], order=["x"]) == {"x": 7, "y": 4}


def test_smallest_value_far_away():
    assert solve([at_least(X * 3, Y), equal(Y, 3 * 10**12 + 1)], order=["x"]) == {"x": 10**12 + 1, "y": 3 * 10**12 + 1}


def test_negative_values_only_where_nothing_else_is_left():
    assert solve([at_least(-X, 3)]) == {"x": -3}
    assert solve([at_least(X, -5)]) == {"x": 0}
    assert solve([at_least(-X * 2 - Y * 3, 10), equal(Y, 1)], order=["x"]) == {"x": -7, "y": 1}


def test_only_variables_that_occur_have_a_value():
    assert solve([at_least(X, 2)], order=["y", "x"]) == {"x": 2}


# --- budget --------------------------------------------------------------------------------------------------------


def test_budget_ends_what_takes_too_long():
    names = [f"x{n}" for n in range(12)]
    rows = [Linear.of({name: (7 * n + 5 * m) % 23 - 11 for n, name in enumerate(names)}, 40 + m) for m in range(24)]
    budget = Budget(3_000)
    with pytest.raises(BudgetExceeded, match="given up after 3000 steps"):
        solve([at_least(row, 0) for row in rows] + [at_least(-row, -90) for row in rows], budget=budget)


def test_budget_covers_many_splinters():
    big = 10**9
    with pytest.raises(BudgetExceeded):
        solve([*between(1, X * big - Y * (big + 7), 2), *between(3, X * (big + 9) + Z * (big - 1), 4), *box(1, 9, "z")])


def test_budget_covers_long_numbers():
    chain = [Linear.variable(f"x{n}") for n in range(40)]
    rows = [equal(after, before * 10**2000) for before, after in pairwise(chain)]
    assert satisfiable(rows[::-1], budget=Budget(100_000))
    with pytest.raises(BudgetExceeded):
        satisfiable(rows[::-1], budget=Budget(2_000))
