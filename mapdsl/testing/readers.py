"""Which rules read a name, found by trying: the plain meaning of templates, without the compiler's proofs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mapdsl.compiler import ir
from mapdsl.compiler.codecs import AnyCodec
from mapdsl.compiler.collide import Entry, entries
from mapdsl.compiler.expand import Expansion
from mapdsl.compiler.formula import EvaluationError, evaluate
from mapdsl.compiler.names import Pattern, is_narrower, number_holes, patterns, read
from mapdsl.language import tree


def bindings(expansion: Expansion, pattern: Pattern, name: str) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """The values of indices, inside their ranges, and the texts of wildcards under which a pattern spells a name."""
    reading = read(pattern, name)
    if reading is None:
        return
    numbers, texts = reading
    indices = expansion.map.indices
    used = [n for hole in number_holes(pattern) for n in ir.names_in(hole.value) if n in indices]
    closed = [name for name in dict.fromkeys(used) if indices[name].upper is not None]
    open_ = [name for name in dict.fromkeys(used) if indices[name].upper is None]
    highest = max((number for _, number in numbers), default=0)
    for values in expansion.index_values(closed):
        for full in _open_values(open_, indices, values, highest):
            if all(_value(expr, full) == number for expr, number in numbers):
                yield full, texts


def _open_values(
    open_: list[str], indices: Mapping[str, ir.Index], values: dict[str, Any], highest: int
) -> Iterator[dict[str, Any]]:
    if not open_:
        yield values
        return
    first, *rest = open_
    lower = indices[first].lower
    for value in range(0 if lower is None else evaluate(lower, values), highest + 1):
        yield from _open_values(rest, indices, {**values, first: value}, highest)


def _value(expr: tree.Expr, values: Mapping[str, Any]) -> Any:
    try:
        return evaluate(expr, values)
    except EvaluationError:
        return None


class Readers:
    """The names that the rules of a map use on its two sides, companions and legacy spellings included."""

    def __init__(self, expansion: Expansion) -> None:
        self.expansion = expansion
        checked = expansion.checked
        codecs: dict[str, AnyCodec] = checked.codecs
        self.of = {side: entries(checked.map, codecs, side) for side in ("left", "right")}
        self.legacy = [p for accept in checked.map.accepts for p in patterns(accept.old)]

    def of_name(self, name: str, side: str) -> list[Entry]:
        """Every use of a name, whether or not the guard of its rule holds."""
        return [e for e in self.of[side] if any(True for _ in bindings(self.expansion, e.pattern, name))]

    def is_free(self, name: str, side: str, rule: int) -> bool:
        """Whether no rule but this one, and no wider one that carries what is left, names it."""
        if side == "left" and self.is_legacy(name):
            return False
        mine = [e.pattern for e in self.of[side] if e.rule == rule]
        for entry in self.of_name(name, side):
            wider = entry.is_else and all(is_narrower(pattern, entry.pattern) for pattern in mine)
            if entry.rule != rule and not wider:
                return False
        return True

    def is_legacy(self, name: str) -> bool:
        """Whether a name is a spelling that `accept` rewrites."""
        return any(True for p in self.legacy for _ in bindings(self.expansion, p, name))
