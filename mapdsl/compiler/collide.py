"""No two rules read one name, and no two write one name: proved for every config, or shown by the smallest one."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mapdsl.compiler import ir
from mapdsl.compiler.admissible import index_tables
from mapdsl.compiler.codecs import AnyCodec, codec_key
from mapdsl.compiler.companions import companion
from mapdsl.compiler.formula import EvaluationError, Scope, Verdict, decide, evaluate, rename
from mapdsl.compiler.names import (
    Equality,
    Pattern,
    Segment,
    Wildcard,
    is_narrower,
    number_holes,
    patterns,
    spelled,
    unify,
)
from mapdsl.compiler.shapes import name_axes
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic
from mapdsl.language.source import Source, Span

PRIME = "'"


@dataclass(frozen=True)
class Entry:
    """One way in which a rule uses a name of one side: its tensor (`companion` empty) or a companion of a codec."""

    rule: int
    tensor: int
    pattern: Pattern
    guard: tree.Expr | None
    is_else: bool
    span: Span
    companion: str = ""

    @property
    def origin(self) -> tuple[int, int, tuple[int, ...]]:
        """Entries of one origin belong to one tensor, so they do not collide with each other."""
        return self.rule, self.tensor, tuple(self.pattern.choice.values())


def scope_of(resolved: ir.Map) -> Scope:
    """The solver's view of a map: params, and every index twice so that two rules can be held against each other."""
    indices: dict[str, tuple[tree.Expr | None, tree.Expr | None]] = {}
    primed = {name: name + PRIME for name in resolved.indices}
    for name, index in resolved.indices.items():
        indices[name] = (index.lower, index.upper)
        indices[name + PRIME] = tuple(None if b is None else rename(b, primed) for b in indices[name])  # type: ignore
    # The values of index tables, `{A[a]}`, are seen to be distinct at run time.
    params = {name: param.value for name, param in resolved.params.items()}
    return Scope(params, indices, frozenset(index_tables(resolved)))


def entries(resolved: ir.Map, codecs: dict[str, AnyCodec], side: str) -> list[Entry]:
    """Every name that the rules use on a side, companions included."""
    found: list[Entry] = []
    for number, rule in enumerate(resolved.rules):
        for place, tensor in enumerate(rule.side(side)):
            for pattern in patterns(tensor.template):
                common = (rule.guard, rule.is_else, tensor.span)
                payloads = {"{key}": ""} if not tensor.codecs else {}
                for spec in tensor.codecs:
                    codec = codecs[codec_key(spec)]
                    payloads.setdefault(codec.payload, "")
                    payloads |= dict.fromkeys(codec.companions, spec.name)
                for template, name in payloads.items():
                    whole = companion(pattern, template, tensor.span)
                    found.append(Entry(number, place, whole, *common, name))
    return found


class Collisions:
    """Finds names that two entries share. `code` is what an overlap of two tensors is called on this side."""

    def __init__(self, resolved: ir.Map, scope: Scope, code: str, verb: str) -> None:
        self.map = resolved
        self.scope = scope
        self.code = code
        self.verb = verb
        self.primed = {name: name + PRIME for name in resolved.indices}
        self.axes: dict[int, list[str]] = {}
        self.found: list[Diagnostic] = []

    def run(self, entries: list[Entry]) -> list[Diagnostic]:
        """Compare every pair that can meet."""
        reported: set[tuple[int, int]] = set()
        for one, other in _candidates(entries):
            pair = (one.rule, other.rule)
            if one.origin == other.origin or pair in reported or one.is_else != other.is_else:
                continue
            if one.is_else and (is_narrower(one.pattern, other.pattern) or is_narrower(other.pattern, one.pattern)):
                continue
            if self._compare(one, other):
                reported.add(pair)
        return self.found

    def _compare(self, one: Entry, other: Entry) -> bool:
        equations = unify(one.pattern, other.pattern)
        if equations is None:
            return False
        axes = [self._axes(entry.rule) for entry in (one, other)]
        verdict = self.meet(one.guard, other.guard, equations, one.pattern, other.pattern, axes)
        if verdict.status == "closed":
            return False
        code, message = self.code, f"two rules {self.verb} the same tensor"
        if one.companion or other.companion:
            whose = one if one.companion else other
            code, message = "D402", f"a companion of `{whose.companion}` collides with another name"
        elif one.rule == other.rule:
            message = f"this rule {self.verb}s one tensor twice"
        spans = (one.span, other.span) if one.span != other.span else (one.span,)
        if verdict.status == "unknown":
            hint = f"{message}? {verdict.tried}"
            self.found.append(Diagnostic("K290", hint, spans, help="not proved: the guards leave linear arithmetic"))
        else:
            self.found.append(Diagnostic(code, message, spans, witness=witness(verdict, one.pattern, other.pattern)))
        return True

    def meet(
        self,
        guard: tree.Expr | None,
        other_guard: tree.Expr | None,
        equations: list[Equality],
        one: Pattern,
        other: Pattern,
        axes: Sequence[Sequence[str]] = ((), ()),
    ) -> Verdict:
        """Whether the equations hold under both guards for some config; the second pattern's indices are primed.

        `axes` are further indices and params of the two, which must have positions: a tensor without any is on no side.
        """
        facts: list[tree.Expr] = [tree.Operation("==", (a, rename(b, self.primed)), span=a.span) for a, b in equations]
        facts += [guard] if guard is not None else []
        facts += [rename(other_guard, self.primed)] if other_guard is not None else []
        mentioned = self._reach(itertools.chain.from_iterable(map(ir.names_in, facts)))
        near = [[name for name in names if not mentioned.isdisjoint(self._reach([name]))] for names in axes]
        facts += [_at_least_one(name) for name in dict.fromkeys(near[0] + near[1]) if name in self.map.params]
        used = list(dict.fromkeys([*indices_of(one, self.map), *(n for n in near[0] if n in self.map.indices)]))
        of_other = [*indices_of(other, self.map), *(n for n in near[1] if n in self.map.indices)]
        used += [self.primed[name] for name in dict.fromkeys(of_other)]
        # Ranges alone often keep two names apart, and are far cheaper than guards that look into lists.
        if (
            len(facts) > len(equations)
            and (apart := decide(self.scope, facts[: len(equations)], used)).status == "closed"
        ):
            return apart
        return decide(self.scope, facts, used)

    def _axes(self, number: int) -> list[str]:
        """The indices and params that are axes of a rule, in names or in shapes."""
        if number not in self.axes:
            rule = self.map.rules[number]
            tensors = (*rule.left, *rule.right)
            names = {name for t in tensors for name in name_axes(t.template, self.map.indices)}
            names |= {axis.name or "" for t in tensors if t.shape is not None for axis in ir.axes_of(t.shape)}
            self.axes[number] = [name for name in (*self.map.indices, *self.map.params) if name in names]
        return self.axes[number]

    def _reach(self, names: Iterable[str]) -> set[str]:
        """Names with all that they are made of: the bounds of indices, the definitions of params, down to fields."""
        found: set[str] = set()
        waiting = [name.removesuffix(PRIME) for name in names]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                index, param = self.map.indices.get(name), self.map.params.get(name)
                parts = [index.lower, index.upper] if index else [param.value] if param else []
                waiting += [other for part in parts if part is not None for other in ir.names_in(part)]
        return found


