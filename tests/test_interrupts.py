"""Ctrl-C and SIGTERM, real ones and to a process of its own, at every stage of a conversion."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mapdsl
from mapdsl.checkpoint.interrupts import deferred_interrupts
from mapdsl.checkpoint.journal import JOURNAL_FILE, partial_folder
from mapdsl.cli import interrupts
from mapdsl.cli.interrupts import Interrupted, heeded_signals
from mapdsl.cli.main import main
from mapdsl.demo import small_config, write_release

ROOT = Path(__file__).parent.parent
NUMBERS = {"SIGINT": 130, "SIGTERM": 143}

# Runs the command, and signals itself when it comes to a stage.
PROGRAM = """
import importlib, os, signal, sys, threading

stage, number, *words = sys.argv[1:]
sys.argv = ["mapdsl", *words]

def strike():
    os.kill(os.getpid(), getattr(signal, number))

def before(owner, name, calls=1, after=False):
    "Strikes when a function is called so many times."
    module, _, kind = owner.partition(":")
    holder = importlib.import_module(module)
    holder = getattr(holder, kind) if kind else holder
    function, left = getattr(holder, name), [calls]
    def struck(*arguments, **options):
        left[0] -= 1
        found = function(*arguments, **options) if after else None
        if not left[0]:
            strike()
        return found if after else function(*arguments, **options)
    setattr(holder, name, struck)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            strike()

if stage == "importing":
    sys.meta_path.insert(0, Finder())
elif stage == "planning":
    before("mapdsl.checkpoint.window:PlanningWindow", "__getitem__", 100)
elif stage in ("starting", "working"):
    from mapdsl.checkpoint import engine
    engine.SMALL_BYTES = 0  # so that there are several workers
    finish, submit, left, some = engine._Run.finish, engine.ThreadPoolExecutor.submit, [20], threading.Event()
    def finished(self, *arguments):
        finish(self, *arguments)
        with self.lock:
            left[0] -= 1
            is_last = not left[0]
        if is_last and stage == "working":
            strike()
        if left[0] <= 0:
            some.set()
            if not self.failed.wait(60):  # until the main thread has heeded it
                os._exit(9)
    def submitted(self, *arguments):
        "Strikes while one worker is at work, and before there is a second one."
        submit(self, *arguments)
        some.wait()
        strike()
    engine._Run.finish = finished
    if stage == "starting":
        engine.ThreadPoolExecutor.submit = submitted
elif stage == "keeping":
    before("mapdsl.checkpoint.sidecar:SideWriter", "finish")
elif stage == "flushing":
    before("mapdsl.checkpoint.writer", "flush")
elif stage == "reading":
    before("mapdsl.checkpoint.checkpoint", "open_checkpoint")
elif stage == "packing":
    before("mapdsl.checkpoint.dcp_writer:DcpWriter", "_note", 2, after=True)
elif stage == "named":
    before("os", "rename", after=True)
else:
    assert stage == "never"

