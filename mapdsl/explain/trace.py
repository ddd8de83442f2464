"""Which rules a name belongs to: as a tensor, as a companion of one, or in a legacy spelling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mapdsl.compiler import ir
from mapdsl.compiler.check import Checked
from mapdsl.compiler.codecs import AnyCodec, codec_key
from mapdsl.compiler.collide import Entry, entries, scope_of, spell
from mapdsl.compiler.examples import literal
from mapdsl.compiler.formula import EvaluationError, Scope, Verdict, decide, evaluate
from mapdsl.compiler.names import Equality, Pattern, number_holes, patterns, read, unify
from mapdsl.compiler.shapes import Layout
from mapdsl.language import tree
from mapdsl.language.source import Source, Span

NOWHERE = Span(Source("", ""), 0, 0)


@dataclass(frozen=True)
class Reading:
    """One way in which a rule knows a name.

    `name` is the rule's own spelling where the one asked for is a legacy one, of `accept`. `key` is the tensor that it
    belongs to: another name where it is a part that `codecs` keep beside it. `values` are the indices that the name
    fixes, `example` shows a config under which it stands, with them;
    `texts` are what wildcards stand for. `shut` says why the rule does not apply, if it does not, and `unproved` what
    was tried where neither is known.
    """

    side: str
    entry: Entry
    rule: ir.Rule
    layout: Layout
    name: str
    key: str
    values: Mapping[str, int]
    example: tuple[tuple[str, Any], ...]
    texts: Mapping[str, str]
    codecs: tuple[AnyCodec, ...] = ()
    accept: ir.Accept | None = None
    shut: str = ""
    unproved: str = ""

    @property
    def tensor(self) -> ir.Tensor:
        """The tensor of the rule."""
        return self.rule.side(self.side)[self.entry.tensor]

    @property
    def choice(self) -> Mapping[str, int]:
        """Positions of the enumerations in the name."""
        return self.entry.pattern.choice


@dataclass
class Trace:
    """Everything that a map knows of one name. `readings` apply, `shut` would but for a guard or a range."""

    name: str
    readings: list[Reading] = field(default_factory=list)
    shut: list[Reading] = field(default_factory=list)


def trace(checked: Checked, name: str, params: Mapping[str, Any] | None = None) -> Trace:
    """How a map knows a name, on either side. With the values of all params, for that config; else for any."""
    return _Tracer(checked, params).trace(name)


def fixed(scope: Scope, params: Mapping[str, Any]) -> Scope:
    """The scope with params that have known values; others keep their definitions."""
    known = {name: written for name, value in params.items() if (written := _written(value)) is not None}
    return Scope({**scope.params, **{n: v for n, v in known.items() if n in scope.params}}, scope.indices)


def _written(value: Any) -> tree.Expr | None:
    match value:
        case bool():
            return tree.Boolean(value, span=NOWHERE)
        case int():
            return tree.Number(value, span=NOWHERE)
        case str():
            return tree.String(value, span=NOWHERE)
        case list() | tuple():
            items = [_written(item) for item in value]
            return None if None in items else tree.ListLiteral(tuple(items), span=NOWHERE)  # type: ignore[arg-type]
    return None


class _Tracer:
    def __init__(self, checked: Checked, params: Mapping[str, Any] | None) -> None:
        self.checked = checked
        self.map = checked.map
        self.params = params or {}
        self.scope = checked.scope if params is None else fixed(scope_of(checked.map), params)

    def trace(self, name: str) -> Trace:
        found = Trace(name)
        for side in ("left", "right"):
            self._side(found, side, name, None)
        if not any(reading.side == "left" for reading in found.readings):
            for accept, new in self._respelled(name):
                self._side(found, "left", new, accept)
        found.readings.sort(key=lambda reading: reading.entry.is_else)
        return found

    def _side(self, found: Trace, side: str, name: str, accept: ir.Accept | None) -> None:
        """Add the readings of one side. A wildcard carries what no rule names, its guard aside."""
        concrete = literal(name)
        named = False
        for entry in sorted(entries(self.map, self.checked.codecs, side), key=lambda e: e.is_else):
            equations = unify(entry.pattern, concrete)
            if equations is None or (entry.is_else and named):
                continue
            reading = self._reading(side, entry, name, equations, accept)
            in_range = not reading.shut or decide(self.scope, _facts(equations)).status != "closed"
            named = named or (in_range and not entry.is_else)
            (found.shut if reading.shut else found.readings).append(reading)

    def _reading(
        self, side: str, entry: Entry, name: str, equations: list[Equality], accept: ir.Accept | None
    ) -> Reading:
        facts = _facts(equations) + ([entry.guard] if entry.guard is not None else [])
        verdict = decide(self.scope, facts)
        if verdict.status == "closed":
            shown = decide(self.scope, _facts(equations))
            reason = _shut_reason(entry, shown)
        else:
            shown, reason = verdict, ""
        rule = self.map.rules[entry.rule]
        tensor = rule.side(side)[entry.tensor]
        texts = _texts(entry.pattern, name)
        payload = next(p for p in patterns(tensor.template) if dict(p.choice) == dict(entry.pattern.choice))
        key = name
        if payload.segments != entry.pattern.segments:
            key = spell(payload, {**self.params, **shown.model}, texts)
        return Reading(
            side,
            entry,
            rule,
            self.checked.layouts[entry.rule],
            name,
            key,
            self._certain(entry.pattern, name, shown),
            shown.witness,
            texts,
            self._codecs(tensor, key, name) if key != name else (),
            accept,
            reason,
            verdict.tried if verdict.status == "unknown" else "",
        )

    def _codecs(self, tensor: ir.Tensor, key: str, name: str) -> tuple[AnyCodec, ...]:
        """The formats of a tensor that keep a part of it under a name of its own."""
        codecs = [self.checked.codecs[codec_key(spec)] for spec in tensor.codecs]
        return tuple(codec for codec in codecs if name in codec.names(key))

    def _certain(self, pattern: Pattern, name: str, verdict: Verdict) -> dict[str, int]:
        """Indices whose value follows from the name: alone in a hole, or beside params that are known."""
        certain = {}
        for hole in number_holes(pattern):
            names = set(ir.names_in(hole.value))
            indices = [name for name in names if name in self.map.indices]
            if len(indices) == 1 and names - set(indices) <= set(self.params) and indices[0] in verdict.model:
                certain[indices[0]] = verdict.model[indices[0]]
        if not verdict.model:  # outside of every range: what stands alone in a hole is certain all the same
            numbers, _ = read(pattern, name) or ([], {})
            alone = {expr.path: number for expr, number in numbers if isinstance(expr, tree.Name)}
            certain |= {index: number for index, number in alone.items() if index in self.map.indices}
        return certain

    def _respelled(self, name: str) -> Iterator[tuple[ir.Accept, str]]:
        """The names that a legacy spelling stands for, under the config or the smallest that has it."""
        for accept in self.map.accepts:
            for old, new in zip(patterns(accept.old), patterns(accept.new), strict=False):
                equations, reading = unify(old, literal(name)), read(old, name)
                if equations is None or reading is None:
                    continue
                facts = _facts(equations) + ([accept.guard] if accept.guard is not None else [])
                verdict = decide(self.scope, facts)
                if verdict.status == "open":
                    yield accept, spell(new, {**self.params, **verdict.model}, reading[1])


def _facts(equations: list[Equality]) -> list[tree.Expr]:
    return [tree.Operation("==", pair, span=NOWHERE) for pair in equations]


def _shut_reason(entry: Entry, without_guard: Verdict) -> str:
    if entry.guard is None or without_guard.status == "closed":
        return "a number lies outside the range of its index"
    return "its guard does not hold"


def _texts(pattern: Pattern, name: str) -> dict[str, str]:
    reading = read(pattern, name)
    return reading[1] if reading is not None else {}


def spellings(checked: Checked, key: str, params: Mapping[str, Any] | None) -> list[tuple[ir.Accept, str]]:
    """The legacy spellings of a stored name; a number that no config fixes stays a hole."""
    scope = checked.scope if params is None else fixed(scope_of(checked.map), params)
    found = []
    for accept in checked.map.accepts:
        for old, new in zip(patterns(accept.old), patterns(accept.new), strict=False):
            equations, reading = unify(new, literal(key)), read(new, key)
            if equations is None or reading is None:
                continue
            facts = _facts(equations) + ([accept.guard] if accept.guard is not None else [])
            verdict = decide(scope, facts)
            if verdict.status != "closed":
                known = _known(reading[0], params or {})
                found.append((accept, partial_name(accept.old, known, old.choice, reading[1])))
    return found


def _known(numbers: list[tuple[tree.Expr, int]], params: Mapping[str, Any]) -> dict[str, Any]:
    """Params, and the indices that stand alone in a hole."""
    return {**params, **{expr.path: number for expr, number in numbers if isinstance(expr, tree.Name)}}


def partial_name(
    template: tree.Template, values: Mapping[str, Any], choice: Mapping[str, int], texts: Mapping[str, str]
) -> str:
    """A template with everything spelled that is known; the other holes stay as the map writes them."""
    from mapdsl.language.unparse import unparse_template

    words = []
    for part in template.parts:
        hole = unparse_template(tree.Template((part,), span=NOWHERE))
        match part:
            case tree.Text(text=text):
                words.append(text)
            case tree.EnumHole(name=name, spellings=spelled):
                words.append(spelled[choice[name]] if name in choice else hole)
            case tree.WildcardHole(name=name):
                words.append(texts.get(name or "", hole))
            case tree.NumberHole(value=value):
                try:
                    words.append(str(evaluate(value, values)))
                except EvaluationError:
                    words.append(hole)
    return "".join(words)


__all__ = ["Reading", "Trace", "fixed", "partial_name", "spellings", "trace"]
