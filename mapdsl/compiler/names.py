"""Name templates as languages: how a template reads a name, and when two templates read the same one.

A template becomes *patterns*, one for each choice of its enumerations. A pattern is a list of segments (a name is cut
at its dots), a segment a list of tokens: maximal runs of digits, maximal runs of other characters, and number holes. A
number hole prints a canonical decimal and touches no digit and no other hole, so a name is cut into tokens in one way
only and two patterns can be compared token by token. What is left is arithmetic: which numbers the holes hold.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Union

from mapdsl.language import tree
from mapdsl.language.source import Span

MAX_PATTERNS = 4096
_RUNS = re.compile(r"[0-9]+|[^0-9]+")


@dataclass(frozen=True)
class Wildcard:
    """A segment of any text, or with `many` one or more segments; in a companion's name with text around it."""

    name: str
    many: bool
    before: str = ""
    after: str = ""

    def with_text(self, before: str = "", after: str = "") -> Wildcard:
        """The wildcard with more text around it."""
        return Wildcard(self.name, self.many, before + self.before, self.after + after)

    def text_in(self, name: str) -> str | None:
        """What it stands for in a name; None where the text around it is not there."""
        end = len(name) - len(self.after)
        fits = name.startswith(self.before) and name.endswith(self.after) and end > len(self.before)
        return name[len(self.before) : end] if fits else None


Token = Union[str, tree.NumberHole]
Segment = Union[tuple[Token, ...], Wildcard]


@dataclass(frozen=True)
class Pattern:
    """A template with its enumerations spelled out; `choice` gives the position chosen in each."""

    segments: tuple[Segment, ...]
    choice: Mapping[str, int] = field(compare=False)

    @cached_property
    def is_wild(self) -> bool:
        """Whether a segment is a wildcard."""
        return any(isinstance(segment, Wildcard) for segment in self.segments)

    @cached_property
    def many(self) -> int | None:
        """The place of the segment that may stretch."""
        return next((n for n, s in enumerate(self.segments) if isinstance(s, Wildcard) and s.many), None)

    @cached_property
    def skeleton(self) -> tuple[tuple[str, ...], ...]:
        """Numbers blanked out: two patterns without wildcards can meet only where this is the same."""
        return tuple(
            tuple("#" if not isinstance(t, str) or t[0] in "0123456789" else t for t in segment)
            for segment in self.segments
            if not isinstance(segment, Wildcard)
        )


def runs(text: str) -> list[str]:
    """A text cut into maximal runs of digits and of other characters."""
    return _RUNS.findall(text)


@dataclass(frozen=True)
class TemplateError(Exception):
    """A template that cannot be read in one way: `code` K203, K206 or K207."""

    code: str
    message: str
    span: Span


def patterns(template: tree.Template) -> list[Pattern]:
    """All patterns of a template; TemplateError if one of them is not read in one way."""
    known = _known.get(id(template))
    if known is None or known[0] is not template:
        known = _known[id(template)] = (template, _patterns(template))
        if len(_known) > MAX_KNOWN:
            _known.clear()
    return known[1]


# Templates are asked for their patterns again and again; comparing them to find them would cost more than making them.
_known: dict[int, tuple[tree.Template, list[Pattern]]] = {}
MAX_KNOWN = 100_000


def _patterns(template: tree.Template) -> list[Pattern]:
    holes = {p.name: p for p in template.parts if isinstance(p, tree.EnumHole)}
    count = 1
    for hole in holes.values():
        count *= len(hole.spellings)
    if count > MAX_PATTERNS:
        raise TemplateError("K206", f"the enumerations of this name have {count} combinations", template.span)
    choices = itertools.product(*(range(len(hole.spellings)) for hole in holes.values()))
    return [_pattern(template, dict(zip(holes, choice, strict=True))) for choice in choices]


def _pattern(template: tree.Template, choice: dict[str, int]) -> Pattern:
    segments: list[list[str | tree.NumberHole | Wildcard]] = [[]]
    for part in template.parts:
        match part:
            case tree.Text(text=text):
                _append(segments, text)
            case tree.EnumHole(name=name, spellings=spellings):
                _append(segments, spellings[choice[name]])
            case tree.NumberHole():
                segments[-1].append(part)
            case tree.WildcardHole(name=name, many=many):
                segments[-1].append(Wildcard(name or "*", many))
    pattern = Pattern(tuple(_segment(pieces, template.span) for pieces in segments), choice)
    wild = [s for s in pattern.segments if isinstance(s, Wildcard)]
    if sum(s.many for s in wild) > 1:
        raise TemplateError("K207", "a template holds at most one `{..}`", template.span)
    if len({s.name for s in wild}) < len(wild):
        raise TemplateError("K207", "the same wildcard stands twice; name each: `{n:*}`", template.span)
    return pattern


