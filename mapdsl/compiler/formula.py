"""Can these guards hold at once? A proof that they cannot, a config in which they do, or an honest "not proved".

Facts become a formula (`presburger.py`), the formula a tree of conjunctions, walked depth first, each decided by the
Omega test (`omega.py`; W. Pugh, "The Omega Test", 1991). Applications of one function are told apart only where a model
gives equal arguments different values, as solvers for uninterpreted functions do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from mapdsl.compiler.arithmetic import Budget, BudgetExceeded, Constraint, Linear, satisfiable, smallest_model
from mapdsl.compiler.evaluation import (
    EvaluationError,
    MissingValueError,
    evaluate,
    evaluate_params,
    rename,
    show,
)
from mapdsl.compiler.ir import names_in
from mapdsl.compiler.lemmas import violated_law, violated_range
from mapdsl.compiler.logic import Application, Conjunction, Disjunction, Formula, Scope, Symbols
from mapdsl.compiler.opposites import contradict
from mapdsl.compiler.presburger import Translator
from mapdsl.compiler.witness import Witness, build_witness
from mapdsl.language import tree
from mapdsl.language.source import Source, Span
from mapdsl.language.tree import Expr

__all__ = [
    "EvaluationError",
    "MissingValueError",
    "Scope",
    "Verdict",
    "decide",
    "evaluate",
    "evaluate_params",
    "rename",
    "show",
]

QUERY_STEPS = 50_000
PIN_LIMIT = 6  # what no proof covers is tried with divisors and factors up to this
_PINS = 3
_MODELS = 8

_NOWHERE = Span(Source("", ""), 0, 0)

# Small configs make short witnesses, so their sizes are settled before the indices.
_ORDER = ("present", "length", "field", "call", "choice", "index")


@dataclass(frozen=True)
class Verdict:
    """`closed`: proved that no config makes all facts true; `open`: `model` does; `unknown`: see `tried`.

    `model` is what `evaluate` takes: every param, index and field that matters. `witness` is the part of it that is
    shown to people, indices last: `("compress_ratios[3]", 4)`.
    """

    status: Literal["closed", "open", "unknown"]
    model: Mapping[str, Any] = field(default_factory=dict)
    witness: tuple[tuple[str, Any], ...] = ()
    tried: str = ""


def decide(
    scope: Scope, facts: Sequence[Expr], indices_used: Sequence[str] = (), *, steps: int = QUERY_STEPS
) -> Verdict:
    """Can all facts hold for one config, with every index that they or `indices_used` mention inside of its range?

    Verdicts are remembered in the scope. Nothing is raised: a question that takes more than `steps` is `unknown`.
    """
    key = ("verdict", tuple(facts), tuple(indices_used), steps)
    try:
        if key not in scope.memo:
            scope.memo[key] = _answer(scope, facts, indices_used, steps)
        return scope.memo[key]  # type: ignore[return-value]
    except RecursionError:
        return Verdict("unknown", tried="given up: nested too deeply")


def _answer(scope: Scope, facts: Sequence[Expr], indices_used: Sequence[str], steps: int) -> Verdict:
    if contradict(facts):
        return Verdict("closed")
    try:
        return _Query(scope, facts, indices_used, Budget(steps)).verdict()
    except BudgetExceeded as error:
        return Verdict("unknown", tried=str(error))


class _Query:
    """One question: its facts, the ranges that belong to them, and the variables made for them."""

    def __init__(self, scope: Scope, facts: Sequence[Expr], indices_used: Sequence[str], budget: Budget) -> None:
        self.scope = scope
        self.budget = budget
        self.symbols = Symbols()
        self.claims = [*facts, *_ranges(scope, facts, indices_used)]

    def verdict(self) -> Verdict:
        closed, witness = self._attempt({})
        if closed:
            return Verdict("closed")
        relaxed = list(self.symbols.relaxed)
        witness = witness or self._attempt_pinned({})
        if witness:
            return Verdict("open", witness.values, witness.shown)
        if relaxed:
            beyond = f"{', '.join(f'`{text}`' for text in relaxed)}: beyond linear arithmetic"
            return Verdict("unknown", tried=f"{beyond}; no case found with divisors and factors up to {PIN_LIMIT}")
        return Verdict("unknown", tried=f"the {_MODELS} smallest cases are configs in which a guard has no value")

    def _attempt(self, pins: Mapping[Linear, int]) -> tuple[bool, Witness | None]:
        """Is the formula empty? If not: a model of it that is true of the facts themselves, if one is met soon."""
        self.symbols.pinnable.clear()
        translator = Translator(self.scope, self.symbols, self.budget, pins)
        formula = Conjunction(tuple(translator.fact(claim) for claim in self.claims))
        closed = True
        for model in islice(self._models(formula), _MODELS):
            closed = False
            witness = build_witness(self.scope, self.claims, self.symbols, translator.applications, model)
            if witness:
                return False, witness
        return closed, None

    def _attempt_pinned(self, pins: Mapping[Linear, int]) -> Witness | None:
        """Give the divisors and factors that made the formula weak small values, one after the other."""
        free = [linear for linear in self.symbols.pinnable if linear not in pins]
        if not free or len(pins) == _PINS:
            return None
        for value in range(PIN_LIMIT + 1):
            more = {**pins, free[0]: value}
            closed, witness = self._attempt(more)
            if not closed:
                witness = witness or self._attempt_pinned(more)
            if witness:
                return witness
        return None

    def _models(self, formula: Formula) -> Iterator[dict[str, int]]:
        """Models of the formula's disjunctive normal form, which is walked lazily, contradictory parts cut."""
        stack = [_Branch((formula,))]
        while stack:
            branch = stack.pop()
            self.budget.spend(1)
            if not branch.unfold() or not satisfiable(branch.constraints, budget=self.budget):
                continue
            if branch.choices:
                stack.extend(reversed(branch.split()))
                continue
            model = smallest_model(branch.constraints, order=self._order(), budget=self.budget)
            if outside := violated_range(self.symbols, model):
                # What is left is a string where numbers are spoken of: a last resort.
                stack.insert(0, _Branch((outside,), branch))
            elif law := violated_law(self.scope, self.symbols, branch.applications, model, self.budget):
                stack.append(_Branch((law,), branch))
            else:
                yield model

    def _order(self) -> list[str]:
        named = self.symbols.variables.items()
        return [name for kind in _ORDER for (of_kind, _), name in named if of_kind == kind]


