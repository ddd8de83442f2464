"""`mapdsl test`: properties that every map has, held against examples drawn for this one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mapdsl.cli.inputs import FILE_HELP, add_config, params_of, read_config
from mapdsl.cli.output import paint, say

if TYPE_CHECKING:
    from mapdsl.testing import Report

MOST_EXAMPLES = 1_000_000
DEFAULT_EXAMPLES = 20


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "test",
        help="convert drawn checkpoints there and back, and compare every byte",
        description="Draw small configs and checkpoints for a map, as random bit patterns in every format, and hold "
        "the compiled adapter against what the map says; of a map with a mesh also over several ranks. A failure is "
        "shown on the smallest config found.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help=FILE_HELP)
    add_config(parser)
    parser.add_argument(
        "--examples",
        metavar="N",
        type=_count,
        default=DEFAULT_EXAMPLES,
        help=f"how many examples to draw ({DEFAULT_EXAMPLES} if not said)",
    )
    parser.add_argument("--seed", metavar="S", default="0", help="draws other examples; the same seed draws the same")


def run(arguments: argparse.Namespace) -> int:
    """Run the properties and print the table; 1 where one does not hold."""
    from mapdsl.map import load
    from mapdsl.testing import Suite
    from mapdsl.testing import run as run_properties

    config = read_config(arguments.config) if arguments.config is not None else None
    suite = Suite(load(arguments.file), params=params_of(arguments))
    report = run_properties(suite, config=config, examples=arguments.examples, seed=arguments.seed)
    say(_table(report))
    for failure in report.failures:
        say()
        say(failure.text(arguments.file))
    return 1 if report.failures else 0


def _count(text: str) -> int:
    """A number of examples; ArgumentTypeError where it is none."""
    if not text.isascii() or not text.isdigit() or len(text) > 7 or not 1 <= int(text) <= MOST_EXAMPLES:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {MOST_EXAMPLES:,}, found {text[:40]!r}")
    return int(text)


def _table(report: Report) -> str:
    """One line a property: whether it holds, on how many examples, in what time."""
    failed = {name for failure in report.failures for name in failure.names}
    width = max(len(row.name) for row in report.rows)
    lines = []
    for row in report.rows:
        verdict = paint("fails", "error") if row.name in failed else paint("holds", "good")
        lines.append(f"{row.name:<{width}}  {verdict}  {row.held:>6} examples  {row.seconds:>7.2f} s")
    lines.append(f"{report.examples} examples, {report.tensors:,} stored tensors")
    return "\n".join(lines)
