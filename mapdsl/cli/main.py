"""The entry point: finds the command, runs it, and turns what users did wrong into messages and exit statuses."""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from mapdsl import __version__
from mapdsl.cli.interrupts import Interrupted, exit_status, heeded_signals
from mapdsl.cli.output import UsageError, complain, escaped, flush, prepare, show_error
from mapdsl.cli.ranks import is_spare, mute_where_spare

# Modules of this package, in the order in which `mapdsl --help` lists them.
COMMANDS = (
    "check",
    "compile",
    "test",
    "explain",
    "keys",
    "laws",
    "fmt",
    "convert",
    "plan",
    "verify",
    "diff",
    "checksums",
    "snapshot",
    "maps",
    "demo",
)

OK, BAD_INPUT, BAD_USAGE = 0, 1, 2
BROKEN_PIPE = 141  # as a shell reports a process that the signal ended


class Parser(argparse.ArgumentParser):
    """An argument parser whose messages are safe to print, whatever was typed."""

    def error(self, message: str) -> NoReturn:
        """Show the usage and the message; exit status 2."""
        self.print_usage(sys.stderr)
        self.exit(BAD_USAGE, f"{self.prog}: error: {escaped(message)}\n")

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Say that words mean nothing to this command, and what may be meant; exit status 2."""
        options = [option for action in self._actions for option in action.option_strings]
        self.error(f"unrecognized arguments: {' '.join(words)}{_meant(words[0].partition('=')[0], options)}")


def _meant(word: str, words: Sequence[str]) -> str:
    """`; did you mean check?`, where a word looks like one of the words."""
    from difflib import get_close_matches

    near = get_close_matches(word[:100], words, 1)
    return f"; did you mean {near[0]}?" if near else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 for success, 1 for bad input, 2 for bad usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Imports and parsing make many objects that stay: collecting among them costs a sixth of a `check`.
    gc.set_threshold(50_000, 20, 20)
    # Nor need anybody look for garbage in what goes with the process.
    atexit.register(gc.freeze)
    # torch says so wherever numpy is not installed, and nothing here needs it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    prepare()
    with heeded_signals(is_last=arguments is None):
        try:
            return _run(words)
        except BrokenPipeError:
            return BROKEN_PIPE
        except KeyboardInterrupt as problem:
            if isinstance(problem, Interrupted) and not (problem.is_told or is_spare(os.environ)):
                complain(f"interrupted: {escaped(' '.join(['mapdsl', *words[:1]]))} did not come to its end")
            return exit_status(problem)


def _run(words: list[str]) -> int:
    parser, commands = _parser(words)
    try:
        if words and not words[0].startswith("-") and words[0] not in COMMANDS:
            advice = _meant(words[0], COMMANDS) or f"; commands are {', '.join(COMMANDS)}"
            parser.error(f"there is no command `{words[0]}`{advice}")
        with mute_where_spare(os.environ):
            arguments, unknown = parser.parse_known_args(words)
            if unknown:
                commands[arguments.command].refuse(unknown)
    except SystemExit as end:  # argparse's way to end after --help, --version and usage errors
        flush()
        if is_spare(os.environ):
            return OK  # a launcher kills all at the first failure, also the rank that tells of this one
        return end.code if isinstance(end.code, int) else BAD_USAGE
    if is_spare(os.environ, arguments.command):
        return OK
    module = import_module(f"mapdsl.cli.{arguments.command}")
    arguments.words = words
    try:
        status = int(module.run(arguments))
        flush()
        return status
    except UsageError as problem:
        usage = commands[arguments.command]
        usage.print_usage(sys.stderr)
        complain(f"{usage.prog}: error: {problem}")
        return BAD_USAGE
    except ValueError as problem:
        if not show_error(problem):
            raise
        return BAD_INPUT


def _parser(words: Sequence[str]) -> tuple[Parser, dict[str, Parser]]:
    """The parser with its commands; where the words name a command, with that one only, which is quicker to build."""
    parser = Parser(
        prog="mapdsl",
        description="Checkpoint layouts as maps: check them, compile them to adapters, convert checkpoints.",
        epilog="`mapdsl COMMAND --help` tells more of a command, `mapdsl explain K202` of an error code.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mapdsl {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in [words[0]] if words and words[0] in COMMANDS else COMMANDS:
        import_module(f"mapdsl.cli.{name}").add_parser(subparsers)
    return parser, dict(subparsers.choices)


__all__ = ["COMMANDS", "main"]
