"""`mapdsl verify`: whether one checkpoint is the conversion of another."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from mapdsl.cli.convert import human
from mapdsl.cli.differences import SHOWN, difference_lines, listing_lines
from mapdsl.cli.inputs import FILE_HELP, add_config, params_of
from mapdsl.cli.output import UsageError, escaped, paint, say, say_json

if TYPE_CHECKING:
    from mapdsl.checkpoint.verify import Verification


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "verify",
        help="compare a checkpoint with what converting another one gives",
        description="Convert SRC again, and compare every byte with what DST holds instead of writing it. Give the "
        "options that `mapdsl convert` was given. DST's mapdsl.complement is compared too. On the way back without "
        "one, a DST that is quantised is decoded and held against SRC. The exit status is 0 where DST is the "
        "conversion of SRC, 1 where anything differs.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="a folder, an index or a weight file")
    parser.add_argument("destination", metavar="DST", help="the same: what is said to be the conversion of SRC")
    parser.add_argument("--map", metavar="MAP", required=True, help=FILE_HELP)
    parser.add_argument("--to", metavar="SIDE", help="the side of DST; by default the one that SRC is not")
    dtype = "what tensors were decoded to (bf16)"
    parser.add_argument("--dtype", choices=("bf16", "f32", "f16"), help=dtype)
    quantize = "DST was quantised by `mapdsl convert --quantize`"
    parser.add_argument("--quantize", action="store_true", help=quantize)
    add_config(parser)
    parser.add_argument("--no-complement", action="store_true", help="take no notice of mapdsl.complement")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Verify, and tell what was found; 1 if anything differs."""
    from mapdsl.checkpoint.passes import OptionError
    from mapdsl.checkpoint.verify import verify

    params = params_of(arguments)
    try:
        found = verify(
            arguments.source,
            arguments.destination,
            arguments.map,
            to=arguments.to,
            dtype=arguments.dtype,
            quantize=arguments.quantize,
            params=params,
            config=arguments.config,
            use_complement=not arguments.no_complement,
            progress=sys.stderr is not None and sys.stderr.isatty(),
        )
    except OptionError as problem:
        raise UsageError(escaped(str(problem))) from None
    if arguments.json:
        say_json(found.as_json())
    else:
        for line in story(found):
            say(line)
    return int(not found.holds)


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
        lines.append(f"  encoded anew and compared so: {sum(found.edited.values()):,} blocks with other values")
    lines += [f"  not compared: {escaped(text)}" for text in found.not_compared[:SHOWN]]
    lines += [f"  {escaped(hint)}" for hint in found.hints]
    return lines


def _compared(found: Verification) -> str:
    count = f"{found.tensors_compared:,} tensor{'s' * (found.tensors_compared != 1)}"
    kept = "" if found.kept_compared is None else ", and what mapdsl.complement keeps"
    wrong = sum(difference.kind == "bytes" for difference in found.differences)
    equal = "all equal" if not wrong else f"{wrong:,} differ{'s' * (wrong == 1)}"
    return f"{count} ({human(found.bytes_compared)}) compared{kept}, {equal}, in {found.seconds:.1f} s"
