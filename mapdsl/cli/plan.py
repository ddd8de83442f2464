"""`mapdsl plan`: what a conversion will read and write, before it starts."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from mapdsl.cli.convert import human
from mapdsl.cli.inputs import FILE_HELP, add_config, params_of
from mapdsl.cli.output import UsageError, escaped, paint, say, say_json

if TYPE_CHECKING:
    from mapdsl.checkpoint.planned import Planned


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "plan",
        help="say what a conversion will read and write",
        description="Say what `mapdsl convert` with the same options will read and write, and what memory and disk it "
        "needs; from headers alone, so that a listing will do. Whatever speaks against the conversion is an error, "
        "a disk that is too small among it.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="a folder, an index, a weight file, or a listing")
    parser.add_argument(
        "destination", metavar="DST", nargs="?", help="where the output is to be: is there room for it?"
    )
    parser.add_argument("--map", metavar="MAP", required=True, help=FILE_HELP)
    parser.add_argument("--to", metavar="SIDE", help="the side to go to; by default the one that SRC is not")
    parser.add_argument("--dtype", choices=("bf16", "f32", "f16"), default="bf16", help="of what is decoded (bf16)")
    parser.add_argument("--quantize", action="store_true", help="write the stored side in the map's formats")
    add_config(parser)
    parser.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="500MB, 2GiB, or bytes (5GB)")
    parser.add_argument("--no-complement", action="store_true", help="without mapdsl.complement")
    parser.add_argument("--workers", metavar="N", type=int, help="units that are converted at once (one a core)")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, every unit in it")


def run(arguments: argparse.Namespace) -> int:
    """Plan, and tell."""
    from mapdsl.checkpoint.convert import size_in_bytes
    from mapdsl.checkpoint.passes import OptionError
    from mapdsl.checkpoint.planned import plan_conversion
    from mapdsl.runtime.codecs.formats import DTYPE_BY_NAME

    if arguments.workers is not None and arguments.workers < 1:
        raise UsageError("--workers is 1 or more")
    try:
        planned = plan_conversion(
            arguments.source,
            arguments.destination,
            arguments.map,
            to=arguments.to,
            dtype=DTYPE_BY_NAME[arguments.dtype],
            quantize=arguments.quantize,
            params=params_of(arguments),
            config=arguments.config,
            max_shard_bytes=size_in_bytes(arguments.max_shard_size),
            use_complement=not arguments.no_complement,
            workers=arguments.workers,
        )
    except OptionError as problem:
        raise UsageError(escaped(str(problem))) from None
    if arguments.json:
        say_json(dataclasses.asdict(planned) | {"source": str(planned.source)})
    else:
        for line in story(planned):
            say(line)
    return 0


def story(planned: Planned) -> list[str]:
    """What a plan says, a line a fact."""

    def amount(tensors: int, size: int, files: int) -> str:
        where = f" in {files:,} file{'s' * (files != 1)}" if files else ""  # a listing is of no files
        return f"{tensors:,} tensors, {human(size)}{where}"

    lines = [paint(f"{planned.source_side} -> {planned.target_side}: {escaped(str(planned.source))}", "good")]
    lines.append(f"  read    {amount(planned.tensors_read, planned.bytes_read, planned.files_read)}")
    lines.append(f"  write   {amount(planned.tensors_written, planned.bytes_written, planned.files_written)}")
    if planned.copied_tensors:
        lines.append(f"          {planned.copied_tensors:,} of them, {human(planned.copied_bytes)}, copied as they are")
    if planned.kept_bytes is not None:
        lines.append(f"          mapdsl.complement, {human(planned.kept_bytes)} for the way back")
    if planned.dropped:
        lines.append(f"  drop    {len(planned.dropped):,} tensors that the other side does not have")
    largest = max(planned.units, key=lambda unit: unit.bytes_written)
    made_of = f"{human(largest.bytes_written)}, {escaped(largest.output)} from {largest.sources:,} tensors"
    lines.append(f"  units   {len(planned.units):,}, the largest {made_of}")
    lines.append(f"  memory  {human(planned.held_bytes)} for outputs under way, of {planned.workers} workers")
    free = "" if planned.free_bytes is None else f", {human(planned.free_bytes)} are free"
    lines.append(f"  disk    {human(planned.needed_bytes)}{free}")
    return lines
