"""`mapdsl checksums`: whether a checkpoint's tensors still have the bytes that they had."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mapdsl.checkpoint.progress import human
from mapdsl.cli.conversion_options import add_report_options, tell
from mapdsl.cli.output import UsageError, escaped, paint, say

if TYPE_CHECKING:
    from mapdsl.checkpoint.checksums import ChecksumComparison

_SHOWN = 20


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "checksums",
        help="compare a checkpoint with its checksums, or write them",
        description="Compare every tensor of a checkpoint with its SHA-256 in mapdsl.checksums.json, which `mapdsl "
        "convert --checksums` writes, or `--write`. The checksum is that of the tensor's bytes as safetensors stores "
        "them, however tensors are shared out over files. Exit status: 0 where all are equal, 1 where one differs and "
        "for errors, 2 for wrong options.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a folder, an index or a weight file")
    where = "the checksums to compare with (default: mapdsl.checksums.json beside the tensors)"
    parser.add_argument("--file", metavar="FILE", help=where)
    write = "write mapdsl.checksums.json beside the tensors, over an older one, and compare nothing"
    parser.add_argument("--write", action="store_true", help=write)
    add_report_options(parser, quiet="print nothing but errors and what differs", json="print what was found as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compare or write, and tell; 1 if anything differs."""
    from mapdsl.checkpoint.checksums import compare_checksums, write_checksums

    if arguments.write:
        if arguments.file is not None or arguments.json:
            raise UsageError("--write goes with neither --file nor --json: it writes beside the tensors")
        path = write_checksums(arguments.checkpoint, progress=not arguments.quiet)
        if not arguments.quiet:
            say(f"wrote {escaped(str(path))}")
        return 0
    found = compare_checksums(arguments.checkpoint, arguments.file, progress=not arguments.quiet)
    return tell(arguments, found, story, is_fine=found.equal)


def story(found: ChecksumComparison) -> list[str]:
    """What was found, for people."""
    lines = []
    for word, names in (("missing", found.missing), ("without a checksum", found.unknown), ("differs", found.changed)):
        lines += [f"{word}: {escaped(name)}" for name in names[:_SHOWN]]
        if len(names) > _SHOWN:
            lines.append(f"{word}: {len(names) - _SHOWN:,} more (--json lists all)")
    count = f"{found.same:,} tensor{'s' * (found.same != 1)}"
    if found.equal:
        return [*lines, paint(f"equal: {count}, {human(found.bytes_read)} read", "good")]
    wrong = {"missing": found.missing, "without a checksum": found.unknown, "changed": found.changed}
    parts = [f"{len(names):,} {word}" for word, names in wrong.items() if names]
    return [*lines, paint(f"different: {', '.join(parts)}; {count} equal, {human(found.bytes_read)} read", "error")]
