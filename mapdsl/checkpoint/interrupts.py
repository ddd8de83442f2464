"""Interrupts that have to wait: what may not be done by half is done first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """SIGINT and SIGTERM that come meanwhile are heeded when the block has ended.

    Only the main thread is ever interrupted; in others this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    previous: dict[signal.Signals, Any] = {}
    for sort in (signal.SIGINT, signal.SIGTERM):
        if callable(signal.getsignal(sort)):  # not ignored, nor left to the system
            previous[sort] = signal.signal(sort, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for sort, handler in previous.items():
            signal.signal(sort, handler)
        for number in dict.fromkeys(came):
            signal.raise_signal(number)