def _at_least_one(param: str) -> tree.Expr:
    return tree.Operation(">=", (tree.Name(param, span=_NOWHERE), tree.Number(1, span=_NOWHERE)), span=_NOWHERE)


_NOWHERE = Span(Source("", ""), 0, 0)


def indices_of(pattern: Pattern, resolved: ir.Map) -> list[str]:
    """The indices in a pattern's holes."""
    names = (name for hole in number_holes(pattern) for name in ir.names_in(hole.value))
    return list(dict.fromkeys(name for name in names if name in resolved.indices))


def witness(verdict: Verdict, one: Pattern, other: Pattern | None = None) -> str:
    """`L = 1, M = 1: layers.1.norm`: the smallest config, the other's indices primed, and the name that both read."""
    config = ", ".join(f"{name} = {_shown(value)}" for name, value in verdict.witness)
    values = dict(verdict.model)
    name = spell(one, values) if other is None else _spell_both(one, other, values)
    return f"{config}: {name}" if config else name


def _spell_both(one: Pattern, other: Pattern, values: dict[str, object]) -> str:
    """A name that both patterns read: where one has a wildcard, what the other says."""
    primed = {name: values.get(name + PRIME, value) for name, value in values.items() if not name.endswith(PRIME)}
    primed |= {name.removesuffix(PRIME): value for name, value in values.items() if name.endswith(PRIME)}
    # Both may stretch: then a name as long as both together fits them.
    fixed = [len(p.segments) for p in (one, other) if not any(isinstance(s, Wildcard) and s.many for s in p.segments)]
    length = min(fixed, default=len(one.segments) + len(other.segments))
    segments = []
    for mine, theirs in zip(_stretched(one, length), _stretched(other, length), strict=True):
        match mine, theirs:
            case Wildcard(), Wildcard():
                # Of two texts on one end the longer has the other in it.
                before, after = max(mine.before, theirs.before, key=len), max(mine.after, theirs.after, key=len)
                segments.append(f"{before}x{after}")
            case Wildcard(), _:
                segments.append(spell(Pattern((theirs,), {}), primed))
            case _:
                segments.append(spell(Pattern((mine,), {}), values))
    return ".".join(segments)


def _stretched(pattern: Pattern, length: int) -> list[Segment]:
    """The segments of a pattern with its `{..}` as long as the name is to be."""
    out: list[Segment] = []
    for segment in pattern.segments:
        many = isinstance(segment, Wildcard) and segment.many
        out += [segment] * (length - len(pattern.segments) + 1 if many else 1)
    return out


def _shown(value: object) -> str:
    return {True: "true", False: "false"}.get(value, repr(value)) if isinstance(value, bool) else repr(value)


def spell(pattern: Pattern, values: dict[str, object], texts: dict[str, str] | None = None) -> str:
    """The name of a pattern under values of its indices; wildcards are spelled by `texts`, else `x`."""

    def number(expr: tree.Expr) -> object:
        try:
            return evaluate(expr, _Free(values))
        except EvaluationError:
            return "?"

    return spelled(pattern, number, lambda wildcard: (texts or {}).get(wildcard.name, "x"))


class _Free(dict[str, object]):
    """Values of a model: a name that the model leaves open may be anything, so it is 0."""

    def get(self, name: str, default: object = 0) -> object:
        return super().get(name, default)


def _candidates(entries: list[Entry]) -> Iterator[tuple[Entry, Entry]]:
    """Pairs that may share a name: equal skeletons, and every pair with a wildcard."""
    buckets: dict[object, list[Entry]] = defaultdict(list)
    wild = [entry for entry in entries if entry.pattern.is_wild]
    for entry in entries:
        if entry.pattern.is_wild:
            continue
        bucket = buckets[entry.pattern.skeleton]
        for other in bucket:
            yield other, entry
        bucket.append(entry)
    for number, entry in enumerate(wild):
        for other in wild[number + 1 :]:
            yield entry, other
        if not entry.is_else:
            for bucket in buckets.values():
                for other in bucket:
                    yield other, entry
