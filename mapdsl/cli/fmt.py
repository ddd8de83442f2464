"""`mapdsl fmt`: the canonical layout of `.map` files."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mapdsl.cli.inputs import FILE_HELP
from mapdsl.cli.output import complain, escaped, paint, say, write_text

if TYPE_CHECKING:
    from mapdsl.language.source import Source


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "fmt",
        help="lay .map files out in the canonical way",
        description="Lay .map files out in the canonical way, in place: arrows aligned by paragraph, comments kept, "
        "the meaning unchanged.",
        allow_abbrev=False,
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help=FILE_HELP)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a file would change")
    parser.add_argument("--diff", action="store_true", help="write nothing; print what would change")


def run(arguments: argparse.Namespace) -> int:
    """Format every file that can be; 1 if one has syntax errors, or with --check if one would change."""
    from mapdsl.language.diagnostics import MapError

    status = 0
    for file in dict.fromkeys(arguments.files):
        try:
            changed = _format(file, arguments)
        except MapError as problem:  # the other files are formatted all the same
            from mapdsl.cli.output import show_error

            show_error(problem)
            status = 1
        else:
            if changed and arguments.check:
                status = 1
    return status


def _format(file: str, arguments: argparse.Namespace) -> bool:
    """Format one file, or show what that would change; whether it changes."""
    from mapdsl.language.format import format_source
    from mapdsl.map import load

    source = load(file).source
    text = format_source(source)
    if text == source.text:
        return False
    if arguments.diff:
        _print_diff(source, text)
    if arguments.check:
        # The code is told here and not by `check`: comparing layouts would slow every check.
        complain(f"{escaped(source.path)}: lint[L703]: would be formatted")
    elif not arguments.diff:
        write_text(source.path, text)
        complain(f"formatted {escaped(source.path)}")
    return True


def _print_diff(source: Source, text: str) -> None:
    from difflib import unified_diff

    name = escaped(source.path)
    lines = unified_diff(_lines(source.text), _lines(text), f"{name} (as it is)", f"{name} (formatted)", lineterm="")
    for line in lines:
        colour = {"+": "added", "-": "gone"}.get(line[:1])
        say(paint(line, colour) if colour else line)


def _lines(text: str) -> list[str]:
    """The lines of a text; carriage returns are kept, and shown where they are what changes."""
    return text.split("\n")[:-1] if text.endswith("\n") else [*text.split("\n"), "\\ no newline at the end"]
