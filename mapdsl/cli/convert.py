"""`mapdsl convert`: a whole checkpoint from one side of a map to the other."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mapdsl.checkpoint.progress import human
from mapdsl.checkpoint.rank_files import is_cut
from mapdsl.cli.conversion_options import (
    SOURCE_HELP,
    add_conversion_options,
    add_output_options,
    add_report_options,
    conversion_options,
    output_options,
    usage_errors,
)
from mapdsl.cli.ending import told_ending
from mapdsl.cli.output import UsageError, escaped, paint, say
from mapdsl.cli.rank_options import add_moves, by_mesh
from mapdsl.cli.ranks import ranks_of_launcher

if TYPE_CHECKING:
    from mapdsl.checkpoint.convert import Conversion
    from mapdsl.checkpoint.convert_ranks import RanksConversion
    from mapdsl.checkpoint.progress import Report

_SHOWN = 4


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint",
        description="Convert a checkpoint from one side of a map to the other, into a new folder. The left side is the "
        "one of stored checkpoints, quantised perhaps, the right side the model's. What decoding loses is kept in "
        "DST/mapdsl.complement, so that the way back gives the same files, byte for byte. Other files beside the "
        "weights are copied, but for hidden ones and sub-folders. Nothing is overwritten. DST appears when it is "
        "complete; a run that was cut short leaves a hidden folder, with which --resume goes on.",
        epilog="Exit status: 0 where DST is complete, 1 for an error, 2 for wrong options, 130 after Ctrl-C, 143 after "
        "SIGTERM. `mapdsl plan` with the same options says beforehand what will be done, `mapdsl verify` afterwards "
        "whether it was. Example: mapdsl convert DeepSeek-V4-Flash model --map deepseek_v4",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help=SOURCE_HELP)
    parser.add_argument("destination", metavar="DST", help="the folder to make")
    add_conversion_options(parser)
    add_output_options(parser)
    add_moves(parser)
    quiet = "print nothing but errors: no progress, no summary"
    add_report_options(parser, quiet=quiet, json="print events as JSON, one a line: see docs/checkpoints.md")


def run(arguments: argparse.Namespace) -> int:
    """Convert, and tell what was done."""
    with told_ending(arguments) as report:
        from mapdsl.checkpoint.convert import convert

        with usage_errors(), ranks_of_launcher(arguments.destination) as ranks:
            options = conversion_options(arguments) | output_options(arguments)
            options["checksums"] = arguments.checksums
            if by_mesh(arguments) or arguments.layout or is_cut(arguments.source):
                if ranks is not None:
                    raise UsageError("what is cut over ranks is converted by one process: start it without a launcher")
                return _between_ranks(arguments, options, report)
            is_first = ranks is None or not ranks.rank
            done = convert(
                arguments.source,
                arguments.destination,
                arguments.map,
                **options,
                progress=not arguments.quiet and is_first,
                report=report if is_first else None,
                ranks=ranks,
            )
        if report is not None and is_first:
            report({"event": "done", **done.as_json()})
    if is_first and not arguments.json and not arguments.quiet:
        for line in story(done):
            say(line)
    return 0


def _between_ranks(arguments: argparse.Namespace, options: dict[str, Any], report: Report | None) -> int:
    """Convert what is cut over ranks, or is to be, and tell what was done."""
    from mapdsl.checkpoint.convert_ranks import convert_ranks

    done = convert_ranks(
        arguments.source,
        arguments.destination,
        arguments.map,
        ranks=by_mesh(arguments),
        layout=arguments.layout,
        compare=not arguments.no_compare,
        progress=not arguments.quiet,
        report=report,
        **options,
    )
    if report is not None:
        report({"event": "done", **done.as_json()})
    elif not arguments.quiet:
        for line in ranks_story(done):
            say(line)
    return 0


def ranks_story(done: RanksConversion) -> list[str]:
    """What a conversion between ranks did, a line a fact."""
    before, after = (_ranks(ranks) for ranks in (done.source_ranks, done.target_ranks))
    sides = f"{done.source_side} of {before} -> {done.target_side} of {after}"
    lines = [paint(f"{sides}: {escaped(str(done.destination))}", "good")]
    read, written = (_amount(sum(one), sum(other)) for one, other in _sums(done))
    lines.append(f"  {read} read, {written} written, in {done.seconds:.1f} s")
    if kept := sum(share.was_complete for share in done.shares):
        lines.append(f"  {kept} of {len(done.shares)} shares were complete")
    if done.dropped:
        lines.append(f"  dropped, as by the map no rank of the destination holds them: {_some(done.dropped)}")
    if len(done.shares) == 1:
        return lines + _verified_lines(done.shares[0])
    verified = [share.verified for share in done.shares if share.verified is not None]
    if verified:
        count = _amount(sum(one.tensors for one in verified), sum(one.bytes for one in verified))
        lines.append(f"  verified: {count} of the source compared with what was written")
    return lines


def _sums(done: RanksConversion) -> Iterator[tuple[list[int], list[int]]]:
    """Numbers of tensors and of bytes: read, and written."""
    yield [share.tensors_read for share in done.shares], [share.bytes_read for share in done.shares]
    yield [share.tensors_written for share in done.shares], [share.bytes_written for share in done.shares]


def _ranks(ranks: Mapping[str, int]) -> str:
    return " x ".join(f"{count} {mesh}" for mesh, count in ranks.items() if count > 1) or "one rank"


def story(done: Conversion) -> list[str]:
    """What a conversion did, a line a fact."""
    lines = [paint(f"{done.source_side} -> {done.target_side}: {escaped(str(done.destination))}", "good")]
    read, written = _amount(done.tensors_read, done.bytes_read), _amount(done.tensors_written, done.bytes_written)
    files = f"{len(done.files)} file{'s' * (len(done.files) > 1)}"
    lines.append(f"  {read} read, {written} written to {files}, in {done.seconds:.1f} s")
    if done.was_complete:
        lines.append("  all of it was done by the run that was killed; what that left over is removed")
    if done.carried:
        lines.append(f"  carried over: {_some(done.carried)}")
    if done.left_behind:
        lines.append(f"  left behind: {_some(done.left_behind)}")
    lines += _config_lines(done)
    if done.dropped:
        kept = "" if done.kept_bytes is None else ", kept for the way back"
        lines.append(f"  dropped by the map{kept}: {_some(done.dropped)}")
    if done.kept_bytes is not None:
        kept = f"{human(done.kept_bytes)} and the" if done.kept_bytes else "the"
        lines.append(f"  mapdsl.complement keeps {kept} layout of the files for the way back")
    if done.same_layout:
        lines.append("  the files have the names and headers of the checkpoint that was read")
    elif done.same_layout is False:
        lines.append(paint(f"  the files are laid out anew: {escaped(done.misfit)}", "warning"))
    if done.edited:
        count = sum(done.edited.values())
        blocks = "1 block was" if count == 1 else f"{count:,} blocks were"
        lines.append(f"  edited: {blocks} encoded anew, in {_some(tuple(done.edited))}")
    return lines + _verified_lines(done)


def _verified_lines(done: Conversion) -> list[str]:
    """What was compared, and what not."""
    found = done.verified
    lines = ["  mapdsl.checksums.json has the SHA-256 of every tensor"] if done.checksums else []
    if found is None:
        return lines
    kept = f", and {found.kept:,} entries of mapdsl.complement read" if found.kept else ""
    lines += [f"  verified: {_amount(found.tensors, found.bytes)} of the source compared with what was written{kept}"]
    if found.tensors_again:
        count = _amount(found.tensors_again, found.bytes_again)
        lines.append(f"  verified: {count} written compared with a second conversion: {escaped(found.reason)}")
    return lines + [f"  not compared: {escaped(text)}" for text in found.not_compared]


def _config_lines(done: Conversion) -> list[str]:
    """What was changed in config.json, and what it lacks."""
    config, lines = done.config, []
    if config is not None and config.removed:
        lines.append(f"  config.json: {_some(config.removed)} removed, as nothing is quantised here")
    if config is not None and config.added:
        lines.append(f"  config.json: {config.added} added, for the formats of the map")
    if config is not None and config.lacks:
        lines.append(paint(f"  config.json: {escaped(config.lacks)}", "warning"))
    return lines


def _amount(tensors: int, size: int) -> str:
    return f"{tensors:,} tensor{'s' * (tensors != 1)} ({human(size)})"


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(escaped(name) for name in names[:_SHOWN]) + more
