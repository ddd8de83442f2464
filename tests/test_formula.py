"""Guards: which exclude each other, which meet, and in which smallest config. Written as Python, see `expr`."""

from __future__ import annotations

import time
from typing import Any

import pytest

from mapdsl.compiler.formula import Scope, decide
from tests.helpers.expressions import ask, expr, operation, scope

DEEPSEEK = {
    "L": "num_hidden_layers",
    "H": "default(num_hash_layers, 0)",
    "M": "default(num_nextn_predict_layers, 0)",
    "compress_ratios": "compress_ratios",
    "layer_types": "layer_types",
    "tie": "default(tie_word_embeddings, false)",
    "P": "sliding_window_pattern",
    "full": 'positions(layer_types, "full")',
    "sliding": 'positions(layer_types, "sliding")',
    "moe": "default(moe_layers, [])",
}
MAP = scope(DEEPSEEK, i="L", i2="L", k="M", k2="M", a="len(full)", a2="len(full)", b="len(sliding)", tail="L..")
GRID = scope({"P": "parts", "Q": "rows"}, o="Q", o2="Q", s="P", s2="P")


@pytest.mark.parametrize(
    "facts",
    [
        ["i < H", "i2 >= H", "i == i2"],
        ["L + k == i"],
        ["i == tail"],
        ["L + k == L + k2", "k != k2"],
        ["i + 1 == 0"],
        ["i - 3 < 0", "i == 3"],
        ["i2 == i - 5", "i < 5"],
        ["M == 0", "k >= 0"],
        ["L == 0", "i == i"],
        ["P == 0 - 1"],
        # booleans
        ["tie", "not tie"],
        ["tie and i < 3", "not (tie or i > 2)"],
        ["(i < 3) == tie", "tie", "i > 3"],
        ["tie", "tie == false"],
        ["has('lm_head.weight')", "not has('lm_head.weight')"],
        ["not (has('a') or tie)", "tie"],
        # remainders and quotients
        ["i % 4 == 3", "i2 % 4 != 3", "i == i2"],
        ["i % 4 == 1", "(i + 2) % 4 != 3"],
        ["i % 4 == 4"],
        ["i // 4 == 2", "i < 8"],
        ["i // 3 * 3 + i % 3 != i"],
        ["(0 - i) % 3 < 0"],
        ["i // 0 == 0"],
        ["i % (0 - 4) > 0"],
        ["i % P < 0"],
        ["size(tp) == 0"],
        ["has('x') == 2"],
        ["'a' < 3"],
        ["i % 2 == 0", "i % 3 == 1", "i % 6 == 5"],
        # lists
        ["compress_ratios[i] == 4", "compress_ratios[i2] != 4", "i == i2"],
        ["compress_ratios[i] > 4", "compress_ratios[i2 + 1] < 4", "i == i2 + 1"],
        ["compress_ratios[i] > 0", "i >= len(compress_ratios)"],
        ["compress_ratios[i - 1] > 0", "i == 0"],
        ["layer_types[i] == 'full'", "layer_types[i2] == 'sliding'", "i == i2"],
        ["layer_types[i] == layer_types[i2]", "layer_types[i] == 'full'", "layer_types[i2] == 'sliding'"],
        ["[4, 8][i] == 5"],
        ["[4, 8][i] == 8", "i != 1"],
        ["[[1]][0] == 1", "i < 0"],
        ["i in [1, 3]", "i2 not in [1, 3]", "i == i2"],
        ["i in moe", "i2 not in moe", "i == i2"],
        ["i in []"],
        ["full[a] == sliding[b]"],
        ["full[a] == full[a2]", "a < a2"],
        ["full[a] == i", "layer_types[i] != 'full'"],
        ["full[a] >= len(layer_types)"],
        ["i in full", "layer_types[i] != 'full'"],
        ["i not in full", "layer_types[i] == 'full'"],
        ["len(full) > len(layer_types)"],
        # strings
        ["kind == 'a'", "kind == 'b'"],
        ["kind == 'a'", "kind == 3"],
        ["kind == 'a'", "kind < 3"],
        ["kind != 'a'", "other != 'b'", "kind == other", "other == 'a'"],
        # beyond linear arithmetic, and closed all the same
        ["i % P == 0", "i2 % P != 0", "i == i2"],
        ["i % P == 5", "P < 5"],
        ["i // P > i"],
        ["nested[i][2] == 1", "nested[i2][2] == 2", "i == i2"],
        ["layer_types == ['a']", "not (layer_types == ['a'])"],
    ],
)
def test_closed(facts: list[str]):
    assert ask(MAP, *facts).status == "closed"


