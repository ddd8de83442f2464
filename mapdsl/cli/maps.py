"""`mapdsl maps`: the maps that come with mapdsl."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mapdsl.cli.output import escaped, paint, say


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    subparsers.add_parser(
        "maps",
        help="list the maps that come with mapdsl",
        description="List the maps that come with mapdsl, with one line on each. Their names stand for FILE.",
        allow_abbrev=False,
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a line a map."""
    from mapdsl.resources import shipped_maps

    del arguments
    found = shipped_maps()
    width = max(map(len, found), default=0)
    for name, path in found.items():
        say(f"{paint(name.ljust(width), 'bold')}  {escaped(_about(path))}".rstrip())
    return 0


def _about(path: Path) -> str:
    """The first comment of a map's file."""
    from mapdsl.language.syntax import read_source

    lines = read_source(path).text.splitlines()
    return next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "")
