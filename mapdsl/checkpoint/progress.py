"""How far a task is, told while it runs: a bar on a terminal, a line a minute in a log, events to a program."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import IO, Any

Report = Callable[[Mapping[str, Any]], object]
"""What is told of events, dicts of plain values."""

EVENT_SECONDS = 5.0
"""Between two `progress` events."""

_LINE_SECONDS = 60.0  # between two lines of a log, and before the first
_BAR_SECONDS = 0.25
_RECENT_SECONDS = 30.0  # of work by which the rate is told
_SAMPLE_SECONDS = 1.0
_SHOWN = 4


@dataclass(frozen=True)
class Progress:
    """How far a task is. `bytes_per_second` is of the last half minute's work, None while there is none."""

    task: str
    bytes_done: int
    total: int
    bytes_per_second: float | None = None

    @property
    def seconds_left(self) -> float | None:
        """At the rate of late; None where nothing has been done of late."""
        if self.bytes_done >= self.total:
            return 0.0
        return (self.total - self.bytes_done) / self.bytes_per_second if self.bytes_per_second else None

    def line(self) -> str:
        """`writing 41 % (512.3 GB of 1.2 TB), 1.1 GB/s, 10 min left`."""
        percent = 100 * self.bytes_done // self.total if self.total else 100
        text = f"{self.task} {percent} % ({human(self.bytes_done)} of {human(self.total)})"
        if self.bytes_per_second is not None:
            text += f", {human(int(self.bytes_per_second))}/s"
        return text if self.seconds_left is None else f"{text}, {duration(self.seconds_left)} left"

    def as_json(self) -> dict[str, Any]:
        """The `progress` event."""
        rate, left = self.bytes_per_second, self.seconds_left
        return {
            "event": "progress",
            "task": self.task,
            "bytes": self.bytes_done,
            "total": self.total,
            "bytes_per_second": None if rate is None else round(rate),
            "seconds_left": None if left is None else round(left, 1),
        }


