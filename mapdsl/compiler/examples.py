"""`example` lines: what one name becomes, held against the rules for some config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from mapdsl.compiler import ir
from mapdsl.compiler.formula import EvaluationError, Scope, Verdict, decide, evaluate
from mapdsl.compiler.names import Equality, Pattern, TemplateError, patterns, read, spelled, unify
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic
from mapdsl.language.source import Span

if TYPE_CHECKING:
    from mapdsl.compiler.collide import Entry


def check_examples(resolved: ir.Map, scope: Scope, left: Sequence[Entry], right: Sequence[Entry]) -> list[Diagnostic]:
    """K211 for every example that holds for no config."""
    found: list[Diagnostic] = []
    for example in resolved.examples:
        names = _Names(resolved, scope, left if example.arrow == "->" else right)
        readers = names.readers(example.name)
        if example.target is None:
            if readers:
                message = f"`{example.name}` is read by this rule"
                found.append(Diagnostic("K211", message, (example.span, readers[0][0].span)))
            continue
        stored, native = (example.name, example.target)[:: 1 if example.arrow == "->" else -1]
        if any(_relates(resolved, scope, entry, facts, stored, native) for entry, facts in _relations(names, stored)):
            continue
        if not readers:
            found.append(Diagnostic("K211", f"no rule reads `{example.name}`", (example.span,)))
            continue
        becomes = _targets(resolved, scope, readers[0], example.arrow)
        message = f"`{example.name}` does not become `{example.target}`"
        note = f"{example.name} {example.arrow} {becomes}" if becomes else ""
        found.append(Diagnostic("K211", message, (example.span, readers[0][0].span), witness=note))
    return found


Reading = tuple["Entry", Verdict]


class _Names:
    """Reads concrete names with the rules of one side, legacy spellings included."""

    def __init__(self, resolved: ir.Map, scope: Scope, side: Sequence[Entry]) -> None:
        self.map = resolved
        self.scope = scope
        self.side = side

    def readers(self, name: str) -> list[Reading]:
        """The rules that read a name under some config; wildcards only where no rule names it."""
        concrete = literal(name)
        found: list[Reading] = []
        for entry in sorted(self.side, key=lambda e: e.is_else):
            if entry.is_else and found:
                break
            equations = unify(entry.pattern, concrete)
            if equations is None:
                continue
            verdict = decide(self.scope, _facts(equations, entry.guard))
            if verdict.status != "closed":
                found.append((entry, verdict))
        return found or [r for new in self._respelled(name) for r in self.readers(new)]

    def _respelled(self, name: str) -> Iterator[str]:
        """The name that a legacy spelling stands for, under the smallest config that has it."""
        from mapdsl.compiler.collide import spell

        for accept in self.map.accepts:
            for old, new in zip(patterns(accept.old), patterns(accept.new), strict=False):
                equations = unify(old, literal(name))
                reading = read(old, name)
                if equations is None or reading is None:
                    continue
                verdict = decide(self.scope, _facts(equations, accept.guard))
                if verdict.status == "open":
                    yield spell(new, dict(verdict.model), reading[1])


@lru_cache(maxsize=256)  # each rule is asked whether it fits one name
def literal(name: str) -> Pattern:
    """A name as a pattern without holes; one that no template spells fits nothing."""
    span = Span(None, 0, 0)  # type: ignore[arg-type]
    try:
        return patterns(tree.Template((tree.Text(name, span=span),), span=span))[0]
    except TemplateError:
        return Pattern((), {})


def _facts(equations: list[Equality], guard: tree.Expr | None) -> list[tree.Expr]:
    facts: list[tree.Expr] = [tree.Operation("==", pair, span=pair[0].span) for pair in equations]
    return facts + ([guard] if guard is not None else [])


def _relations(names: _Names, stored: str) -> Iterator[tuple[Entry, str]]:
    """Entries of the left side that may read a stored name, itself or respelled."""
    left = names.side
    for name in (stored, *names._respelled(stored)):
        for entry in left:
            if unify(entry.pattern, literal(name)) is not None:
                yield entry, name


def _relates(resolved: ir.Map, scope: Scope, entry: Entry, name: str, stored: str, native: str) -> bool:
    """Whether the entry's rule takes the stored name and the native one for some config."""
    del stored
    rule = resolved.rules[entry.rule]
    for mine, theirs in ((rule.left, rule.right), (rule.right, rule.left)):
        for one in (p for t in mine for p in patterns(t.template)):
            for other in (p for t in theirs for p in patterns(t.template)):
                pair = unify(one, literal(name)), unify(other, literal(native))
                if pair[0] is None or pair[1] is None or not _same_choice(one, other, rule):
                    continue
                if _same_texts(one, name, other, native):
                    verdict = decide(scope, _facts(pair[0] + pair[1], rule.guard))
                    if verdict.status == "open":
                        return True
    return False


def _same_choice(one: Pattern, other: Pattern, rule: ir.Rule) -> bool:
    del rule
    return all(other.choice.get(name, position) == position for name, position in one.choice.items())


def _same_texts(one: Pattern, name: str, other: Pattern, native: str) -> bool:
    readings = read(one, name), read(other, native)
    if readings[0] is None or readings[1] is None:
        return False
    return all(readings[1][1].get(key, text) == text for key, text in readings[0][1].items())


def _targets(resolved: ir.Map, scope: Scope, reading: Reading, arrow: str) -> str:
    """What a read name becomes, for the message of an example that does not hold."""
    entry, verdict = reading
    rule = resolved.rules[entry.rule]
    tensors = rule.right if arrow == "->" else rule.left
    for pattern in (p for t in tensors for p in patterns(t.template)):
        if _same_choice(entry.pattern, pattern, rule):
            return _spelled(pattern, verdict)
    return "nothing" if not tensors else ""


def _spelled(pattern: Pattern, verdict: Verdict) -> str:
    """The name under a model; what that leaves open stays a hole."""

    def number(expr: tree.Expr) -> object:
        try:
            return evaluate(expr, verdict.model)
        except EvaluationError:
            return "{}"

    return spelled(pattern, number, lambda wildcard: "{..}" if wildcard.many else "{*}")
