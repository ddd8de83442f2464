"""How a conversion ends that does not succeed: what a program is told, and how a person goes on."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapdsl.checkpoint.ranks import world_size
from mapdsl.cli.interrupts import Interrupted
from mapdsl.cli.output import complain, escaped, say_event
from mapdsl.language.diagnostics import MapError, ordered

if TYPE_CHECKING:
    from mapdsl.checkpoint.progress import Report


@contextlib.contextmanager
def told_ending(arguments: argparse.Namespace) -> Iterator[Report | None]:
    """Tells of an error or an interrupt that ends the block, and lets it pass: events with `--json`, how to resume.

    Gives what prints the events. A reader of them who has left is no reason to stop: the end of the block says so.
    """
    from mapdsl.runtime.errors import ConversionError  # needs no torch

    printer = _Printer()
    try:
        yield printer if arguments.json else None
    except MapError as problem:
        for diagnostic in ordered(problem.diagnostics) if arguments.json else ():
            printer({"event": "error", **diagnostic.as_json()})
        raise
    except ConversionError as problem:
        if arguments.json:
            printer({"event": "error", "code": problem.code, "message": problem.message, "help": ""})
        raise
    except KeyboardInterrupt as problem:
        _tell_interrupt(arguments, printer)
        if isinstance(problem, Interrupted):
            problem.is_told = True
        raise
    if printer.problem is not None:
        raise printer.problem


class _Printer:
    """Prints events for as long as somebody reads them; `problem` is what has come in between."""

    def __init__(self) -> None:
        self.problem: Exception | None = None

    def __call__(self, event: Mapping[str, Any]) -> None:
        if self.problem is None:
            try:
                say_event(event)
            except (OSError, MapError) as problem:  # as `say` raises them
                self.problem = problem


def _tell_interrupt(arguments: argparse.Namespace, printer: _Printer) -> None:
    """Once: what is left of the conversion, and the command that goes on with it."""
    from mapdsl.checkpoint.journal import partial_folder

    destination = Path(arguments.destination)
    event: dict[str, object] = {"event": "interrupted", "resume": False}
    if partial_folder(destination).exists():
        command = resuming(arguments.words)
        event |= {"resume": True, "command": command}
        complain(f"interrupted: what is done is kept. Resume with:\n  {command}")
    elif os.path.lexists(destination):
        complain(f"interrupted: {escaped(str(destination))} is complete")
    else:
        complain("interrupted: nothing was written")
    if arguments.json:
        printer(event)


def resuming(words: Sequence[str]) -> str:
    """The command that goes on where this one, given these words, was cut short; a launcher's options are its own."""
    program = ["python", "-m", "mapdsl"] if Path(sys.argv[0]).name == "__main__.py" else ["mapdsl"]
    if world_size(os.environ) > 1:
        program = ["torchrun", "...", "-m", "mapdsl"]
    return shlex.join([*program, *words, *(["--resume"] if "--resume" not in words else [])])
