"""`mapdsl laws`: what each rule of a map promises for a round trip, and what the whole file does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mapdsl.cli.inputs import FILE_HELP
from mapdsl.cli.output import escaped, paint, say, say_json

if TYPE_CHECKING:
    from mapdsl.compiler.check import Checked
    from mapdsl.compiler.laws import Grade, RuleLaw

_WIDEST_RULE = 60


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "laws",
        help="show what each rule promises for a round trip",
        description="Show what each rule promises for a round trip from either side, and what the file does: bit > "
        "bit, guarded (same bytes, or an error) > value > lossy > none (dropped). `bare` is the grade without the "
        "complement, the scales and formats that reading keeps for writing.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help=FILE_HELP)
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    from mapdsl.compiler.laws import meet, rule_law
    from mapdsl.map import load

    checked = load(arguments.file).checked
    laws = [rule_law(rule, layout) for rule, layout in zip(checked.map.rules, checked.layouts, strict=True)]
    file = [meet([getattr(law, trip) for law in laws]) for trip in ("left", "left_bare", "right")]
    if arguments.json:
        rules = [{**_place(law), **_grades([law.left, law.left_bare, law.right])} for law in laws]
        say_json({"map": checked.map.name, "trips": _trips(checked), "rules": rules, "file": _grades(file)})
        return 0
    left, right = checked.map.left, checked.map.right
    rows: list[tuple[str, ...]] = []
    rows.append(("line", "rule", f"{left} -> {right} -> {left}", "bare", f"{right} -> {left} -> {right}", "because"))
    rows += dict.fromkeys(_row(law, law.left, law.left_bare, law.right) for law in laws)
    rows.append(("", "the file", *(_shown(grade) for grade in file), ""))
    _print_table(rows)
    return 0


def _trips(checked: Checked) -> dict[str, str]:
    left, right = checked.map.left, checked.map.right
    return {"left": f"{left} -> {right} -> {left}", "right": f"{right} -> {left} -> {right}"}


def _place(law: RuleLaw) -> dict[str, Any]:
    span = law.rule.span
    return {"file": span.source.path, "line": span.line, "rule": " ".join(span.text.split())}


def _grades(grades: Sequence[Grade | None]) -> dict[str, Any]:
    """`left` with the complement, `left_bare` without it, `right`; null where the trip has no tensor to begin with."""
    return {
        trip: None if grade is None else {"grade": grade.grade, "reason": grade.reason}
        for trip, grade in zip(("left", "left_bare", "right"), grades, strict=True)
    }


def _row(law: RuleLaw, *grades: Grade | None) -> tuple[str, ...]:
    text = escaped(" ".join(law.rule.span.text.split()))
    if len(text) > _WIDEST_RULE:
        text = text[: _WIDEST_RULE - 3] + "..."
    reasons = dict.fromkeys(grade.reason for grade in grades if grade is not None and grade.reason)
    place = law.rule.span
    line = str(place.line) if not law.rule.included else f"{place.source.path.rpartition('/')[2]}:{place.line}"
    return escaped(line), text, *(_shown(grade) for grade in grades), "; ".join(map(escaped, reasons))


def _shown(grade: Grade | None) -> str:
    return "-" if grade is None else grade.grade


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        first, *rest = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        text = "  ".join([row[0].rjust(widths[0]) if number else first, *rest]).rstrip()
        say(paint(text, "bold") if number in (0, len(rows) - 1) else text)
