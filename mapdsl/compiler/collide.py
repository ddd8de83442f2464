"""No two rules read one name, and no two write one name: proved for every config, or shown by the smallest one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from mapdsl.compiler import ir
from mapdsl.compiler.codecs import AnyCodec, codec_key
from mapdsl.compiler.formula import EvaluationError, Scope, Verdict, decide, evaluate, rename
from mapdsl.compiler.names import Equality, Pattern, Segment, Wildcard, is_narrower, number_holes, patterns, unify
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic
from mapdsl.language.source import Span

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
    return Scope({name: param.value for name, param in resolved.params.items()}, indices, _tables(resolved))


def _tables(resolved: ir.Map) -> frozenset[str]:
    """List params that stand in names as index tables, `{A[a]}`: their values are seen to be distinct at run time.

    Only those that are fields of the config: of a list that is computed from one, that one may well repeat.
    """
    parts = [part for rule in resolved.rules for side in rule.sides for t in side for part in t.template.parts]
    found = set()
    for part in parts:
        match part:
            case tree.NumberHole(value=tree.Lookup(value=tree.Name(path=name))) if name in resolved.params:
                value = resolved.params[name].value
                options = value.options if isinstance(value, tree.Default) else (value,)
                if all(
                    isinstance(option, tree.Name) and option.path not in resolved.params.keys() - {name}
                    for option in options
                ):
                    found.add(name)
    return frozenset(found)


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
                    payloads.setdefault(getattr(codec, "payload", "{key}"), "")
                    payloads |= dict.fromkeys(codec.companions, spec.name)
                for template, name in payloads.items():
                    found.append(Entry(number, place, companion(pattern, template), *common, name))
    return found


def companion(pattern: Pattern, template: str) -> Pattern:
    """The pattern of a companion's name: `{key}` or `{stem}` of the tensor's with text around it."""
    if template == "{key}":
        return pattern
    mark = "{key}" if "{key}" in template else "{stem}"
    before, after = template.split(mark, 1)
    base = pattern.segments if mark == "{key}" else pattern.segments[:-1]
    if not base:
        # A key of one segment has no stem; `{stem}.scale` is `scale`.
        return Pattern(_text_segments(after.removeprefix(".")), pattern.choice)
    return Pattern(_joined(_joined(_text_segments(before), base), _text_segments(after)), pattern.choice)


def _text_segments(text: str) -> tuple[Segment, ...]:
    if not text:
        return ()
    template = tree.Template((tree.Text(text, span=_NOWHERE),), span=_NOWHERE)
    return tuple(
        patterns(tree.Template((tree.Text(part, span=_NOWHERE),), span=_NOWHERE))[0].segments[0] if part else ()
        for part in template.parts[0].text.split(".")  # type: ignore[union-attr]
    )


_NOWHERE = Span(None, 0, 0)  # type: ignore[arg-type]


def _joined(one: tuple[Segment, ...], other: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """Two runs of segments written one behind the other: the last of one and the first of the other become one."""
    if not one or not other:
        return one + other
    last, first = one[-1], other[0]
    if isinstance(last, Wildcard) or isinstance(first, Wildcard):
        return (*one, *(s for s in other if s != ())) if first == () or last == () else one + other
    tokens = list(last)
    for token in first:
        if tokens and isinstance(token, str) and isinstance(tokens[-1], str) and _kind(token) == _kind(tokens[-1]):
            tokens[-1] += token
        else:
            tokens.append(token)
    return (*one[:-1], tuple(tokens), *other[1:])


def _kind(text: str) -> bool:
    return text[0] in "0123456789"


class Collisions:
    """Finds names that two entries share. `code` is what an overlap of two tensors is called on this side."""

    def __init__(self, resolved: ir.Map, scope: Scope, code: str, verb: str) -> None:
        self.map = resolved
        self.scope = scope
        self.code = code
        self.verb = verb
        self.primed = {name: name + PRIME for name in resolved.indices}
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
        verdict = self.meet(one.guard, other.guard, equations, one.pattern, other.pattern)
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
    ) -> Verdict:
        """Whether the equations hold under both guards for some config; the second pattern's indices are primed."""
        facts: list[tree.Expr] = [tree.Operation("==", (a, rename(b, self.primed)), span=a.span) for a, b in equations]
        facts += [guard] if guard is not None else []
        facts += [rename(other_guard, self.primed)] if other_guard is not None else []
        used = [*indices_of(one, self.map), *(self.primed[name] for name in indices_of(other, self.map))]
        # Ranges alone often keep two names apart, and are far cheaper than guards that look into lists.
        if (
            len(facts) > len(equations)
            and (apart := decide(self.scope, facts[: len(equations)], used)).status == "closed"
        ):
            return apart
        return decide(self.scope, facts, used)


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
        wild = isinstance(mine, Wildcard)
        segments.append(spell(Pattern((theirs if wild else mine,), {}), primed if wild else values))
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
    segments = []
    for segment in pattern.segments:
        if isinstance(segment, Wildcard):
            segments.append((texts or {}).get(segment.name, "x"))
            continue
        tokens = []
        for token in segment:
            try:
                tokens.append(token if isinstance(token, str) else str(evaluate(token.value, _Free(values))))
            except EvaluationError:
                tokens.append("?")
        segments.append("".join(tokens))
    return ".".join(segments)


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