from mapdsl.cli.main import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release, `released`, and what it is converted to: `model`, and `dcp`."""
    folder = tmp_path_factory.mktemp("interrupts")
    write_release(folder / "released", small_config())
    mapdsl.convert(folder / "released", folder / "model", "deepseek_v4", max_shard_size="2MB")
    mapdsl.convert(folder / "released", folder / "dcp", "deepseek_v4", max_shard_size="2MB", format="dcp")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def struck(stage: str, number: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, stage, number, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def words_for(folders: Path, out: Path, *more: str) -> list[str]:
    return ["convert", str(folders / "released"), str(out), "--map", "deepseek_v4", "--max-shard-size", "2MB", *more]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("stage", ["starting", "working", "keeping", "flushing", "packing"])
def test_it_says_once_how_to_go_on(folders: Path, tmp_path: Path, stage: str, number: str) -> None:
    more = ["--format", "dcp"] if stage == "packing" else []
    words = words_for(folders, tmp_path / "out", "--workers", "3", *more)
    done = struck(stage, number, *words)
    command = shlex.join(["mapdsl", *words, "--resume"])
    assert (done.returncode, done.stdout) == (NUMBERS[number], "")
    assert done.stderr == f"interrupted: what is done is kept. Resume with:\n  {command}\n"
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert len((partial_folder(tmp_path / "out") / JOURNAL_FILE).read_text().splitlines()) > 20
    assert main(shlex.split(command)[1:]) == 0
    assert contents(tmp_path / "out") == contents(folders / ("dcp" if more else "model"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("stage", ["importing", "planning"])
def test_nothing_is_left_where_nothing_was_done(folders: Path, tmp_path: Path, stage: str, number: str) -> None:
    done = struck(stage, number, *words_for(folders, tmp_path / "out"))
    assert (done.returncode, done.stdout) == (NUMBERS[number], "")
    assert done.stderr == "interrupted: nothing was written\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", NUMBERS)
def test_what_has_its_name_is_complete(folders: Path, tmp_path: Path, number: str) -> None:
    done = struck("named", number, *words_for(folders, tmp_path / "out"))
    assert (done.returncode, done.stdout) == (NUMBERS[number], "")
    assert done.stderr == f"interrupted: {tmp_path / 'out'} is complete\n"
    assert contents(tmp_path / "out") == contents(folders / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_goes_on_is_interrupted_again(folders: Path, tmp_path: Path) -> None:
    words = words_for(folders, tmp_path / "out")
    assert struck("working", "SIGTERM", *words).returncode == 143
    for stage in ("planning", "working"):
        done = struck(stage, "SIGINT", *words, "--resume")
        assert done.returncode == 130
        assert done.stderr.endswith(f"  {shlex.join(['mapdsl', *words, '--resume'])}\n")
    assert struck("never", "SIGINT", *words, "--resume").returncode == 0
    assert contents(tmp_path / "out") == contents(folders / "model")


@pytest.mark.parametrize(("stage", "resume"), [("planning", False), ("working", True)])
def test_events_end_with_it(folders: Path, tmp_path: Path, stage: str, resume: bool) -> None:
    words = words_for(folders, tmp_path / "out", "--json")
    done = struck(stage, "SIGINT", *words)
    assert done.returncode == 130
    event: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    command = {"command": shlex.join(["mapdsl", *words, "--resume"])} if resume else {}
    assert event == {"event": "interrupted", "resume": resume, **command}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("command", ["verify", "plan", "diff", "checksums"])
def test_other_commands_say_that_they_did_not_end(folders: Path, command: str, number: str) -> None:
    model, map_words = str(folders / "model"), ["--map", "deepseek_v4"]
    words = {
        "verify": [str(folders / "released"), model, *map_words],
        "plan": [str(folders / "released"), *map_words],
        "diff": [model, model],
        "checksums": [model, "--write"],
    }
    done = struck("planning" if command in ("verify", "plan") else "reading", number, command, *words[command])
    assert (done.returncode, done.stdout) == (NUMBERS[number], "")
    assert done.stderr == f"interrupted: mapdsl {command} did not come to its end\n"
    assert not (folders / "model" / "mapdsl.checksums.json").exists()


EARLY = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "mapdsl.cli.main":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.argv = ["mapdsl", "maps"]
"""


@pytest.mark.parametrize(
    "start", ['runpy.run_module("mapdsl", run_name="__main__")', "from mapdsl.__main__ import main; sys.exit(main())"]
)
def test_while_the_command_itself_is_imported(start: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", EARLY + start]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_the_installed_command_starts_there() -> None:
    assert '\n[project.scripts]\nmapdsl = "mapdsl.__main__:main"\n' in (ROOT / "pyproject.toml").read_text()


# --- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def test_a_second_signal_ends_the_process(monkeypatch: pytest.MonkeyPatch, handlers: dict[int, Any]) -> None:
    now, ended = [100.0], []
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "_exit", ended.append)
    with heeded_signals(is_last=False):
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        now[0] += 0.5  # a launcher's, of the same Ctrl-C
        signal.raise_signal(signal.SIGINT)
        assert not ended
        now[0] += 1
        signal.raise_signal(signal.SIGINT)
        assert ended == [130]
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_an_ignored_signal_stays_ignored(handlers: dict[int, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with heeded_signals(is_last=False):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, handlers[signal.SIGINT])


def test_an_interrupt_waits_for_the_end(handlers: dict[int, Any]) -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        signal.raise_signal(signal.SIGINT)
        steps.append("done")
    assert steps == ["done"]
    assert {number: signal.getsignal(number) for number in handlers} == handlers
