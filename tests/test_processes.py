"""Whether another process of this machine has ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from mapdsl.checkpoint import processes
from mapdsl.checkpoint.processes import has_ended, process_name

pytestmark = pytest.mark.skipif(not process_name(), reason="this system does not tell of processes as Linux does")

CODE = "import sys; from mapdsl.checkpoint.processes import process_name; print(process_name(), flush=True); input()"


@pytest.fixture
def other() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that waits, and its name."""
    with subprocess.Popen(
        [sys.executable, "-c", CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().rstrip("\n")
        process.kill()


def test_a_process_that_runs_has_not_ended(other: tuple[subprocess.Popen[str], str]) -> None:
    assert not has_ended(process_name()) and not has_ended(other[1])


def test_one_that_was_killed_has_though_nobody_has_waited_for_it(other: tuple[subprocess.Popen[str], str]) -> None:
    process, name = other
    process.kill()
    assert process.stdout is not None
    process.stdout.read()  # to its end
    while not has_ended(name):
        pass
    assert process.returncode is None  # not waited for
    process.wait()
    assert has_ended(name)


def test_a_number_that_is_anothers_by_now() -> None:
    number, start, rest = process_name().split(" ", 2)
    assert has_ended(f"{number} {int(start) + 1} {rest}")


def test_nothing_is_said_of_other_machines_and_containers(
    other: tuple[subprocess.Popen[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, name = other
    process.kill()
    process.wait()
    assert has_ended(name) and not has_ended("")
    with monkeypatch.context() as patch:
        patch.setattr(processes, "node_name", lambda: "another machine")
        assert not has_ended(name)
    monkeypatch.setattr(processes, "_number_space", lambda: "pid:[1]")
    assert not has_ended(name)
