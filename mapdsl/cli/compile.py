"""`mapdsl compile`: the adapter module of a map, and its property tests."""

from __future__ import annotations

import argparse
from typing import Any

from mapdsl.cli.inputs import FILE_HELP
from mapdsl.cli.output import UsageError, say, target_of, write_text


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "compile",
        help="write the adapter module of a map",
        description="Write the adapter module of a map, to standard output or to a file.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help=FILE_HELP)
    parser.add_argument(
        "-o", "--output", metavar="OUT.py", help="where to write the module (default: standard output, as with -)"
    )
    parser.add_argument("--standalone", action="store_true", help="a module that needs torch alone, not mapdsl")
    target = "a module with a class for that framework, too: see docs/automodel.md"
    parser.add_argument("--target", choices=("automodel",), help=target)
    parser.add_argument("--tests", metavar="TEST.py", help="write the map's round-trip property tests there")


def run(arguments: argparse.Namespace) -> int:
    """Compile everything that is asked for, then write it."""
    from mapdsl.map import load

    if arguments.output == "-":
        arguments.output = None
    outputs = [path for path in (arguments.output, arguments.tests) if path is not None]
    loaded = load(arguments.file)
    _refuse_same([loaded.source.path, *outputs])
    checked = loaded.checked
    if arguments.standalone and arguments.target is not None:
        raise UsageError(f"--target {arguments.target} is a module that needs mapdsl, not --standalone")
    if arguments.target == "automodel":
        if checked.map.right == "hf":
            sides = f"{checked.map.left} <-> hf"
            raise UsageError(f"--target automodel: the model's side is the right one of a map, this one's is {sides}")
        from mapdsl.emit.automodel import automodel_source

        module = automodel_source(checked)
    elif arguments.standalone:
        from mapdsl.emit.standalone import standalone_source

        module = standalone_source(checked)
    else:
        module = loaded.compile()
    texts = {arguments.output: module}
    if arguments.tests is not None:
        from mapdsl.emit.tests import tests_source

        texts[arguments.tests] = tests_source(checked, arguments.tests, arguments.output)
    for path in outputs:
        write_text(path, texts[path])
    if arguments.output is None:
        say(module.removesuffix("\n"))
    return 0


def _refuse_same(paths: list[str]) -> None:
    """UsageError where two of the paths are one file: writing one would destroy the other."""
    places = [target_of(path) for path in paths]
    if len(set(places)) < len(places):
        raise UsageError("the map, the module and its tests are different files")
