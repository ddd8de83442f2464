"""Values of expressions, their errors, and expressions as text. Written as Python, see `expr`."""

from __future__ import annotations

from typing import Any

import pytest

from mapdsl.compiler.formula import (
    EvaluationError,
    MissingValueError,
    evaluate,
    evaluate_params,
    rename,
    show,
)
from mapdsl.compiler.ir import names_in
from mapdsl.language import tree
from tests.helpers.expressions import HERE, expr

VALUES = {"n": 7, "t": True, "s": "a", "xs": [0, 4, None, 4], "x.y": 3, "null": None, "rate": 0.5, "has(w)": True}
VALUES["kinds"] = "ME*EM"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n + 2 * 3 - 1", 12),
        ("n // 2 + n % 4", 6),
        ("(0 - n) % 4", 1),
        ("(0 - n) // 4", -2),
        ("-n", -7),
        ("n * 2 * 2", 28),
        ("x.y", 3),
        ("rate * 2", 1.0),
        ("n == 7 and t", True),
        ("n < 7 or not t", False),
        ("t or missing", True),
        ("s == 'a'", True),
        ("s != 3", True),
        ("s in ['b', 'a']", True),
        ("n in xs", False),
        ("xs[1]", 4),
        ("xs[n - 6]", 4),
        ("len(xs)", 4),
        ("positions(xs, 4)", [1, 3]),
        ("positions(xs, 4)[1]", 3),
        ("len(kinds)", 5),
        ("positions(kinds, 'M')", [0, 4]),
        ("positions(kinds, '*')", [2]),
        ("[n, 2][0]", 7),
        ("has('w')", True),
        ("default(missing, null, n)", 7),
        ("default(missing + 1, 5)", 5),
        ("default(xs[2], 6)", 6),
        ("default(n, missing)", 7),
    ],
)
def test_values(text: str, value: Any):
    found = evaluate(expr(text), VALUES)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing", "missing has no value"),
        ("null", "null has no value"),
        ("default(missing, null)", "null has no value"),
        ("has('v')", "has(v) has no value"),
        ("size(tp)", "size(tp) has no value"),
        ("xs[2]", "xs[2] has no value"),
        ("xs[4]", "xs has 4 elements, and no element 4"),
        ("xs[-1]", "xs has 4 elements, and no element -1"),
        ("xs[t]", "a position is an integer, not a boolean"),
        ("default(xs[9], 1)", "xs has 4 elements, and no element 9"),
        ("n // (n - 7)", "division by zero"),
        ("n % 0", "division by zero"),
        ("s + 1", "s is a string, where a number is needed"),
        ("t * 2", "t is a boolean, where a number is needed"),
        ("t < 2", "t is a boolean, where a number is needed"),
        ("xs < 2", "xs is a list, where a number is needed"),
        ("n and t", "n is an integer, where true or false is needed"),
        ("not s", "s is a string, where true or false is needed"),
        ("len(n)", "n is an integer, where a list is needed"),
        ("n in s", "s is a string, where a list is needed"),
        ("s[0]", "s is a string, where a list is needed"),
        ("big * big", "big * big is absurdly large"),
    ],
)
def test_errors(text: str, message: str):
    with pytest.raises(EvaluationError) as caught:
        evaluate(expr(text), {**VALUES, "big": 10**200})
    assert caught.value.message == message
    assert isinstance(caught.value, MissingValueError) == ("no value" in message)


def test_an_error_points_at_the_expression():
    with pytest.raises(EvaluationError) as caught:
        evaluate(expr("n + xs[4]"), VALUES)
    assert caught.value.expr == expr("xs[4]")


def test_params_in_any_order():
    params = {"c": expr("b + a"), "b": expr("default(x, 2)"), "a": expr("a"), "x": expr("y")}
    assert evaluate_params(params, {"a": 1, "y": 5, "x": 9}) == {"c": 6, "b": 5, "a": 1, "x": 5}
    assert evaluate_params(params, {"a": 1}, given={"x": 3, "c": 0}) == {"c": 0, "b": 3, "a": 1, "x": 3}


def test_params_in_a_ring():
    with pytest.raises(EvaluationError, match="params need each other: a, b"):
        evaluate_params({"a": expr("b"), "b": expr("a + 1")}, {})


@pytest.mark.parametrize(
    "text",
    ["i + 1", "(a + b) * (-c)", "not (a == b)", "x[i % 2]", "a ?? (b + 1)", "len(x)", 'positions(x, "v")', "[1, true]"],
)
def test_show(text: str):
    python = text.replace("a ?? (b + 1)", "default(a, b + 1)")
    assert show(expr(python)) == text


def test_show_templates():
    parts = (
        tree.Text("layers.", span=HERE),
        tree.NumberHole(expr("i + 1"), span=HERE),
        tree.EnumHole("j", ("a", "b"), span=HERE),
        tree.WildcardHole(None, many=True, span=HERE),
    )
    assert show(tree.Has(tree.Template(parts, span=HERE), span=HERE)) == "has(layers.{i + 1}{j:a|b}{..})"


def test_rename():
    renamed = rename(expr("i + k < x[i] and not has('i')"), {"i": "i2", "k": "i"})
    assert renamed == expr("i2 + i < x[i2] and not has('i')")
    assert set(names_in(renamed)) == {"i", "i2", "x"}
