"""Lints: what is legal but not as it should be."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mapdsl.compiler import ir
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic
from mapdsl.language.source import Span

MAX_COLUMNS = 120


def lint(resolved: ir.Map) -> list[Diagnostic]:
    """L701 unused, L704 mergeable, L706 long line, L707 look-alike."""
    return [*_unused(resolved), *_mergeable(resolved), *_long_lines(resolved), *_look_alikes(resolved)]


def _unused(resolved: ir.Map) -> Iterator[Diagnostic]:
    source = resolved.file.source
    used: set[str] = set()
    for rule in resolved.rules:
        for tensor in (*rule.left, *rule.right):
            used |= {codec.name for codec in tensor.codecs}
            used |= _names_of(tensor)
    for accept in resolved.accepts:
        used |= _template_names(accept.old)
    for index in resolved.indices.values():
        for bound in (index.lower, index.upper):
            used |= set(ir.names_in(bound)) if bound is not None else set()
    for name, index in resolved.indices.items():
        if name not in used and index.span.source is source:
            yield Diagnostic("L701", f"the index `{name}` is not used", (index.span,))
    for name, codec in resolved.codecs.items():
        if name not in used and codec.span is not None and codec.span.source is source:
            yield Diagnostic("L701", f"the codec `{name}` is not used", (codec.span,))


def _names_of(tensor: ir.Tensor) -> set[str]:
    axes = ir.axes_of(tensor.shape) if tensor.shape else ()
    return _template_names(tensor.template) | {axis.name for axis in axes if axis.name}


def _template_names(template: tree.Template) -> set[str]:
    return {n for p in template.parts if isinstance(p, tree.NumberHole) for n in ir.names_in(p.value)}


def _mergeable(resolved: ir.Map) -> Iterator[Diagnostic]:
    """Two rules of one block that differ in one word, wherever it stands, are one rule with an enumeration."""
    seen: dict[tuple[tuple[int, ...], tuple[str, ...]], tuple[Span, str]] = {}
    lines = {rule.span.start: rule for rule in resolved.rules if rule.span.source is resolved.file.source}
    for rule in lines.values():
        words = re.findall(r"\w+|[^\w\s]", rule.span.text)
        block = tuple(head.span.start for head in rule.heads)
        # A number, a hole's name or a word of the language cannot become an enumeration.
        for word in dict.fromkeys(word for word in _texts(rule) if word in words):
            masked = tuple("" if w == word else w for w in words)
            twin = seen.setdefault((block, masked), (rule.span, word))
            if twin[1] != word:
                hint = f"write `{{x:{twin[1]}|{word}}}`"
                message = f"these lines differ in one word, `{twin[1]}` and `{word}`"
                yield Diagnostic("L704", message, (rule.span, twin[0]), help=hint)
                break


def _texts(rule: ir.Rule) -> Iterator[str]:
    """The words in the literal text of a rule's own names."""
    for tensor in (*rule.left, *rule.right):
        for part in tensor.template.parts:
            if isinstance(part, tree.Text):
                yield from re.findall(r"\w+", part.text)


def _long_lines(resolved: ir.Map) -> Iterator[Diagnostic]:
    source = resolved.file.source
    for number in range(1, len(source.line_starts) + 1):
        length = len(source.line(number))
        if length > MAX_COLUMNS:
            start = source.line_starts[number - 1]
            span = Span(source, start + MAX_COLUMNS, start + length)
            yield Diagnostic("L706", f"the line has {length} columns, {MAX_COLUMNS} are enough", (span,))


def _look_alikes(resolved: ir.Map) -> Iterator[Diagnostic]:
    """A free axis `E` beside a declared `e` is more often a slip than meant."""
    declared = {**dict.fromkeys(resolved.params, "param"), **dict.fromkeys(resolved.indices, "index")}
    seen: set[str] = set()
    for rule in resolved.rules:
        for tensor in (*rule.left, *rule.right):
            for axis in ir.axes_of(tensor.shape) if tensor.shape else ():
                name = axis.name
                if name is None or name in declared or name in rule.enumerations or name in seen:
                    continue
                twins = [d for d in declared if d.lower() == name.lower()]
                if twins and _is_uppercase_twin(name, twins, declared):
                    seen.add(name)
                    message = f"the free axis `{name}` differs from the {declared[twins[0]]} `{twins[0]}` by case only"
                    yield Diagnostic("L707", message, (axis.span,))


def _is_uppercase_twin(name: str, twins: list[str], declared: dict[str, str]) -> bool:
    """Whether the free axis is likely meant to be the declared one: sizes are written large, axes small."""
    return name.isupper() or any(declared[twin] == "index" for twin in twins)