class Meter:
    """Counts the bytes that are done, from any thread, and finds how fast they went of late."""

    def __init__(self, task: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.task, self.total = task, total
        self._clock, self._lock = clock, threading.Lock()
        self._worked, self._skipped = 0, 0
        self._samples = deque([(clock(), 0)])  # of what was worked; the first is that by which the rate is told

    def __call__(self, count: int) -> None:
        """Some bytes are done."""
        with self._lock:
            self._worked += count

    def skip(self, count: int) -> None:
        """Some bytes are done already, by an earlier run: they count as done, and not for the rate."""
        with self._lock:
            self._skipped += count

    def progress(self) -> Progress:
        """How far the task is now."""
        with self._lock:
            now, samples = self._clock(), self._samples
            while len(samples) > 1 and samples[1][0] <= now - _RECENT_SECONDS:
                samples.popleft()
            (begin, before), worked = samples[0], self._worked
            if now - samples[-1][0] >= _SAMPLE_SECONDS:
                samples.append((now, worked))
            is_measured = self._worked and now > begin
            rate = (worked - before) / (now - begin) if is_measured else None
            return Progress(self.task, self._skipped + worked, self.total, rate)


class ForwardingMeter(Meter):
    """Counts what goes on beside another task, and later tells the meter of its own."""

    def __init__(self, task: str) -> None:
        super().__init__(task, 0)
        self._count, self._gate = 0, threading.Lock()
        self._target: Meter | None = None

    def __call__(self, count: int) -> None:
        """Some bytes are done."""
        with self._gate:
            self._count += count
            if self._target is not None:
                self._target(count)

    def hand_over(self, target: Meter) -> None:
        """Tell another meter from now on."""
        with self._gate:
            target.skip(self._count)
            self._target = target


class UnitProgress:
    """Tells a meter of a unit while it is made: large stacks take long, and are done by and by as their parts are read.

    `stored` are the sizes of what it is made from, `written` is that of what comes out.
    """

    def __init__(self, meter: Meter, stored: Mapping[str, int], written: int) -> None:
        self._meter, self._left, self._written = meter, dict(stored), written
        self._stored, self._read, self._told = sum(stored.values()), 0, 0

    def read(self, name: str) -> None:
        """A source has been asked for; the same again tells nothing."""
        self._read += self._left.pop(name, 0)
        if self._stored:
            self._tell(self._written * self._read // self._stored)

    def finish(self) -> None:
        """All outputs are written."""
        self._tell(self._written)

    def _tell(self, done: int) -> None:
        if done > self._told:
            self._meter(done - self._told)
            self._told = done


@contextlib.contextmanager
def reporting(task: str, total: int, *, progress: bool = False, report: Report | None = None) -> Iterator[Meter]:
    """A meter to be told of bytes; how far it is, is shown until the block ends.

    With `progress` on standard error: a bar where that is a terminal, else a line a minute. `report` is told of events,
    the last one when all went well.
    """
    meter = Meter(task, total)
    displays: list[_Display] = [_Events(report)] if report is not None else []
    if progress and sys.stderr is not None:
        with _whatever_becomes_of_it():
            displays.append(_Bar(meter.progress(), sys.stderr) if sys.stderr.isatty() else _Log(sys.stderr))
    tickers = [_Ticker(meter, display) for display in displays]
    try:
        yield meter
    finally:
        for ticker in tickers:
            ticker.stop()
    for ticker in tickers:
        ticker.raise_problem()
    if report is not None:
        report(meter.progress().as_json())


@dataclass(frozen=True)
class Reporter:
    """Who is told of a conversion while it runs: people, on standard error, and a program, by events; or nobody."""

    progress: bool = False
    report: Report | None = None

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """Tell the program of something."""
        if self.report is not None:
            self.report({"event": kind, **values})

    def meter(self, task: str, total: int) -> contextlib.AbstractContextManager[Meter]:
        """A meter for a task, of which all are told."""
        return reporting(task, total, progress=self.progress, report=self.report)


class _Ticker:
    """A thread that has a display show progress every so often, whatever the workers are at."""

    def __init__(self, meter: Meter, display: _Display) -> None:
        self._meter, self._display = meter, display
        self._stopping = threading.Event()
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="mapdsl-progress", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopping.wait(self._display.seconds):
                self._display.show(self._meter.progress())
        except Exception as problem:  # of who reads the events: the work goes on, and its end says so
            self._problem = problem

    def stop(self) -> None:
        """Show nothing more."""
        self._stopping.set()
        self._thread.join()
        self._display.close()

    def raise_problem(self) -> None:
        """Raise what came of showing progress."""
        if self._problem is not None:
            raise self._problem


class _Display:
    """What shows how far a task is."""

    seconds: float

    def show(self, progress: Progress) -> None:
        """Show it; called every so many seconds."""
        raise NotImplementedError

    def close(self) -> None:
        """The task has ended, well or badly."""


class _Events(_Display):
    """Events to a program."""

    seconds = EVENT_SECONDS

    def __init__(self, report: Report) -> None:
        self._report = report

    def show(self, progress: Progress) -> None:
        self._report(progress.as_json())


class _Log(_Display):
    """Plain lines, for a file that somebody reads later."""

    seconds = _LINE_SECONDS

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def show(self, progress: Progress) -> None:
        with _whatever_becomes_of_it():
            self._stream.write(f"{time.strftime('%H:%M')}  {progress.line()}\n")
            self._stream.flush()


class _Bar(_Display):
    """A bar on a terminal."""

    seconds = _BAR_SECONDS

    def __init__(self, progress: Progress, stream: IO[str]) -> None:
        from tqdm import tqdm

        class Bar(tqdm):  # type: ignore[misc]
            """A bar that shows the rate of late, which leaves out what an earlier run did."""

            monitor_interval = 0  # no thread to redraw what the ticker redraws
            recent: float | None = None

            @property
            def format_dict(self) -> dict[str, Any]:
                return {**super().format_dict, "rate": self.recent or 0.0}

        options = {"unit": "B", "unit_scale": True, "leave": False, "dynamic_ncols": True}
        self._bar = Bar(total=progress.total, desc=progress.task, file=stream, **options)

    def show(self, progress: Progress) -> None:
        self._bar.n, self._bar.recent = progress.bytes_done, progress.bytes_per_second
        with _whatever_becomes_of_it():
            self._bar.refresh()

    def close(self) -> None:
        with _whatever_becomes_of_it():
            self._bar.close()


def _whatever_becomes_of_it() -> contextlib.AbstractContextManager[None]:
    """A log that is full, or a terminal that has gone, is no reason to stop."""
    return contextlib.suppress(OSError, ValueError)


def plain(value: Any) -> Any:
    """A value as JSON has it: paths as texts, sequences as lists, what tells itself as a dict in its own way."""
    if hasattr(value, "as_json"):
        return value.as_json()
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


def some_of(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN:,} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def human(count: int) -> str:
    """A number of bytes for people: `1.5 GB`."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def duration(seconds: float) -> str:
    """A time for people, to come: `45 s`, `10 min`, `3 h 20 min`, `2 d 5 h`."""
    if seconds < 59.5:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
