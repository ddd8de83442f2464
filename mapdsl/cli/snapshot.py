"""`mapdsl snapshot`: the names, dtypes and shapes of a checkpoint as a small text file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mapdsl.cli.output import UsageError, complain, escaped, say, write_text


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "snapshot",
        help="write down the names, dtypes and shapes of a checkpoint",
        description="Write down the names, dtypes and shapes of a checkpoint, ranges folded: a fixture of a few "
        "kilobytes that `mapdsl check --against` reads in place of the weights.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a folder, an index, a weight file, or another listing")
    parser.add_argument("-o", "--output", metavar="FILE", help="where to write the listing, NAME.list")
    with_config = "also write NAME.config.json beside it, where `--against` looks for the config"
    parser.add_argument("--with-config", action="store_true", help=with_config)


def run(arguments: argparse.Namespace) -> int:
    """Read the headers, write the listing."""
    from mapdsl.checkpoint.checkpoint import open_checkpoint
    from mapdsl.checkpoint.listing import write_listing

    if arguments.output is not None and not arguments.output.endswith(".list"):
        raise UsageError("a listing is called NAME.list, so that `--against` knows it")
    if arguments.with_config and arguments.output is None:
        raise UsageError("--with-config needs -o")
    checkpoint = open_checkpoint(arguments.checkpoint)
    if arguments.with_config and checkpoint.config is None:
        raise UsageError(f"{escaped(arguments.checkpoint)} has no config.json to write")
    listing = write_listing(checkpoint.tensors.values())
    if arguments.output is None:
        say(listing.removesuffix("\n"))
        return 0
    texts = {arguments.output: listing}
    if arguments.with_config:
        import json

        texts[str(Path(arguments.output).with_suffix(".config.json"))] = json.dumps(checkpoint.config, indent=2) + "\n"
    for path, text in texts.items():
        write_text(path, text)
        complain(f"wrote {escaped(path)}")
    return 0
