"""`mapdsl verify`: whether one checkpoint is the conversion of another."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mapdsl.checkpoint.progress import human
from mapdsl.cli.conversion_options import (
    SOURCE_HELP,
    add_conversion_options,
    add_report_options,
    conversion_options,
    tell,
    usage_errors,
)
from mapdsl.cli.differences import SHOWN, difference_lines, listing_lines
from mapdsl.cli.output import counted, escaped, paint

if TYPE_CHECKING:
    from mapdsl.checkpoint.verify import Verification


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "verify",
        help="compare a checkpoint with what converting another one gives",
        description="Convert SRC again, and compare every byte with what DST holds instead of writing it. Give the "
        "options that `mapdsl convert` was given. DST's mapdsl.complement is compared too. To the left side, where SRC "
        "has none and DST is quantised, DST is decoded and held against SRC. Neither is changed. Exit status: 0 where "
        "DST is the conversion of SRC, 1 where anything differs and for errors, 2 for wrong options.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help=SOURCE_HELP)
    destination = "what is said to be the conversion of SRC, of any of these kinds"
    parser.add_argument("destination", metavar="DST", help=destination)
    add_conversion_options(parser)
    quiet = "print nothing but errors and what differs"
    add_report_options(parser, quiet=quiet, json="print what was found as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Verify, and tell what was found; 1 if anything differs."""
    from mapdsl.checkpoint.verify import verify

    with usage_errors():
        found = verify(
            arguments.source,
            arguments.destination,
            arguments.map,
            **conversion_options(arguments),
            progress=not arguments.quiet,
        )
    return tell(arguments, found, story, is_fine=found.holds)


def story(found: Verification) -> list[str]:
    """What was found, for people."""
    way = f"{found.source_side} -> {found.target_side}: {escaped(str(found.destination))}"
    verdict = "is" if found.holds else "is not"
    lines = [
        paint(f"{way} {verdict} the conversion of {escaped(str(found.source))}", "good" if found.holds else "error")
    ]
    for word, tensors in (("missing", found.missing), ("unknown", found.unknown)):
        if tensors:
            lines.append(f"  {word}:")
            lines += [f"    {line}" for line in listing_lines(tensors)]
    lines += [f"  {line}" for line in difference_lines(found.differences, "expected", "found")]
    lines += [f"  mapdsl.complement: {line}" for line in difference_lines(found.kept_differences, "expected", "found")]
    lines += [f"  mapdsl.complement: {escaped(problem)}" for problem in found.kept_problems[:SHOWN]]
    if len(found.kept_problems) > SHOWN:
        lines.append(f"  mapdsl.complement: {len(found.kept_problems) - SHOWN:,} more findings (--json lists all)")
    lines += [f"  {_compared(found)}"]
    if found.edited:
        blocks = counted(sum(found.edited.values()), "block")
        lines.append(f"  encoded anew and compared so: {blocks} with other values")
    lines += [f"  not compared: {escaped(text)}" for text in found.not_compared[:SHOWN]]
    lines += [f"  {escaped(hint)}" for hint in found.hints]
    return lines


def _compared(found: Verification) -> str:
    count = f"{found.tensors_compared:,} tensor{'s' * (found.tensors_compared != 1)}"
    kept = "" if found.kept_compared is None else ", and what mapdsl.complement keeps"
    wrong = sum(difference.kind == "bytes" for difference in found.differences)
    equal = "all equal" if not wrong else f"{wrong:,} differ{'s' * (wrong == 1)}"
    return f"{count} ({human(found.bytes_compared)}) compared{kept}, {equal}, in {found.seconds:.1f} s"