@pytest.mark.parametrize(
    "facts",
    [
        ["P * o + s == P * o2 + s2", "o != o2"],
        ["P * o + s == P * o2 + s2", "s != s2"],
        ["o * P + s < 0"],
        ["3 * o + 1 == 3 * o2 + 2"],
        ["2 * o == 2 * o2", "o < o2"],
    ],
)
def test_closed_for_strided_holes(facts: list[str]):
    assert ask(GRID, *facts).status == "closed"


def test_distinct_values_of_an_index_table():
    indices = {"a": "len(table)", "b": "len(table)"}
    facts = ["table[a] == table[b]", "a != b"]
    assert ask(scope({"table": "table"}, distinct=("table",), **indices), *facts).status == "closed"
    assert ask(scope({"table": "table"}, **indices), *facts).witness == (
        ("table[0]", 0),
        ("table[1]", 0),
        ("len(table)", 2),
        ("a", 0),
        ("b", 1),
    )


@pytest.mark.parametrize(
    "facts", [["P * o + 5 >= P * o2", "o < o2", "P > 3"], ["P * o2 <= P * o + 5", "o < o2", "P > 3"]]
)
def test_products_grow_on_both_sides(facts: list[str]):
    assert dict(ask(GRID, *facts).witness)["P"] == 4


def test_params_are_no_less_than_zero():
    where = scope({"d": "x - 3"})
    assert ask(where, "d < 0").status == "closed"
    assert ask(where, "d != 5").model == {"x": 3, "d": 0}
    assert ask(scope({"d": "default(x - 3, 0)"}), "d != 5").model["d"] >= 0
    assert ask(where, "x != 0", "x != 1", "n != 0").model == {"x": 2, "n": 1}
    assert ask(where, "t != 0", "t != 1", "t != 2", "t == u", "u < 3").status == "closed"


@pytest.mark.parametrize("order", ["a < b", "a > b"])
@pytest.mark.parametrize("values", ["table[a] <= table[b]", "table[a] >= table[b]"])
def test_distinct_values_in_any_order(order: str, values: str):
    where = scope({"table": "table"}, distinct=("table",), a="len(table)", b="len(table)")
    first, second = ask(where, order, values).model["table"]
    assert first != second


@pytest.mark.parametrize("order", ["a < a2", "a > a2"])
def test_positions_increase_both_ways(order: str):
    assert ask(MAP, "full[a] >= 0", "full[a2] >= 0", order).model["full"] == [0, 1]


def test_empty_question_is_open():
    assert ask(MAP).status == "open"


