"""What commands print and write: text safe on a terminal, colours where they are wanted, whole files or none."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from mapdsl.language.diagnostics import Diagnostic, MapError, error, ordered, printable

_COLOURS = {"error": "1;31", "warning": "1;33", "lint": "1;36", "good": "32", "bold": "1", "added": "32", "gone": "31"}
_HEAD = re.compile(r"\b(error|warning|lint)\[[A-Z]\d{3}\]")
_TITLE = re.compile(r"^(witness|help):")
# Stands in our own colour sequences until they are printed. Nobody outside knows it, so no text brings colours along.
_MARK = os.urandom(8).hex()
_OURS = re.compile(rf"\x1b{_MARK}\[([\d;]*)m")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UsageError(Exception):
    """A command line that argparse accepts and the command does not: exit status 2."""


# --- on the terminal -------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Let standard output and error show what their encoding lacks as escapes; never fail on it."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def escaped(text: str) -> str:
    """Text from outside on one line: control characters escaped, absurd lengths cut."""
    return printable(text)


def counted(count: int, noun: str) -> str:
    """`1 file`, `1,024 tensors`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def say(text: str = "") -> None:
    """Print lines to standard output. Control characters that slipped in are escaped; newlines and colours stay."""
    _print(text, sys.stdout)


def complain(text: str) -> None:
    """Print lines to standard error, as `say`."""
    _print(text, sys.stderr)


def say_json(value: Any) -> None:
    """Print a value as JSON; everything beyond ASCII is escaped."""
    _print(json.dumps(value, indent=2), sys.stdout)


def say_event(value: Mapping[str, Any]) -> None:
    """Print a value as JSON on one line, for a reader who waits for it."""
    _print(json.dumps(value), sys.stdout)
    flush()


def paint(text: str, colour: str, stream: IO[str] | None = None) -> str:
    """Text in a colour (`error`, `good`, `bold`, ...) where the stream, standard output if none, shows colours."""
    return _coloured(text, _COLOURS[colour]) if has_colours(stream or sys.stdout) else text


def _coloured(text: str, codes: str) -> str:
    return f"\x1b{_MARK}[{codes}m{text}\x1b{_MARK}[0m"


def has_colours(stream: IO[str] | None) -> bool:
    """Whether to print colours: on a terminal, unless NO_COLOR is set (https://no-color.org) or it cannot."""
    if stream is None or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def rendered(diagnostic: Diagnostic, stream: IO[str] | None = None) -> str:
    """A diagnostic as text, its head and titles coloured where the stream shows colours."""
    text = diagnostic.render()
    if not has_colours(stream or sys.stdout):
        return text
    head, *rest = text.split("\n")
    head = _HEAD.sub(lambda m: _coloured(m[0], _COLOURS[m[1]]), head, count=1)
    return "\n".join([head, *(_TITLE.sub(lambda m: _coloured(m[0], "1"), line) for line in rest)])


def show_error(problem: ValueError) -> bool:
    """Print an error of the user's to standard error; False where it is none, but a defect of ours."""
    if isinstance(problem, MapError):
        complain("\n\n".join(rendered(d, sys.stderr) for d in ordered(problem.diagnostics)))
        return True
    from mapdsl.runtime.errors import ConversionError  # needs no torch

    if isinstance(problem, ConversionError):
        head = paint(f"error[{problem.code}]", "error", sys.stderr)
        complain(f"{head}: {printable(problem.message)}")
        return True
    return False


def _print(text: str, stream: IO[str] | None) -> None:
    if stream is None:  # closed by who started us
        return
    pieces = _OURS.split(text)
    pieces[::2] = [_CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode(), piece) for piece in pieces[::2]]
    pieces[1::2] = [f"\x1b[{codes}m" for codes in pieces[1::2]]
    try:
        stream.write("".join(pieces) + "\n")
    except OSError as problem:
        _lose_output(problem)


def flush() -> None:
    """Have everything printed that is buffered, while a failure can still be told."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError as problem:
            _lose_output(problem)


def _lose_output(problem: OSError) -> NoReturn:
    """Standard output takes no more: its reader has left (BrokenPipeError), or a disk is full (MapError).

    What is buffered goes nowhere, so that the interpreter does not fail on it again when it exits.
    """
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    if isinstance(problem, BrokenPipeError):
        raise problem
    raise _unwritable("standard output", problem.strerror or str(problem)) from None


# --- in files --------------------------------------------------------------------------------------------------------


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole file at once: it is there with all of its text, or as it was before.

    A link is followed, permissions of a file that is replaced are kept. MapError, C507, where it cannot be written.
    """
    target = target_of(path)
    data = text.encode("utf-8")
    try:
        if _is_stream(Path(path)):
            Path(path).write_bytes(data)
            return
        with _replacing(target) as file:
            file.write(data)
    except (OSError, ValueError) as problem:
        raise _unwritable(path, (isinstance(problem, OSError) and problem.strerror) or str(problem)) from None


def target_of(path: str | os.PathLike[str]) -> Path:
    """The file that a path leads to, links followed; MapError where no file can be called so."""
    try:
        return Path(os.path.realpath(path))
    except ValueError as problem:  # a NUL in the name
        raise _unwritable(path, str(problem)) from None


def _is_stream(path: Path) -> bool:
    """Whether a path is a pipe or a device, such as /dev/stdout: nothing can take its place, so it is written to."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    """A file beside the target that takes its place when all went well, and is gone otherwise."""
    mode = None
    with contextlib.suppress(FileNotFoundError):
        status = target.stat()
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(0, "expected a file, found a folder")
        mode = stat.S_IMODE(status.st_mode)
    temporary = target.with_name(f".{target.name[:100]}.{os.urandom(8).hex()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            if mode is not None:
                os.chmod(temporary, mode)
            yield file
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _unwritable(path: str | os.PathLike[str], reason: str) -> MapError:
    return error("C507", f"the file cannot be written: {reason}", subject=os.fspath(path))
