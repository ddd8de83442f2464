"""Reading and parsing: a `.map` file to its text, a text to its syntax tree or to all its syntax errors."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lark.exceptions import UnexpectedInput

from mapdsl.language.build import Builder
from mapdsl.language.diagnostics import Diagnostic, MapError, error, ordered
from mapdsl.language.layout import LayoutError
from mapdsl.language.parser import parser
from mapdsl.language.recovery import MAX_ERRORS, find_errors, is_odd
from mapdsl.language.source import Source, Span
from mapdsl.language.tree import File

# The largest map that anybody wrote by hand is a hundredth of this.
MAX_BYTES = 4 * 1024 * 1024


def read_source(path: str | os.PathLike[str]) -> Source:
    """The text of a file; MapError where it cannot be read (N116), or is too big or no UTF-8 (S101)."""
    name = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would be to wait for somebody who writes
            raise OSError(0, "expected a regular file, found a folder, a pipe or a device")
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as problem:
        reason = (isinstance(problem, OSError) and problem.strerror) or str(problem)
        raise MapError([Diagnostic("N116", f"the file cannot be read: {reason}", subject=name)]) from None
    if len(data) > MAX_BYTES:
        raise MapError([Diagnostic("S101", f"a map has at most {MAX_BYTES:,} bytes", subject=name)])
    try:
        return Source(name, data.decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        readable = Source(name, data.decode("utf-8-sig", "replace"))
        start = len(data[: problem.start].decode("utf-8-sig"))
        message = f"byte 0x{data[problem.start]:02x} is no UTF-8"
        raise error("S101", message, Span(readable, start, start + 1), help="save the file as UTF-8") from None


def parse(source: Source) -> File:
    """The syntax tree of a source; MapError with every syntax error otherwise, sorted (50 at most)."""
    if is_odd(source.text):
        _raise_any(find_errors(source))
    parsed, failure = None, None
    try:
        parsed = parser().parse(source.text + "\n", start="file")
    except (UnexpectedInput, LayoutError) as error:
        failure = error
    if failure is not None:  # outside of the handler, so that nobody sees the parser's own error beside ours
        _raise_any(find_errors(source))
        raise failure
    builder = Builder(source)
    file: File = builder.build(parsed)
    _raise_any(builder.found)
    return file


def _raise_any(found: list[Diagnostic]) -> None:
    if found:
        raise MapError(ordered(found)[:MAX_ERRORS])
