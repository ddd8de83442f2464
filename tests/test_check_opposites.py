"""Contradictions that are seen without a solver: what they are, what they are not, and that they say nothing wrong."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapdsl.compiler.evaluation import EvaluationError, evaluate
from mapdsl.compiler.opposites import contradict
from tests.helpers.expressions import expr


@pytest.mark.parametrize(
    "facts",
    [
        ["t", "not t"],
        ["i in xs", "i not in xs"],
        ["i < h", "i >= h"],
        ["i <= h", "i > h"],
        ["i == h", "i != h"],
        ["i == k", "xs[i] == 4", "xs[k] != 4"],
        ["i == k", "k == n", "i in xs", "n < h and n not in xs"],
        ["i == k", "n == m", "k == n", "i < h", "m >= h"],
        ["i < h and t", "not (i < h or t)"],
        ["i >= h or t", "i < h and not t"],
        ["not (not t)", "not t"],
    ],
)
def test_opposites(facts: list[str]) -> None:
    assert contradict([expr(fact) for fact in facts])


@pytest.mark.parametrize(
    "facts",
    [
        [],
        ["t"],
        ["t", "not u"],
        ["i < h", "k >= h"],
        ["i == k + 1", "i in xs", "k not in xs"],
        ["i >= h or t", "i < h"],
        ["not (i < h and t)", "t"],
        ["i < 3", "i > 3"],  # for the solver
    ],
)
def test_no_opposites(facts: list[str]) -> None:
    assert not contradict([expr(fact) for fact in facts])


ATOMS = [
    "i == k",
    "k == i",
    "i < k",
    "i >= k",
    "i != h",
    "i == h",
    "t",
    "u",
    "t == u",
    "xs[i] == 1",
    "xs[k] == 1",
    "i in xs",
]
FORMULAS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.builds("({} and {})".format, inner, inner),
        st.builds("({} or {})".format, inner, inner),
        st.builds("(not {})".format, inner),
    ),
    max_leaves=4,
)  # fmt: skip
VALUES = [
    {"i": i, "k": k, "h": h, "t": t, "u": u, "xs": xs}
    for i, k, h in itertools.product(range(2), repeat=3)
    for t, u in itertools.product((False, True), repeat=2)
    for xs in ([], [0], [1, 0], [0, 1], [1, 1])
]


@settings(max_examples=400, deadline=None)
@given(st.lists(FORMULAS, min_size=2, max_size=4))
def test_what_is_contrary_is_never_true(texts: list[str]) -> None:
    facts = [expr(text) for text in texts]
    if contradict(facts):
        assert not any(_all_true(facts, values) for values in VALUES)


def _all_true(facts: list, values: dict) -> bool:  # type: ignore[type-arg]
    try:
        return all(evaluate(fact, values) is True for fact in facts)
    except EvaluationError:
        return False
