"""`mapdsl plan`: what a conversion will read and write, before it starts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mapdsl.checkpoint.progress import human
from mapdsl.cli.conversion_options import (
    SOURCE_HELP,
    add_conversion_options,
    add_output_options,
    conversion_options,
    output_options,
    usage_errors,
)
from mapdsl.cli.output import counted, escaped, paint, say, say_json

if TYPE_CHECKING:
    from mapdsl.checkpoint.planned import Planned


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "plan",
        help="say what a conversion will read and write",
        description="Say what `mapdsl convert` with the same options will read and write, and what memory and disk it "
        "needs. Only headers are read, so a listing (`mapdsl snapshot`) will do. Whatever `convert` would refuse is an "
        "error: tensors that are missing, unknown or of another size, a disk that is too small, an unfinished "
        "conversion to DST (but with --resume). Exit status: 0 where "
        "the conversion can begin, 1 where it cannot, 2 for wrong options.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help=f"{SOURCE_HELP}; or a listing")
    parser.add_argument(
        "destination", metavar="DST", nargs="?", help="the folder to be made: is it free, has its disk room?"
    )
    add_conversion_options(parser)
    add_output_options(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, every unit in it")


def run(arguments: argparse.Namespace) -> int:
    """Plan, and tell."""
    from mapdsl.checkpoint.planned import plan_conversion

    options = conversion_options(arguments) | output_options(arguments)
    with usage_errors():
        planned = plan_conversion(arguments.source, arguments.destination, arguments.map, **options)
    if arguments.json:
        say_json(planned.as_json())
    else:
        for line in story(planned):
            say(line)
    return 0


def story(planned: Planned) -> list[str]:
    """What a plan says, a line a fact."""

    def amount(tensors: int, size: int, files: int) -> str:
        where = f" in {counted(files, 'file')}" if files else ""  # a listing is of no files
        return f"{counted(tensors, 'tensor')}, {human(size)}{where}"

    lines = [paint(f"{planned.source_side} -> {planned.target_side}: {escaped(str(planned.source))}", "good")]
    lines.append(f"  read    {amount(planned.tensors_read, planned.bytes_read, planned.files_read)}")
    lines.append(f"  write   {amount(planned.tensors_written, planned.bytes_written, planned.files_written)}")
    if planned.copied_tensors:
        lines.append(f"          {planned.copied_tensors:,} of them, {human(planned.copied_bytes)}, copied as they are")
    if planned.kept_bytes is not None:
        lines.append(f"          mapdsl.complement, at least {human(planned.kept_bytes)}, for the way back")
    if planned.dropped:
        lines.append(f"  drop    {counted(len(planned.dropped), 'tensor')} that the other side does not have")
    if planned.units:
        largest = max(planned.units, key=lambda unit: unit.bytes_written)
        made_of = f"{escaped(largest.output)} from {counted(largest.sources, 'tensor')}"
        lines.append(f"  units   {len(planned.units):,}, the largest {human(largest.bytes_written)}: {made_of}")
    if planned.done_units:
        lines.append(f"          {planned.done_units:,} of them done by an earlier run, with which --resume goes on")
    workers = counted(planned.workers, "worker")
    lines.append(f"  memory  {human(planned.held_bytes)} at most for tensors being made, {workers} at once")
    free = "" if planned.free_bytes is None else f", {human(planned.free_bytes)} free"
    lines.append(f"  disk    {human(planned.needed_bytes)} while it is written{free}")
    return lines
