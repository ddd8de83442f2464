"""Random guards against enumeration: what is closed holds nowhere, what is open somewhere."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mapdsl.compiler.formula import EvaluationError, evaluate, evaluate_params
from mapdsl.language import tree
from tests.helpers.expressions import ask, expr, scope

BOX = scope({"A": "a", "B": "default(b, 2)", "t": "default(flag, false)"}, i="A", j="1..4")
SMALL = ["A < 4", "B < 4"]
LISTS = [list(items) for n in range(4) for items in itertools.product((0, 2), repeat=n)]


def configs(with_lists: bool) -> list[dict[str, Any]]:
    """All values in the box that the random formulas are confined to."""
    found = []
    for a, b, flag in itertools.product(range(4), (None, 0, 1, 2, 3), (None, False, True)):
        for xs in LISTS if with_lists else [[]]:
            config = {"a": a, "b": b, "flag": flag, "xs": xs}
            found.append(evaluate_params(BOX.params, config) | {"xs": xs})
    return found


def holds(facts: list[tree.Expr], values: dict[str, Any]) -> bool:
    try:
        return all(evaluate(fact, values) for fact in facts)
    except EvaluationError:
        return False


def is_satisfied(facts: list[tree.Expr], with_lists: bool) -> bool:
    return any(
        holds(facts, {**config, "i": i, "j": j})
        for config in configs(with_lists)
        for i in range(config["A"])
        for j in range(1, 4)
    )


def formulas(with_lists: bool, with_foreign: bool) -> st.SearchStrategy[str]:
    names = st.sampled_from(["i", "j", "A", "B"])
    number = st.integers(-1, 4).map(str)
    factor = st.integers(2, 4)
    terms = names | number | st.builds("({} + {})".format, names, number) | st.builds("({} - {})".format, names, names)
    terms |= st.builds("({} * {})".format, st.integers(-3, 3), names)
    terms |= st.builds("({} % {})".format, terms, factor) | st.builds("({} // {})".format, terms, factor)
    if with_foreign:
        terms |= st.builds("({} {} {})".format, names, st.sampled_from(["*", "%", "//"]), names)
    if with_lists:
        terms |= st.builds("xs[{}]".format, names) | st.just("len(xs)")
    symbols = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
    atoms = st.builds("{} {} {}".format, terms, symbols, terms) | st.sampled_from(["t", "true", "(i < j) == t"])
    atoms |= st.builds("{} in [0, {}]".format, terms, factor)
    return st.recursive(
        atoms,
        lambda inner: (
            st.builds("({} and {})".format, inner, inner)
            | st.builds("({} or {})".format, inner, inner)
            | st.builds("(not {})".format, inner)
        ),
        max_leaves=5,
    )


def check_against_enumeration(texts: list[str], with_lists: bool) -> str:
    status = ask(BOX, *texts, *SMALL, used=("i", "j")).status
    satisfied = is_satisfied([expr(text) for text in texts], with_lists)
    if status == "closed":
        assert not satisfied
    if status == "open" and not with_lists:
        assert satisfied
    return status


@settings(max_examples=250, deadline=None)
@given(st.lists(formulas(with_lists=False, with_foreign=False), min_size=1, max_size=3))
def test_linear_formulas_are_decided(texts: list[str]):
    assert check_against_enumeration(texts, with_lists=False) in ("open", "closed")


@settings(max_examples=100, deadline=None)
@given(st.lists(formulas(with_lists=False, with_foreign=True), min_size=1, max_size=3))
def test_closed_is_a_proof_beyond_linear_arithmetic(texts: list[str]):
    check_against_enumeration(texts, with_lists=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(formulas(with_lists=True, with_foreign=False), min_size=1, max_size=2))
def test_closed_is_a_proof_for_lists(texts: list[str]):
    check_against_enumeration(texts, with_lists=True)
