"""`accept` lines: a legacy spelling is nobody else's name, stands for one name, and that is read."""

from __future__ import annotations

from collections.abc import Sequence

from mapdsl.compiler import ir
from mapdsl.compiler.codecs import AnyCodec, codec_key
from mapdsl.compiler.collide import Collisions, Entry, witness
from mapdsl.compiler.companions import companion
from mapdsl.compiler.formula import Scope
from mapdsl.compiler.names import Pattern, TemplateError, patterns, unify
from mapdsl.compiler.shapes import name_axes
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic
from mapdsl.language.source import Span

Spelling = tuple[Pattern, tree.Expr | None, Span]


def check_accepts(
    resolved: ir.Map, scope: Scope, codecs: dict[str, AnyCodec], left: Sequence[Entry]
) -> list[Diagnostic]:
    """X301, K201, K203, K213 of every `accept` line, K290 where no proof is found; `left` are the names of rules."""
    found: list[Diagnostic] = []
    collisions = Collisions(resolved, scope, "K201", "read")
    taken: list[Spelling] = [(e.pattern, e.guard, e.span) for e in left if not e.is_else]
    for accept in resolved.accepts:
        found += _axes(accept, resolved)
        try:
            old = [(pattern, accept.guard, accept.span) for pattern in _spellings(accept, resolved, codecs)]
        except TemplateError as err:
            found.append(Diagnostic(err.code, err.message, (err.span,)))
            continue
        found += _clash(collisions, old, taken)
        taken += old
        if not any(unify(new, entry.pattern) is not None for new in patterns(accept.new) for entry in left):
            found.append(Diagnostic("K213", "no rule reads the name that this stands for", (accept.new.span,)))
    return found


def _axes(accept: ir.Accept, resolved: ir.Map) -> list[Diagnostic]:
    """Both spellings hold the same indices, spellings and wildcards: each old name is one new name, and back."""
    old, new = (set(name_axes(template, resolved.indices)) for template in (accept.old, accept.new))
    if old == new:
        return []
    lost = min(old ^ new).strip("{}")
    where = "in the old spelling" if lost in old or f"{{{lost}}}" in old else "in the new spelling"
    return [
        Diagnostic("X301", f"`{lost}` stands {where} only", (accept.span,), help="both spellings need the same holes")
    ]


def _spellings(accept: ir.Accept, resolved: ir.Map, codecs: dict[str, AnyCodec]) -> list[Pattern]:
    """The old names: of the tensors themselves, and of the companions of those that they stand for."""
    templates = {"{key}": None}
    # A template that stretches fits companions by itself.
    if not any(part.many for part in ir.holes(accept.old, tree.WildcardHole)):  # type: ignore[union-attr]
        new = patterns(accept.new)
        for tensor in (tensor for rule in resolved.rules for tensor in rule.left if tensor.codecs):
            if any(unify(a, b) is not None for a in new for b in patterns(tensor.template)):
                used = [codecs[codec_key(spec)] for spec in tensor.codecs]
                templates |= dict.fromkeys(name for codec in used for name in (codec.payload, *codec.companions))
    return [companion(pattern, template, accept.span) for pattern in patterns(accept.old) for template in templates]


def _clash(collisions: Collisions, old: Sequence[Spelling], taken: Sequence[Spelling]) -> list[Diagnostic]:
    """The first name that a legacy spelling shares with another one, if there is any."""
    unproved: list[Diagnostic] = []
    for pattern, guard, span in old:
        for other, other_guard, other_span in taken:
            equations = unify(pattern, other)
            if equations is None:
                continue
            verdict = collisions.meet(guard, other_guard, equations, pattern, other)
            if verdict.status == "open":
                message = "an accepted spelling is read by another rule too"
                return [Diagnostic("K201", message, (span, other_span), witness=witness(verdict, pattern, other))]
            if verdict.status == "unknown" and not unproved:
                message = f"is an accepted spelling read by another rule too? {verdict.tried}"
                unproved.append(Diagnostic("K290", message, (span, other_span)))
    return unproved
