"""Patterns of names at run time: `#` a canonical number, `*` one segment, `**` one or more. No regexes."""

from __future__ import annotations

from collections.abc import Container

DIGITS = frozenset("0123456789")
# More digits are no position of anything, and reading them as a number would take its time.
MAX_DIGITS = 18


def captures(pattern: str, name: str) -> tuple[str, ...] | None:
    """What `*`, `**` and `#` stand for in a name, in order; None where the pattern does not fit.

    `*` and `**` are whole segments, at most one of them `**`; `#` stands anywhere in a segment.
    """
    wanted, found = pattern.split("."), name.split(".")
    stretch = len(found) - len(wanted)
    if stretch and (stretch < 0 or "**" not in wanted):
        return None
    texts: list[str] = []
    place = 0
    for segment in wanted:
        width = stretch + 1 if segment == "**" else 1
        text = ".".join(found[place : place + width])
        place += width
        if segment in ("*", "**"):
            texts.append(text)
        elif (numbers := _numbers(segment, text)) is not None:
            texts += numbers
        else:
            return None
    return tuple(texts)


def literal_start(pattern: str) -> str:
    """What every name of a pattern begins with."""
    return pattern.split("*", 1)[0].split("#", 1)[0]


def literal_end(pattern: str) -> str:
    """What every name of a pattern ends with."""
    return pattern.rsplit("*", 1)[-1].rsplit("#", 1)[-1]


def _numbers(segment: str, text: str) -> list[str] | None:
    """The numbers at the places of `#` in one segment."""
    first, *rest = segment.split("#")
    if not text.startswith(first):
        return None
    place, numbers = len(first), []
    for literal in rest:
        end = place
        while end < len(text) and text[end] in DIGITS:
            end += 1
        number = text[place:end]
        if not number or len(number) > MAX_DIGITS or (number[0] == "0" and len(number) > 1):
            return None
        if not text.startswith(literal, end):
            return None
        numbers.append(number)
        place = end + len(literal)
    return numbers if place == len(text) else None


class Wide:
    """The names that a rule with wildcards carries: a pattern, and for each `#` in it the numbers that it may be."""

    def __init__(self, pattern: str, *numbers: Container[int]) -> None:
        self.pattern = pattern
        self.numbers = numbers

    def __contains__(self, name: object) -> bool:
        texts = captures(self.pattern, str(name))
        if texts is None:
            return False
        return all(int(text) in allowed for text, allowed in zip(self._at_numbers(texts), self.numbers, strict=True))

    def _at_numbers(self, texts: tuple[str, ...]) -> list[str]:
        """Of the texts captured, those that stand for `#`."""
        marks: list[str] = []
        for segment in self.pattern.split("."):
            marks += [segment] if segment in ("*", "**") else ["#"] * segment.count("#")
        return [text for text, mark in zip(texts, marks, strict=True) if mark == "#"]
