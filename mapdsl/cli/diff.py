"""`mapdsl diff`: two checkpoints held against each other."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mapdsl.checkpoint.progress import human
from mapdsl.cli.conversion_options import add_report_options, tell
from mapdsl.cli.differences import difference_lines, listing_lines
from mapdsl.cli.output import escaped, paint

if TYPE_CHECKING:
    from mapdsl.checkpoint.compare import Comparison

_CKPT = "a folder, an index, a weight file, or a listing"


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "diff",
        help="compare two checkpoints, by name, dtype, shape and bytes",
        description="Compare two checkpoints, by name, dtype, shape and bytes, whatever their files are called and "
        "however tensors are shared out over them. Listings have no bytes to compare. A NaN equals one with the same "
        "bits, 0.0 and -0.0 differ. Exit status: 0 where they are equal, 1 where they differ and for errors, 2 for "
        "wrong options.",
        allow_abbrev=False,
    )
    parser.add_argument("first", metavar="A", help=_CKPT)
    parser.add_argument("second", metavar="B", help=_CKPT)
    quiet = "print nothing but errors and what differs"
    add_report_options(parser, quiet=quiet, json="print what was found as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compare, and tell what differs; 1 if anything does."""
    from mapdsl.checkpoint.compare import compare

    found = compare(arguments.first, arguments.second, progress=not arguments.quiet)
    return tell(arguments, found, story, is_fine=found.equal)


def story(found: Comparison) -> list[str]:
    """What was found, for people."""
    lines: list[str] = []
    for tensors, path in ((found.only_first, found.first), (found.only_second, found.second)):
        if tensors:
            lines.append(paint(f"only in {escaped(str(path))}:", "bold"))
            lines += [f"  {line}" for line in listing_lines(tensors)]
    if found.differences:
        lines.append(paint(f"in {escaped(str(found.first))} (A) and {escaped(str(found.second))} (B):", "bold"))
        lines += [f"  {line}" for line in difference_lines(found.differences, "A has", "B has")]
    compared = f"{human(found.bytes_compared)} compared" if found.has_data else "no bytes compared: a listing has none"
    count = f"{found.same:,} tensor{'s' * (found.same != 1)}"
    if found.equal:
        return [*lines, paint(f"equal: {count}, {compared}", "good")]
    parts = [
        f"{len(found.only_first):,} only in A" * bool(found.only_first),
        f"{len(found.only_second):,} only in B" * bool(found.only_second),
        f"{len(found.differences):,} differ{'s' * (len(found.differences) == 1)}" * bool(found.differences),
    ]
    verdict = ", ".join(filter(None, parts))
    return [*lines, paint(f"different: {verdict}, {found.same:,} equal, {compared}", "error")]