# --- guards that meet: the smallest config ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "witness"),
    [
        (["i < H", "i2 < L", "i == i2"], {"H": 1, "L": 1, "i": 0, "i2": 0}),
        (["L + k == i + 2"], {"L": 1, "M": 2, "i": 0, "k": 1}),
        (["tail == L + k"], {"L": 0, "M": 1, "k": 0, "tail": 0}),
        (["i == 3"], {"L": 4, "i": 3}),
        (
            ["compress_ratios[i] > 0", "compress_ratios[3] == 4"],
            {"compress_ratios[0]": 1, "compress_ratios[3]": 4, "L": 1, "i": 0},
        ),
        (
            ["compress_ratios[i] > 0", "compress_ratios[i2] == 4", "i == i2"],
            {"compress_ratios[0]": 4, "L": 1, "i": 0, "i2": 0},
        ),
        (["layer_types[1] == 'full'"], {"layer_types[1]": "full"}),
        (["layer_types[i] != 'full'", "i == 1"], {"layer_types[1]": "other1", "L": 2, "i": 1}),
        (["i in moe", "i2 not in moe"], {"moe": [0], "L": 2, "i": 0, "i2": 1}),
        (["full[a] == i", "i > 0"], {"full[0]": 1, "L": 2, "len(full)": 1, "a": 0, "i": 1}),
        (["tie", "has('x')"], {"tie": True, "has(x)": True}),
        (["M == 2"], {"M": 2}),
        (["tie == (i < 1)", "i == 1"], {"tie": False, "L": 2, "i": 1}),
        (["flags[i]", "not flags[i2]"], {"flags[0]": True, "flags[1]": False, "L": 2, "i": 0, "i2": 1}),
        (["len(layer_types) == 7"], {"len(layer_types)": 7}),
        (["size(tp) > 1"], {"size(tp)": 2}),
        (["i % 4 == 3", "i % 3 == 1"], {"L": 8, "i": 7}),
        # beyond linear arithmetic: found by giving the divisor a value
        (["i % P == 2", "i > 3"], {"P": 3, "L": 6, "i": 5}),
        (["P * L == 6", "P > 1", "L > 1"], {"P": 2, "L": 3}),
        (["i * i == 4"], {"L": 3, "i": 2}),
        (["P * L == 15", "P > 1"], {"P": 3, "L": 5}),
        (["(i - 3) * L < 0"], {"L": 1, "i": 0}),
        (["i % (0 - 4) == 0 - 3"], {"L": 2, "i": 1}),
        (["(compress_ratios[2] == 1 and i < 0) or tie"], {"tie": True}),
        (["compress_ratios[i] == 4", "(compress_ratios[i2] == 5 and i < 0) or i2 == i"], {"compress_ratios[0]": 4}),
        (["compress_ratios[i] == 1", "compress_ratios[i2] == 2", "i <= i2"], {"i": 0, "i2": 1}),
        (["compress_ratios[i] == 1", "compress_ratios[i2] == 2", "i >= i2"], {"i": 1, "i2": 0}),
        (["i // P == 2", "P == 3"], {"P": 3, "L": 7, "i": 6}),
    ],
)
def test_open(facts: list[str], witness: dict[str, Any]):
    verdict = ask(MAP, *facts)
    assert verdict.status == "open"
    shown = dict(verdict.witness)
    assert {name: shown.get(name) for name in witness} == witness


def test_indices_used_bring_their_ranges():
    assert ask(MAP, "L == 0").status == "open"
    assert ask(MAP, "L == 0", used=("i",)).status == "closed"
    chained = scope({}, j="i", i="n")
    assert ask(chained, "n == 1", used=("j",)).status == "closed"


def test_an_index_may_start_late():
    late = scope({"A": "first"}, i="A..B")
    assert ask(late, "i < A").status == "closed"
    assert dict(ask(late, "A == 3", used=("i",)).witness) == {"A": 3, "B": 4, "i": 3}


def test_model_leaves_absent_fields_out():
    choice = scope({"x": "default(first, second, 5)"})
    assert ask(choice, "x == 5", "first != 5").status == "closed"  # a field that a fact speaks of is present
    assert ask(choice, "x == 4").model["x"] == 4
    assert ask(scope({"x": "default(first, 5)"}), "x == 5", "x != 4").model["x"] == 5
    assert ask(scope({"x": "default(first, 5)"}), "x == 5", "not has('y')").model in (
        {"x": 5, "has(y)": False},
        {"x": 5, "first": 5, "has(y)": False},
    )