def _append(segments: list[list[str | tree.NumberHole | Wildcard]], text: str) -> None:
    first, *rest = text.split(".")
    for number, piece in enumerate((first, *rest)):
        if number:
            segments.append([])
        if piece:
            segments[-1].append(piece)


def _segment(pieces: list[str | tree.NumberHole | Wildcard], span: Span) -> Segment:
    if any(isinstance(piece, Wildcard) for piece in pieces):
        if len(pieces) > 1:
            raise TemplateError("K203", "a wildcard stands for whole segments, between dots", span)
        return pieces[0]  # type: ignore[return-value]
    tokens: list[Token] = []
    text = ""
    for piece in (*pieces, None):
        if isinstance(piece, str):
            text += piece
            continue
        tokens += runs(text)
        text = ""
        if isinstance(piece, tree.NumberHole):
            tokens.append(piece)
    if not tokens:
        raise TemplateError("K203", "the name has an empty segment", span)
    for one, other in itertools.pairwise(tokens):
        if is_number(one) and is_number(other):
            raise TemplateError(
                "K203", "a number hole touches another number, so the name can be read in two ways", span
            )
    return tuple(tokens)


def is_number(token: Token) -> bool:
    """Whether a token is a run of digits or a hole."""
    return not isinstance(token, str) or token[0] in "0123456789"


# --- two patterns ---------------------------------------------------------------------------------------------------

Equality = tuple[tree.Expr, tree.Expr]


def unify(one: Pattern, other: Pattern) -> list[Equality] | None:
    """The equations under which both patterns read one name; None where no name fits both."""
    ones, others = _aligned(one, other)
    if ones is None or others is None:
        return None
    equations: list[Equality] = []
    for left, right in zip(ones, others, strict=True):
        if isinstance(left, Wildcard) or isinstance(right, Wildcard):
            if not _wild_meet(left, right):
                return None
            continue
        found = _unify_segment(left, right)
        if found is None:
            return None
        equations += found
    return equations


Segments = tuple[Segment, ...]


def _aligned(one: Pattern, other: Pattern) -> tuple[Segments | None, Segments | None]:
    """Segments that face each other. A `{..}` takes as many as it needs, at least one."""
    ones, others = one.segments, other.segments
    if one.many is None and other.many is None:
        return (ones, others) if len(ones) == len(others) else (None, None)
    if one.many is None:
        swapped = _aligned(other, one)
        return swapped[1], swapped[0]
    before, after = ones[: one.many], ones[one.many + 1 :]
    if other.many is None:
        if len(others) < len(before) + 1 + len(after):
            return None, None
        return before + after, others[: len(before)] + others[len(others) - len(after) :]
    # Both stretch: a long name fits both as soon as their beginnings and their ends agree as far as both reach.
    head, tail = min(one.many, other.many), min(len(after), len(others) - other.many - 1)
    return ones[:head] + ones[len(ones) - tail :], others[:head] + others[len(others) - tail :]


def _wild_meet(left: Segment, right: Segment) -> bool:
    """Whether a text fits both, where one is a wildcard: by the text around it, as far as that is known of both."""
    (before, after), (other_before, other_after) = _literal_ends(left), _literal_ends(right)
    if isinstance(left, Wildcard) and not isinstance(right, Wildcard) and all(isinstance(t, str) for t in right):
        return left.text_in(other_before) is not None
    if isinstance(right, Wildcard) and not isinstance(left, Wildcard) and all(isinstance(t, str) for t in left):
        return right.text_in(before) is not None
    starts = before.startswith(other_before) or other_before.startswith(before)
    return starts and (after.endswith(other_after) or other_after.endswith(after))


