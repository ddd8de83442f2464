"""Names that differ in numbers, folded into few patterns with ranges, exactly."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

# A number that can be a range: a whole run of digits in canonical decimal, so that it reads back as it was written.
_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,14})(?![0-9])")
_MAX_HOLES = 8  # later numbers of a name stay as they are; a hostile name may hold thousands

# `w1` and `w2` are two names to a reader, `layer0` to `layer47` one: a number beside a letter folds from four on.
_FEWEST_BESIDE_LETTER = 4

_Box = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Fold:
    """A pattern: `literals[0]`, a number of `spans[0]`, `literals[1]`, ... in every combination."""

    literals: tuple[str, ...]
    spans: tuple[tuple[range, ...], ...]

    @property
    def first(self) -> str:
        """The first name."""
        numbers = [str(span[0][0]) for span in self.spans]
        return self._join(numbers)

    def names(self) -> list[str]:
        """Every name, the last number running fastest."""
        names = [self.literals[0]]
        for span, literal in zip(self.spans, self.literals[1:], strict=True):
            tails = [f"{number}{literal}" for part in span for number in part]
            names = [name + tail for name in names for tail in tails]
        return names

    def text(self) -> str:
        """The pattern as listings write it; a span of one number is that number."""
        return self._join([_span_text(span) for span in self.spans])

    def _join(self, fillings: list[str]) -> str:
        return "".join(f"{a}{b}" for a, b in zip(self.literals, [*fillings, ""], strict=True))


def fold_names(names: Iterable[str]) -> list[Fold]:
    """Few folds that together hold exactly these names (each given once, and without braces)."""
    templates: dict[tuple[str, ...], list[_Box]] = {}
    for name in names:
        pieces = _NUMBER.split(name, maxsplit=_MAX_HOLES)
        templates.setdefault(tuple(pieces[::2]), []).append(tuple((int(n),) for n in pieces[1::2]))
    return [
        Fold(literals, tuple(_ranges(numbers) for numbers in box))
        for literals, boxes in templates.items()
        for box in _fewest(boxes, literals)
    ]


def _fewest(boxes: list[_Box], literals: tuple[str, ...]) -> list[_Box]:
    """Merge boxes of one template along its axes, in the order of axes that leaves the fewest."""
    axes = range(len(literals) - 1)
    beside = [axis for axis in axes if _beside_letter(literals[axis], literals[axis + 1])]
    free = [axis for axis in axes if axis not in beside]
    orders = permutations(free) if len(free) <= 3 else iter([tuple(free), tuple(reversed(free))])
    best: list[_Box] | None = None
    for order in orders:
        merged = boxes
        for axis in order:
            merged = _merge(merged, axis, 1)
        for axis in beside:
            merged = _merge(merged, axis, _FEWEST_BESIDE_LETTER)
        if best is None or len(merged) < len(best):
            best = merged
        if len(best) == 1:
            break
    return best or []


def _merge(boxes: list[_Box], axis: int, fewest: int) -> list[_Box]:
    """Join boxes that differ in one axis only; where that gives fewer than `fewest` numbers, leave them apart."""
    groups: dict[_Box, list[_Box]] = {}
    for box in boxes:
        groups.setdefault(box[:axis] + box[axis + 1 :], []).append(box)
    result: list[_Box] = []
    for rest, group in groups.items():
        numbers = tuple(sorted(number for box in group for number in box[axis]))
        result += [(*rest[:axis], numbers, *rest[axis:])] if len(numbers) >= fewest else group
    return result


def _beside_letter(before: str, after: str) -> bool:
    return before[-1:].isalpha() or after[:1].isalpha()


def _ranges(numbers: tuple[int, ...]) -> tuple[range, ...]:
    """Rising numbers as few ranges, from the left; two numbers make a range only as neighbours."""
    result: list[range] = []
    start = 0
    while start < len(numbers):
        step = numbers[start + 1] - numbers[start] if start + 1 < len(numbers) else 1
        stop = start + 1
        while stop < len(numbers) and numbers[stop] - numbers[stop - 1] == step:
            stop += 1
        if stop - start < 3 and step != 1:
            step, stop = 1, start + 1
        result.append(range(numbers[start], numbers[stop - 1] + 1, step))
        start = stop
    return tuple(result)


def _span_text(span: tuple[range, ...]) -> str:
    if len(span) == 1 and len(span[0]) == 1:
        return str(span[0][0])
    return f"{{{','.join(map(_range_text, span))}}}"


def _range_text(part: range) -> str:
    if len(part) == 1:
        return str(part[0])
    return f"{part[0]}..{part[-1]}" + (f"..{part.step}" if part.step != 1 else "")
