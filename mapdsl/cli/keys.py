"""`mapdsl keys`: every name that a map has under a config, with shape and dtype."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from mapdsl.cli.inputs import FILE_HELP, add_config, values_of
from mapdsl.cli.output import UsageError, escaped, say, say_json

if TYPE_CHECKING:
    from mapdsl.compiler.expand import Key


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "keys",
        help="list every name of one side under a config",
        description="List every name of one side under a config: name, dtype, sizes joined by commas (`-` for a "
        "scalar, `?` for what map and config do not fix). Optional tensors and what wildcards carry are not listed.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help=FILE_HELP)
    add_config(parser)
    parser.add_argument("--side", metavar="SIDE", help="the side to list, as the map calls it; the stored one if none")
    parser.add_argument("--json", action="store_true", help="print {name: {dtype, shape}} as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the names."""
    from mapdsl.compiler.expand import expand
    from mapdsl.map import load

    if arguments.config is None and not arguments.param:
        raise UsageError("names depend on a config: give --config, or the params with --param")
    checked = load(arguments.file).checked
    sides = {checked.map.left: "left", checked.map.right: "right"}
    side = sides.get(arguments.side or checked.map.left)
    if side is None:
        raise UsageError(f"the map has no side `{escaped(arguments.side)}`, it has {' and '.join(sides)}")
    keys = expand(checked, values_of(checked, arguments)).keys(side)
    if arguments.json:
        say_json({key.name: {"dtype": key.dtype, "shape": key.shape} for key in keys})
    else:
        for key in keys:
            say(_line(key))
    return 0


def _line(key: Key) -> str:
    """As a line of a listing; a name that could be mistaken for something else is a JSON string."""
    name = key.name if key.name.isprintable() and not set(key.name) & set(' "{}#') else json.dumps(key.name)
    sizes = "?" if key.shape is None else ",".join("?" if n is None else str(n) for n in key.shape) or "-"
    return f"{name} {key.dtype or '?'} {sizes}"