def _literal_ends(segment: Segment) -> tuple[str, str]:
    """The text that a segment begins with and the one that it ends in, up to its first and from its last hole."""
    if isinstance(segment, Wildcard):
        return segment.before, segment.after
    first, last = (itertools.takewhile(lambda token: isinstance(token, str), way) for way in (segment, segment[::-1]))
    return "".join(map(str, first)), "".join(map(str, [*last][::-1]))


def _unify_segment(left: tuple[Token, ...], right: tuple[Token, ...]) -> list[Equality] | None:
    if len(left) != len(right):
        return None
    equations: list[Equality] = []
    for one, other in zip(left, right, strict=True):
        if isinstance(one, str) and isinstance(other, str):
            if one != other:
                return None
        elif not is_number(one) or not is_number(other):
            return None
        else:
            values = _value(one), _value(other)
            if values[0] is None or values[1] is None:
                return None
            equations.append((values[0], values[1]))
    return equations


def _value(token: Token) -> tree.Expr | None:
    """What a number token holds; None for digits that no hole prints (`007`)."""
    if not isinstance(token, str):
        return token.value
    if len(token) > 18 or (token[0] == "0" and len(token) > 1):
        return None
    return tree.Number(int(token), span=_NOWHERE)


_NOWHERE: Span = Span(None, 0, 0)  # type: ignore[arg-type]


def is_narrower(one: Pattern, other: Pattern) -> bool:
    """Whether every name of `one` is a name of `other` by its shape (ranges of numbers aside), and not the reverse."""
    return _covers(other.segments, one.segments) and not _covers(one.segments, other.segments)


def _covers(wide: tuple[Segment, ...], narrow: tuple[Segment, ...]) -> bool:
    if not wide or not narrow:
        return not wide and not narrow
    first, rest = wide[0], wide[1:]
    if isinstance(first, Wildcard) and first.many:
        return any(_covers(rest, narrow[taken:]) for taken in range(1, len(narrow) + 1))
    head = narrow[0]
    if isinstance(head, Wildcard):
        fits = isinstance(first, Wildcard) and not head.many
    else:
        fits = isinstance(first, Wildcard) or _unify_segment(first, head) is not None
    return fits and _covers(rest, narrow[1:])


# --- one pattern and a name -----------------------------------------------------------------------------------------


def read(pattern: Pattern, name: str) -> tuple[list[tuple[tree.Expr, int]], dict[str, str]] | None:
    """How a pattern reads a name: the number in each hole and the text of each wildcard; None if it does not."""
    segments = name.split(".")
    taken = len(segments) - len(pattern.segments) + 1
    if taken < 1 or (pattern.many is None and taken != 1):
        return None
    numbers: list[tuple[tree.Expr, int]] = []
    texts: dict[str, str] = {}
    place = 0
    for segment in pattern.segments:
        width = taken if isinstance(segment, Wildcard) and segment.many else 1
        text = ".".join(segments[place : place + width])
        place += width
        if isinstance(segment, Wildcard):
            held = segment.text_in(text)
            if held is None:
                return None
            texts[segment.name] = held
            continue
        found = _read_segment(segment, text)
        if found is None:
            return None
        numbers += found
    return numbers, texts


def _read_segment(tokens: tuple[Token, ...], text: str) -> list[tuple[tree.Expr, int]] | None:
    found = runs(text)
    if len(found) != len(tokens):
        return None
    numbers = []
    for token, run in zip(tokens, found, strict=True):
        if isinstance(token, str):
            if token != run:
                return None
        elif run[0] not in "0123456789" or len(run) > 18 or (run[0] == "0" and len(run) > 1):
            return None
        else:
            numbers.append((token.value, int(run)))
    return numbers


def spelled(pattern: Pattern, number: Callable[[tree.Expr], object], text: Callable[[Wildcard], str]) -> str:
    """The name of a pattern, where `number` says what stands in a hole, and `text` what a wildcard stands for."""
    segments = []
    for segment in pattern.segments:
        if isinstance(segment, Wildcard):
            segments.append(segment.before + text(segment) + segment.after)
        else:
            segments.append("".join(t if isinstance(t, str) else str(number(t.value)) for t in segment))
    return ".".join(segments)


def number_holes(pattern: Pattern) -> Iterator[tree.NumberHole]:
    """The number holes of a pattern in order."""
    for segment in pattern.segments:
        if not isinstance(segment, Wildcard):
            for token in segment:
                if not isinstance(token, str):
                    yield token
