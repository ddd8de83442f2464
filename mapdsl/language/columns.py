"""Columns of a paragraph: where arrows, `=`, modifiers and comments of lines below one another stand.

A line too long for its column sticks out and takes one space there; it does not push the others to the right.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mapdsl.language.breaking import INDENT, MAX_WIDTH

# What ends right of its limit does not count for the column.
ARROW_LIMIT = 64
EQUALS_LIMIT = 40
MODIFIER_LIMIT = 100
COMMENT_LIMIT = 80


@dataclass
class Row:
    """A statement, a block head or a comment with a line of its own, on the way to its lines.

    `kind` is `rule`, `param`, `codec`, `head`, `comment` or `other`. `cells` are the pieces that alignment may move
    apart: for a rule left side, arrow, right side, modifiers; for a param or codec what is before `=` and the rest.
    `lines` are set at once where the statement is cut, otherwise by alignment.
    """

    kind: str
    depth: int
    cells: list[str]
    blank_before: bool = False
    lines: list[str] = field(default_factory=list)
    comment: str = ""

    @property
    def indent(self) -> str:
        """The spaces before its first line."""
        return INDENT * self.depth


def align(rows: list[Row]) -> None:
    """Set the lines of all rows."""
    for paragraph in _paragraphs(rows, {"rule", "comment"}):
        _align_rules([row for row in paragraph if row.kind == "rule" and not row.lines])
    for kind in ("param", "codec"):
        for paragraph in _paragraphs(rows, {kind}):
            _align_equals([row for row in paragraph if row.kind == kind and not row.lines])
    for row in rows:
        if not row.lines:
            row.lines = [row.indent + " ".join(cell for cell in row.cells if cell)]
    for paragraph in _paragraphs(rows, {"rule", "param", "codec", "other"}):
        _append_comments(paragraph)


def _paragraphs(rows: list[Row], kinds: set[str]) -> list[list[Row]]:
    """Rows of those kinds that follow one another at one depth without a blank line; other rows by themselves."""
    found: list[list[Row]] = []
    before: Row | None = None
    for row in rows:
        goes_on = before is not None and row.depth == before.depth and not row.blank_before
        if before is not None and goes_on and row.kind in kinds and before.kind in kinds:
            found[-1].append(row)
        else:
            found.append([row])
        before = row
    return found


def _align_rules(rows: list[Row]) -> None:
    width = _column([row.indent + row.cells[0] for row in rows], ARROW_LIMIT)
    arrow = max((len(row.cells[1]) for row in rows), default=0)
    for row in rows:
        left, direction, right, modifiers = row.cells
        loose = f"{row.indent}{left} {direction} {right}"
        aligned = f"{(row.indent + left).ljust(width)} {direction.ljust(arrow)} {right}"
        fits = len(aligned) + (len(modifiers) and len(modifiers) + 2) <= MAX_WIDTH
        row.lines = [aligned if fits else loose]
    with_modifiers = [row for row in rows if row.cells[3]]
    # Behind a rule that stands alone nothing has to be set apart.
    gap = " " if len(rows) == 1 else "  "
    width = _column([row.lines[0] for row in with_modifiers], MODIFIER_LIMIT)
    for row in with_modifiers:
        row.lines = [_joined(row.lines[0], width, gap, row.cells[3])]


def _align_equals(rows: list[Row]) -> None:
    with_value = [row for row in rows if row.cells[1]]
    width = _column([row.cells[0] for row in with_value], EQUALS_LIMIT)
    for row in with_value:
        row.lines = [_joined(row.indent + row.cells[0], width, " ", row.cells[1])]


def _append_comments(rows: list[Row]) -> None:
    with_comment = [row for row in rows if row.comment]
    width = _column([row.lines[0] for row in with_comment if len(row.lines) == 1], COMMENT_LIMIT)
    for row in with_comment:
        row.lines[-1] = _joined(row.lines[-1], width if len(row.lines) == 1 else 0, "  ", row.comment)


def _column(texts: list[str], limit: int) -> int:
    """The width that makes room for all texts that end within the limit."""
    return max((len(text) for text in texts if len(text) <= limit), default=0)


def _joined(text: str, width: int, gap: str, rest: str) -> str:
    """Both texts, the second in its column unless that would make the line too long."""
    aligned = text.ljust(width) + gap + rest
    return aligned if len(aligned) <= MAX_WIDTH else text + gap + rest
