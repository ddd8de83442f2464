"""Patterns of the names that a codec derives from a tensor's: `{key}` or `{stem}` with text around it."""

from __future__ import annotations

import itertools
import re

from mapdsl.compiler.names import Pattern, Segment, TemplateError, Token, Wildcard, is_number, runs
from mapdsl.language.source import Span

_MARK = re.compile(r"(\{key\}|\{stem\})")


def companion(pattern: Pattern, template: str, span: Span) -> Pattern:
    """The pattern of a companion's name; TemplateError (K203) if the name can be read in two ways.

    A key of one segment has no stem: then `{stem}.scale` is `scale`.
    """
    key, stem = pattern.segments, pattern.segments[:-1]
    if not stem:
        template = template.replace("{stem}.", "{stem}")
    segments: tuple[Segment, ...] = ()
    for piece in _MARK.split(template):
        more = key if piece == "{key}" else stem if piece == "{stem}" else _of_text(piece)
        if segments and more:
            segments = (*segments[:-1], _one(segments[-1], more[0], template, span), *more[1:])
        else:
            segments += more
    return Pattern(segments, pattern.choice)


def _of_text(text: str) -> tuple[Segment, ...]:
    """The segments of a text, the first and the last of which may be empty: others stand there."""
    return tuple(tuple(runs(piece)) for piece in text.split(".")) if text else ()


def _one(first: Segment, second: Segment, template: str, span: Span) -> Segment:
    """Two segments written one behind the other."""
    match first, second:
        case Wildcard(), tuple() if all(isinstance(token, str) for token in second):
            return first.with_text(after="".join(map(str, second)))
        case tuple(), Wildcard() if all(isinstance(token, str) for token in first):
            return second.with_text(before="".join(map(str, first)))
        case tuple(), tuple():
            tokens = _joined(first, second)
            if not any(is_number(a) and is_number(b) for a, b in itertools.pairwise(tokens)):
                return tokens
    message = f"in the companion `{template}` a hole touches another number, so the name can be read in two ways"
    raise TemplateError("K203", message, span)


def _joined(first: tuple[Token, ...], second: tuple[Token, ...]) -> tuple[Token, ...]:
    """The tokens of both, with texts that meet cut anew into runs of digits and of others."""
    if first and second and isinstance(first[-1], str) and isinstance(second[0], str):
        return (*first[:-1], *runs(first[-1] + second[0]), *second[1:])
    return first + second