class _Branch:
    """One way through the disjunctions of a formula, as far as it was taken."""

    def __init__(self, pending: tuple[Formula, ...], parent: _Branch | None = None) -> None:
        self.pending = list(pending)
        self.constraints: list[Constraint] = list(parent.constraints) if parent else []
        self.applications: list[Application] = list(parent.applications) if parent else []
        self.choices: dict[int, Disjunction] = dict(parent.choices) if parent else {}

    def unfold(self) -> bool:
        """Sort what is pending into constraints and choices; False where a part of it is false as it stands."""
        while self.pending:
            match self.pending.pop():
                case Constraint() as constraint:
                    self.constraints.append(constraint)
                case Application() as application:
                    self.applications.append(application)
                case Conjunction(parts=parts):
                    self.pending.extend(parts)
                case Disjunction(parts=()):
                    return False
                case Disjunction(parts=(part,)):
                    self.pending.append(part)
                case Disjunction() as choice:
                    # One object is one choice: a param's case split is met wherever the param is mentioned.
                    self.choices[id(choice)] = choice
        return True

    def split(self) -> list[_Branch]:
        """The branches that the smallest choice leads to."""
        choice = min(self.choices.values(), key=lambda choice: len(choice.parts))
        del self.choices[id(choice)]
        return [_Branch((part,), self) for part in choice.parts]


def _ranges(scope: Scope, facts: Sequence[Expr], indices_used: Sequence[str]) -> list[Expr]:
    """`0 <= i` and `i < L` for every index that is mentioned, and for those that their bounds mention."""
    waiting = [name for fact in reversed(facts) for name in sorted(set(names_in(fact)), reverse=True)]
    waiting += reversed(indices_used)
    ranges: dict[str, tuple[Expr, ...]] = {}
    while waiting:
        name = waiting.pop()
        if name in scope.indices and name not in ranges:
            ranges[name] = _range(scope, name)
            waiting += [other for bound in ranges[name] for other in sorted(set(names_in(bound)), reverse=True)]
    return [bound for of_index in ranges.values() for bound in of_index]


def _range(scope: Scope, name: str) -> tuple[Expr, ...]:
    key = ("range", name)
    if key not in scope.memo:
        lower, upper = scope.indices[name]
        index = tree.Name(name, span=_NOWHERE)
        above = tree.Operation(">=", (index, lower or tree.Number(0, span=_NOWHERE)), span=_NOWHERE)
        below = (tree.Operation("<", (index, upper), span=_NOWHERE),) if upper else ()
        scope.memo[key] = (above, *below)
    return scope.memo[key]  # type: ignore[return-value]
