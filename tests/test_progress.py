"""How far a task is: the rate of late, what is shown of it, and to whom."""

from __future__ import annotations

import io
import re
import sys
import threading
from typing import Any

import pytest

from mapdsl.checkpoint import progress
from mapdsl.checkpoint.progress import Meter, Progress, UnitProgress, duration, reporting

GB = 10**9


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_rate_is_of_recent_work() -> None:
    clock = Clock()
    meter = Meter("writing", 100 * GB, clock)
    assert meter.progress() == Progress("writing", 0, 100 * GB, None)
    for _ in range(100):  # fast for a while
        clock.now += 1
        meter(GB // 2)
        assert meter.progress().bytes_per_second == pytest.approx(GB / 2)
    for _ in range(60):  # and slow since
        clock.now += 1
        meter(GB // 10)
        meter.progress()
    assert meter.progress().bytes_per_second == pytest.approx(GB / 10)
    assert meter.progress().seconds_left == pytest.approx(440)
    clock.now += 60  # and then not at all
    assert meter.progress().bytes_per_second == 0
    assert meter.progress().seconds_left is None


def test_what_an_earlier_run_did_is_no_work_of_this_one() -> None:
    clock = Clock()
    meter = Meter("writing", 10 * GB, clock)
    meter.skip(8 * GB)
    assert meter.progress() == Progress("writing", 8 * GB, 10 * GB, None)
    clock.now += 10
    meter(GB)
    found = meter.progress()
    assert (found.bytes_done, found.bytes_per_second, found.seconds_left) == (9 * GB, GB / 10, 10)


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            Progress("writing", 512_300_000_000, 1_200_000_000_000, 1.1e9),
            "writing 42 % (512.3 GB of 1.2 TB), 1.1 GB/s, 10 min left",
        ),
        (Progress("comparing", 0, 999, None), "comparing 0 % (0 B of 999 B)"),
        (Progress("comparing", 500, 1000, 0.0), "comparing 50 % (500 B of 1.0 kB), 0 B/s"),
        (Progress("writing", 1000, 1000, 5.0), "writing 100 % (1.0 kB of 1.0 kB), 5 B/s, 0 s left"),
        (Progress("writing", 0, 0, None), "writing 100 % (0 B of 0 B), 0 s left"),
    ],
)
def test_a_line_for_people(found: Progress, line: str) -> None:
    assert found.line() == line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (90, "2 min"),
        (3599, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (191_000, "2 d 5 h"),
    ],
)
def test_a_time_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_stack_is_done_by_and_by() -> None:
    meter = Meter("writing", 100)
    unit = UnitProgress(meter, {"a": 1, "b": 1, "c": 2}, 10)
    done = []
    for name in ("a", "a", "b"):
        unit.read(name)
        done.append(meter.progress().bytes_done)
    unit.finish()
    unit.read("c")
    assert [*done, meter.progress().bytes_done] == [2, 2, 5, 10]


def test_a_unit_of_nothing_stored() -> None:
    meter = Meter("writing", 100)
    unit = UnitProgress(meter, {"empty": 0}, 10)
    unit.read("empty")
    unit.finish()
    assert meter.progress().bytes_done == 10


class Terminal(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def shown_once(monkeypatch: pytest.MonkeyPatch, kind: str, stream: io.StringIO) -> threading.Event:
    """Says when a display has shown something: it does so at once, and then never again."""
    shown = threading.Event()
    display = getattr(progress, kind)
    show = display.show

    def showing(self: Any, found: Progress) -> None:
        show(self, found)
        self.seconds = 3600
        shown.set()

    monkeypatch.setattr(display, "show", showing)
    monkeypatch.setattr(display, "seconds", 0.001)
    monkeypatch.setattr(sys, "stderr", stream)
    return shown


def test_a_log_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = shown_once(monkeypatch, "_Log", stream := io.StringIO())
    with reporting("writing", 1000, progress=True) as meter:
        meter.skip(500)
        assert shown.wait(60)
    assert re.fullmatch(r"\d\d:\d\d  writing (0|50) % \((0|500) B of 1\.0 kB\)\n", stream.getvalue())


def test_a_line_a_minute_and_none_of_short_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    assert progress._Log.seconds == 60
    with reporting("writing", 1000, progress=True) as meter:
        meter(1000)
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setenv("COLUMNS", "100")
    bar = progress._Bar(Progress("writing", 0, 1000 * GB), stream)
    bar.show(Progress("writing", 410 * GB, 1000 * GB, 1e9))
    bar.close()
    first, last, *_ = stream.getvalue().strip("\r").split("\r")
    assert first.startswith("writing:   0%|") and first.endswith("?, ?B/s]")
    assert last.startswith("writing:  41%|") and last.endswith("410G/1.00T [00:00<09:50, 1.00GB/s]")


def test_the_last_event_says_that_all_is_done() -> None:
    events: list[Any] = []
    with reporting("writing", 10, report=events.append) as meter:
        meter(10)
    (event,) = events
    rate = event.pop("bytes_per_second")
    assert rate > 0
    assert event == {"event": "progress", "task": "writing", "bytes": 10, "total": 10, "seconds_left": 0.0}


def test_a_failure_has_no_last_event() -> None:
    events: list[Any] = []
    with pytest.raises(ZeroDivisionError), reporting("writing", 10, report=events.append):
        raise ZeroDivisionError
    assert not events


def test_a_reader_who_has_left_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress._Events, "seconds", 0.001)
    told, steps = threading.Event(), []

    def report(event: Any) -> None:
        if not told.is_set():
            told.set()
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError), reporting("writing", 10, report=report):
        assert told.wait(60)
        steps.append("done")
    assert steps == ["done"]


class Gone(Terminal):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")


class Leaving(Terminal):
    """A terminal that is closed when something is shown."""

    is_there = True

    def write(self, text: str) -> int:
        if not self.is_there:
            raise OSError(6, "No such device or address")  # tqdm itself minds no other than 5
        return super().write(text)


def test_a_terminal_that_has_gone_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Gone())
    with reporting("writing", 100, progress=True) as meter:
        meter(100)
    assert meter.progress().bytes_done == 100


def test_a_terminal_that_goes_is_no_reason_to_stop() -> None:
    bar = progress._Bar(Progress("writing", 0, 100), stream := Leaving())
    stream.is_there = False
    bar.show(Progress("writing", 50, 100, 1e9))
    bar.close()
    assert "50" not in stream.getvalue().rpartition("\r")[2]