def test_the_next_option_counts_only_where_the_first_is_absent():
    choice = scope({"x": "default(first, 5)", "y": "default(first, 6)"})
    assert ask(choice, "x == 5", "y == 6").model == {"x": 5, "y": 6}
    assert ask(choice, "x == 5", "y == 7").status == "closed"
    assert ask(choice, "x != y", "x == 7").status == "closed"
    assert ask(scope({"x": "default(xs, [4, 8])"}), "x[0] == 4", "x[1] == 8").status == "open"
    assert ask(scope({"x": "default([4, 8], xs)"}), "x[0] == 5").status == "closed"
    assert ask(scope({"x": "default(xs[1], 3)"}), "x == 3", "xs[1] == 4").status == "closed"
    assert ask(scope({"x": "default(xs[1] * 0, 5)"}), "x == 5", "xs[0] == 4").model["xs"] == [4, None]


def test_a_param_may_be_called_as_its_field():
    same = scope({"x": "default(x, 7)", "y": "x + 1"})
    assert ask(same, "y == 8", "x != 7").status == "closed"
    assert ask(same, "y == 8").model["x"] == 7


def test_an_index_may_be_called_as_a_field():
    clash = scope({"n": "i"}, i="3")
    assert ask(clash, "i == 2", "n == 5").model == {"i": 2, "n": 5}


def test_or_does_not_look_where_python_does_not():
    assert ask(MAP, "i > 2 or compress_ratios[i] == 4", "len(compress_ratios) == 0").status == "open"
    assert ask(MAP, "compress_ratios[i] == 4 or i > 2", "len(compress_ratios) == 0").status == "unknown"


# --- verdicts that are none ------------------------------------------------------------------------------------------


def test_unknown_says_what_was_tried():
    verdict = ask(MAP, "i % P == 9", "i < 9")
    assert verdict.status == "unknown"
    assert verdict.tried == "`i % P`: beyond linear arithmetic; no case found with divisors and factors up to 6"


def test_hard_guards_end_in_time():
    clauses = [
        f"x{n % 30} + x{(n * 7 + 3) % 30} == x{(n * 11 + 5) % 30} + {n % 3} or x{n % 29} % 7 == {n % 5}"
        for n in range(40)
    ]
    started = time.perf_counter()
    verdict = ask(MAP, *clauses, "x0 + x1 + x2 + x3 < 1")
    assert time.perf_counter() - started < 20
    assert verdict.status == "unknown"
    assert verdict.tried == "given up after 50000 steps"


def test_pigeons_end_in_time():
    holes = [" or ".join(f"p{n} == {hole}" for hole in range(9)) for n in range(10)]
    apart = [f"p{n} != p{m}" for n in range(10) for m in range(n)]
    started = time.perf_counter()
    assert ask(MAP, *holes, *apart).status == "unknown"
    assert time.perf_counter() - started < 20


def test_deep_nesting_is_given_up():
    nested = expr("tie")
    for _ in range(20_000):
        nested = operation("not", nested)
    assert decide(Scope({"tie": expr("t")}, {}), [operation("==", nested, nested)]).status == "unknown"


def test_params_that_double_do_not_hang():
    params = {"x0": "n"} | {f"x{n}": f"default(y{n}, x{n - 1}) + default(z{n}, x{n - 1})" for n in range(1, 40)}
    started = time.perf_counter()
    assert ask(scope(params), "x39 == 1").status in ("unknown", "open")
    assert time.perf_counter() - started < 20


def test_long_lists_are_no_witness():
    started = time.perf_counter()
    assert ask(MAP, "compress_ratios[1000000000000] == 4").status == "unknown"
    assert time.perf_counter() - started < 20


def test_verdicts_are_remembered():
    facts = [expr("i % 4 == 3"), expr("i > H")]
    assert decide(MAP, facts) is decide(MAP, list(facts))
