"""Contradictions that need no arithmetic: one claim says a thing, another says that it is not so.

Most rules of a map keep apart in this way (`i in sparse` here, `i not in sparse` there), and to see it costs far less
than to ask a solver what `sparse` may hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mapdsl.compiler.evaluation import rename
from mapdsl.language import tree
from mapdsl.language.tree import Expr

# Comparisons are known by one of each two opposites.
_OPPOSITE = {"!=": "==", ">=": "<", ">": "<="}


def contradict(facts: Sequence[Expr]) -> bool:
    """Whether the facts cannot all be true, whatever their terms stand for; False says nothing.

    Names that a fact equates are taken for one. An expression in error is neither true nor false.
    """
    same: dict[str, str] = {}
    for fact in facts:
        match fact:
            case tree.Operation(operator="==", operands=(tree.Name(path=one), tree.Name(path=other))):
                one, other = same.get(one, one), same.get(other, other)
                same = {name: one if known == other else known for name, known in same.items()} | {other: one}
    claims = _Claims()
    for fact in facts:
        claims.take(rename(fact, same) if same else fact)
    return claims.are_contrary()


@dataclass
class _Claims:
    """What is said to be true, what to be false, and of which parts one is to be true."""

    true: set[Expr] = field(default_factory=set)
    false: set[Expr] = field(default_factory=set)
    choices: list[tuple[Expr, ...]] = field(default_factory=list)

    def take(self, fact: Expr) -> None:
        for part, positive in _parts(fact, True):
            if positive and isinstance(part, tree.Operation) and part.operator == "or":
                self.choices.append(part.operands)
            else:
                (self.true if positive else self.false).add(part)

    def are_contrary(self) -> bool:
        return not self.true.isdisjoint(self.false) or any(all(map(self._denied, choice)) for choice in self.choices)

    def _denied(self, expr: Expr) -> bool:
        return any(part in (self.false if positive else self.true) for part, positive in _parts(expr, True))


def _parts(expr: Expr, positive: bool) -> Iterator[tuple[Expr, bool]]:
    """What must be true (or false) for an expression to be true (or, not `positive`, false)."""
    match expr:
        case tree.Operation(operator="not", operands=(operand,)):
            yield from _parts(operand, not positive)
        case tree.Operation(operator="and" | "or" as symbol, operands=operands) if (symbol == "and") is positive:
            for operand in operands:
                yield from _parts(operand, positive)
        case tree.Operation(operator=symbol, operands=operands) if symbol in _OPPOSITE:
            yield tree.Operation(_OPPOSITE[symbol], operands, span=expr.span), not positive
        case _:
            yield expr, positive
