"""The proof that no name is read or written twice, held against counting: random maps, all small configs, both ways.

Every map that is accepted has no name twice under any small config; every witness of a refusal really collides.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mapdsl.compiler import ir
from mapdsl.compiler.formula import EvaluationError, evaluate, evaluate_params
from mapdsl.compiler.names import patterns, read
from mapdsl.compiler.resolve import resolve
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic
from mapdsl.language.syntax import parse
from tests.helpers.execution import map_of

HEAD = "param L\nparam M\nparam H\nparam on\nparam x\nindex i < L\nindex k < M\nindex n < H\nindex H <= t < L\n"
# Texts that a `{*}` may stand for; more would say no more about these templates.
TEXTS = ("0", "1", "2", "x", "w")

NAMES = [
    ("a.{i}.w", "i"),
    ("a.{k}.w", "k"),
    ("a.{n}.w", "n"),
    ("a.{t}.w", "t"),
    ("a.{i+1}.w", "i"),
    ("a.{L+k}.w", "k"),
    ("a.{2*i}.w", "i"),
    ("a.{2*i+1}.w", "i"),
    ("a.{3*k+n}.w", "kn"),
    ("a.2.w", ""),
    ("a.{j:x|y}.w", "j"),
    ("a.x.w", ""),
    ("a.{j:0|2}.w", "j"),
    ("a.{*}.w", "*"),
    ("a.{i}.{*}", "i*"),
    ("{*}.{k}.w", "k*"),
    ("a{i}.{k}", "ik"),
    ("a{k}.{i}", "ik"),
]
ATOMS = {
    "": ["on", "not on", "L > 1", "H == L", "L < M", "M % 2 == 1", "H in [0, 2]"],
    "i": ["i < H", "i >= H", "i % 2 == 0", "i % 2 == 1", "x[i] == 1", "x[i] > 0", "not x[i] == 1", "i // 2 == 0"],
    "k": ["k < H", "k >= H", "x[k] == 0", "k % 2 == 0", "L + k != 2"],
    "n": ["n == 0", "n + 1 < H", "x[n] in [0, 2]"],
    "t": ["t < H + 1", "t != H", "x[t] == 1"],
}


@st.composite
def rules(draw: st.DrawFn, number: int) -> str:
    template, axes = draw(st.sampled_from(NAMES))
    template = draw(st.sampled_from("abcd")) + template[1:] if template[0] == "a" else template
    other = f"r{number}." + ".".join({"*": "{*}", "j": "{j:p|q}"}.get(axis, f"{{{axis}}}") for axis in axes)
    atoms = [atom for axis in ["", *axes] for atom in ATOMS.get(axis, [])]
    chosen = draw(st.lists(st.sampled_from(atoms), max_size=2, unique=True))
    guard = f" where {draw(st.sampled_from([' and ', ' or '])).join(chosen)}" if chosen else ""
    return f"{template} <-> {other.rstrip('.')}{guard}"


@st.composite
def maps(draw: st.DrawFn) -> tuple[str, bool]:
    """A map, and whether its sides were swapped: then names are written twice instead of read."""
    lines = [draw(rules(number)) for number in range(draw(st.integers(2, 4)))]
    swapped = draw(st.booleans())
    if swapped:
        lines = [re.sub(r"^(\S+) <-> (\S+)", r"\2 <-> \1", line) for line in lines]
    return HEAD + "\n".join(lines) + "\n", swapped


def configs() -> Iterator[dict[str, Any]]:
    for layers, more, heads, on in itertools.product(range(3), range(3), range(3), (False, True)):
        for x in itertools.product((0, 1, 2), (0, 1), (0, 2)):
            yield {"L": layers, "M": more, "H": heads, "on": on, "x": [*x, 1, 0, 0, 0, 0]}


class Counting:
    """Who uses which name of one side, by enumeration."""

    def __init__(self, text: str, swapped: bool) -> None:
        self.map, _ = resolve(parse(map_of(text).source))
        self.side = "right" if swapped else "left"

    def uses(self, config: dict[str, Any]) -> list[tuple[int, Any, ir.Tensor, dict[str, int]]]:
        """One entry for each rule, pattern and position of its indices under which its guard holds."""
        values = evaluate_params({n: p.value for n, p in self.map.params.items()}, config)
        found = []
        for number, rule in enumerate(self.map.rules):
            for tensor in rule.side(self.side):
                for pattern in patterns(tensor.template):
                    found += [(number, pattern, tensor, v) for v in self._positions(rule, tensor, values)]
        return found

    def _positions(self, rule: ir.Rule, tensor: ir.Tensor, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
        holes = [p.value for p in tensor.template.parts if isinstance(p, tree.NumberHole)]
        names = list(dict.fromkeys(n for hole in holes for n in ir.names_in(hole) if n in self.map.indices))
        ranges = []
        for name in names:
            index = self.map.indices[name]
            assert index.upper is not None
            lower = evaluate(index.lower, values) if index.lower else 0
            ranges.append(range(lower, evaluate(index.upper, values)))
        for position in itertools.product(*ranges):
            scope = {**values, **dict(zip(names, position, strict=True))}
            try:
                if rule.guard is None or evaluate(rule.guard, scope):
                    yield scope
            except EvaluationError:
                continue  # the list is too short for this config

    def spelled(self, use: tuple[int, Any, ir.Tensor, dict[str, int]]) -> set[str]:
        """The names that one entry reads, wildcards standing for a few texts."""
        _, pattern, tensor, values = use
        names = {""}
        for part in tensor.template.parts:
            match part:
                case tree.Text(text=text):
                    words = [text]
                case tree.EnumHole(name=name, spellings=spellings):
                    words = [spellings[pattern.choice[name]]]
                case tree.NumberHole(value=value):
                    words = [str(evaluate(value, values))]
                case _:
                    words = list(TEXTS)
            names = {name + word for name in names for word in words}
        return names

    def collision(self, config: dict[str, Any]) -> str | None:
        """A name that is used twice."""
        seen: set[str] = set()
        for use in self.uses(config):
            names = self.spelled(use)
            if names & seen:
                return min(names & seen)
            seen |= names
        return None

    def readers(self, config: dict[str, Any], name: str) -> int:
        """How many entries use a name."""
        count = 0
        for use in self.uses(config):
            reading = read(use[1], name)
            count += reading is not None and all(evaluate(hole, use[3]) == n for hole, n in reading[0])
        return count


def witness_of(found: Diagnostic) -> tuple[dict[str, Any], str]:
    """Config and name of a witness such as `L = 2, x[1] = 1: a.1.w`."""
    shown, _, name = found.witness.rpartition(": ")
    config: dict[str, Any] = {"L": 0, "M": 0, "H": 0, "on": False}
    for param, value in re.findall(r"\b(L|M|H|on) = (\w+)", shown):
        config[param] = value == "true" if param == "on" else int(value)
    config["x"] = [0] * 40
    for place, value in re.findall(r"x\[(\d+)\] = (-?\d+)", shown):
        config["x"][int(place)] = int(value)
    return config, name


@settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))
@given(maps())
def test_verdicts_are_those_of_counting(drawn: tuple[str, bool]) -> None:
    text, swapped = drawn
    found = map_of(text).check()
    counting = Counting(text, swapped)
    code = "K202" if swapped else "K201"
    collisions = [d for d in found if d.code in (code, "K205")]
    for diagnostic in collisions:
        assert diagnostic.witness, diagnostic
        config, name = witness_of(diagnostic)
        assert counting.readers(config, name) >= 2, (text, str(diagnostic))
    errors = {d.code for d in found if d.severity == "error"}
    assert errors <= {code, "K205", "K208"}, (text, [str(d) for d in found if d.severity == "error"])
    never = [d.spans[0].text for d in found if d.code == "K208"]
    for config in configs() if never else ():
        held = {
            counting.map.rules[use[0]].guard.span.text
            for use in counting.uses(config)
            if counting.map.rules[use[0]].guard
        }
        assert not held & set(never), f"said to be never true, but true under {config}: {held & set(never)}"
    if not errors and "K290" not in {d.code for d in found}:
        for config in configs():
            name = counting.collision(config)
            assert name is None, f"accepted, but under {config} {name} is used twice:\n{text}"


def test_counting_finds_a_collision() -> None:
    counting = Counting(HEAD + "a.{i}.w <-> r.{i}\na.{L+k}.w <-> s.{k}\na.2.w <-> t\n", False)
    config = {"L": 3, "M": 0, "H": 0, "on": False, "x": []}
    assert counting.collision(config) == "a.2.w"
    assert counting.collision({**config, "L": 2}) is None
