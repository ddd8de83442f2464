"""Ctrl-C and SIGTERM: a command that they end says so, with the exit status that a shell gives for the signal."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

_AGAIN_SECONDS = 1.0  # a launcher passes on the signal that the terminal has sent to all


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.is_told = False  # whether somebody has said what it ended


def exit_status(problem: KeyboardInterrupt) -> int:
    """128 and the signal's number."""
    return 128 + (problem.number if isinstance(problem, Interrupted) else signal.SIGINT)


@contextlib.contextmanager
def heeded_signals(*, is_last: bool) -> Iterator[None]:
    """SIGINT and SIGTERM raise `Interrupted`, once. A later one ends the process at once, as SIGKILL would.

    Where a signal is ignored, as SIGINT is in a shell's background, it stays so. `is_last` says that the process ends
    after the block: signals then end it without a word.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first: list[float] = []

    def heed(number: int, frame: FrameType | None) -> None:
        del frame
        if not first:
            first.append(time.monotonic())
            raise Interrupted(number)
        if time.monotonic() - first[0] > _AGAIN_SECONDS:
            os._exit(128 + number)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, heed) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if is_last else handler)
