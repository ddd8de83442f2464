"""`mapdsl convert --json`: an event a line; what is not printed with `--quiet`; what is told in a log."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conversions import MAP, NAME, contents, renames, write_state, write_tiny

import mapdsl
from mapdsl.checkpoint import engine, progress
from mapdsl.checkpoint.journal import Journal
from mapdsl.checkpoint.progress import Meter
from mapdsl.checkpoint.sidecar import SIDE_FILE
from mapdsl.checkpoint.tensors import LazyState
from mapdsl.cli.main import main

Capture = pytest.CaptureFixture[str]


def events(capsys: Capture, *words: object, status: int = 0) -> list[dict[str, Any]]:
    """What `convert --json` prints, line by line."""
    assert main(["convert", *map(str, words), "--json"]) == status
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("way", ["to the model", "and back", "to dcp"])
def test_a_plan_progress_and_the_end(way: str, tmp_path: Path, capsys: Capture) -> None:
    source, out = write_tiny(tmp_path / "source"), tmp_path / "out"
    if way == "and back":
        mapdsl.convert(source, tmp_path / "model", MAP)
        source = tmp_path / "model"
    options = ["--map", NAME, "--workers", "2", *(["--format", "dcp"] if way == "to dcp" else [])]
    plan, *told, done = events(capsys, source, out, *options)
    assert main(["plan", str(source), str(tmp_path / "none"), *options, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    del planned["units"], planned["free_bytes"], plan["free_bytes"]
    assert plan == {"event": "plan", "destination": str(out), **planned}
    tasks = ["writing", "packing"] if way == "to dcp" else ["writing"]
    assert [(event["event"], event["task"]) for event in told] == [("progress", task) for task in tasks]
    for event in told:
        assert event["bytes"] == event["total"] > 0
    assert done["event"] == "done"
    assert done["destination"] == str(out)
    assert done["tensors_written"] == plan["tensors_written"]
    assert told[0]["total"] == done["bytes_written"]
    assert sorted(done["files"]) == sorted(
        path.name for path in out.iterdir() if path.suffix in (".safetensors", ".distcp")
    )


def test_every_member_is_documented(tmp_path: Path, capsys: Capture) -> None:
    text = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(\w+)`", text.split("## Events", 1)[1]))
    source = write_tiny(tmp_path / "source")
    found = events(capsys, source, tmp_path / "out", "--map", NAME)
    found += events(capsys, source, tmp_path / "out", "--map", NAME, status=1)
    assert {event["event"] for event in found} == {"plan", "progress", "done", "error"}
    members = {member for event in found for member in event}
    assert members | {event["event"] for event in found} <= documented


def test_the_files_are_those_of_a_run_without_events(tmp_path: Path, capsys: Capture) -> None:
    source = write_tiny(tmp_path / "source")
    events(capsys, source, tmp_path / "out", "--map", NAME)
    mapdsl.convert(source, tmp_path / "quiet", MAP)
    assert contents(tmp_path / "out") == contents(tmp_path / "quiet")


def test_progress_comes_while_the_work_is_done(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker waits after its first unit until that has been told."""
    file, source = renames(tmp_path)
    finish, show, told = engine._Run.finish, progress._Events.show, threading.Event()

    def finished(self: Any, *arguments: Any) -> None:
        finish(self, *arguments)
        assert told.wait(60)

    def shown(self: Any, found: Any) -> None:
        show(self, found)
        if found.bytes_done:
            self.seconds = 3600
            told.set()

    monkeypatch.setattr(engine._Run, "finish", finished)
    monkeypatch.setattr(progress._Events, "show", shown)
    monkeypatch.setattr(progress._Events, "seconds", 0.001)
    found = [e for e in events(capsys, source, tmp_path / "out", "--map", file) if e["event"] == "progress"]
    assert 0 < found[-2]["bytes"] < found[-1]["bytes"] == found[-1]["total"]
    assert found[-2]["bytes_per_second"] > 0 and found[-2]["seconds_left"] is not None


def test_what_was_done_before_is_progress_and_no_rate(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_tiny(tmp_path / "source"), tmp_path / "out"
    add = Journal.add

    def stopped(self: Journal, record: Any) -> None:
        if len(self.done) == 30:
            raise KeyboardInterrupt
        add(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stopped)
        *_, last = events(capsys, source, out, "--map", NAME, status=130)
    assert (last["event"], last["resume"]) == ("interrupted", True)
    skipped, worked = [], []
    skip, count = Meter.skip, Meter.__call__
    monkeypatch.setattr(Meter, "skip", lambda self, size: skipped.append(size) or skip(self, size))
    monkeypatch.setattr(Meter, "__call__", lambda self, size: worked.append(size) or count(self, size))
    *_, told, _ = events(capsys, source, out, "--map", NAME, "--resume")
    assert sum(skipped) > 0 and sum(worked) > 0
    assert sum(skipped) + sum(worked) == told["bytes"] == told["total"]


def test_an_error_is_an_event_and_a_message(tmp_path: Path, capsys: Capture) -> None:
    source = write_tiny(tmp_path / "source")
    assert main(["convert", str(source), str(source), "--map", NAME, "--json"]) == 1
    out, err = capsys.readouterr()
    (event,) = map(json.loads, out.splitlines())
    assert (event["event"], event["code"], event["subject"]) == ("error", "C507", str(source))
    assert event["message"].startswith("the destination exists already") and event["help"]
    assert err.startswith(f"{source}: error[C507]: the destination exists already")


def test_every_error_of_a_map_is_an_event(tmp_path: Path, capsys: Capture) -> None:
    file, source = renames(tmp_path)
    file.write_text("map renames: old <-> new\na <-> x\na <-> y\nb <-> x\n")
    found = events(capsys, source, tmp_path / "out", "--map", file, status=1)
    assert len(found) > 1 and {event["event"] for event in found} == {"error"}
    assert all(event["places"] for event in found)


def test_wrong_options_have_no_events(tmp_path: Path, capsys: Capture) -> None:
    file, source = renames(tmp_path)
    assert events(capsys, source, tmp_path / "out", "--map", file, "--to", "new", "--quantize", status=2) == []


def test_files_that_are_laid_out_anew_are_a_warning(tmp_path: Path, capsys: Capture) -> None:
    mapdsl.convert(write_tiny(tmp_path / "source"), tmp_path / "there", MAP)
    state = dict(LazyState(mapdsl.checkpoint.checkpoint.open_checkpoint(tmp_path / "there")))
    write_state(tmp_path / "trained", {**state, "model.norm.weight": state["model.norm.weight"].float()})
    (tmp_path / "there" / SIDE_FILE).rename(tmp_path / "trained" / SIDE_FILE)
    found = events(capsys, tmp_path / "trained", tmp_path / "back", "--map", NAME)
    (warning,) = [event for event in found if event["event"] == "warning"]
    assert warning["message"].startswith("the files are laid out anew: tensor `norm.weight` is now F32")


def test_quiet_prints_nothing(tmp_path: Path, capsys: Capture) -> None:
    file, source = renames(tmp_path)
    out, words = tmp_path / "out", ["--map", str(file), "--quiet"]
    assert main(["convert", str(source), str(out), *words]) == 0
    assert main(["verify", str(source), str(out), *words]) == 0
    assert main(["diff", str(out), str(out), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["convert", str(source), str(out), *words]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["diff", str(source), str(out), "--quiet"]) == 1
    assert "different: " in capsys.readouterr().out
    assert main(["verify", str(out), str(out), *words]) == 1
    assert "is not the conversion" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["convert", "verify", "diff"])
def test_a_log_has_a_line_of_long_runs(
    command: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work goes on when a line has been written."""
    file, source = renames(tmp_path)
    mapdsl.convert(source, tmp_path / "there", file)
    told = threading.Event()
    show, reading = progress._Log.show, progress.Meter.__call__

    def shown(self: Any, found: Any) -> None:
        self.seconds = 3600
        show(self, found)
        told.set()

    def waiting(self: Meter, size: int) -> None:
        assert told.wait(60)
        reading(self, size)

    monkeypatch.setattr(progress._Log, "show", shown)
    monkeypatch.setattr(progress._Log, "seconds", 0.001)
    monkeypatch.setattr(Meter, "__call__", waiting)
    words = {
        "convert": ["convert", str(source), str(tmp_path / "out"), "--map", str(file)],
        "verify": ["verify", str(source), str(tmp_path / "there"), "--map", str(file)],
        "diff": ["diff", str(source), str(source)],
    }[command]
    assert main(words) == 0
    task = "writing" if command == "convert" else "comparing"
    assert re.fullmatch(rf"\d\d:\d\d  {task} 0 % \(0 B of \d+ B\)\n", capsys.readouterr().err)


def test_a_reader_who_has_left_gets_no_more_and_the_work_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_tiny(tmp_path / "source")
    mapdsl.convert(source, tmp_path / "whole", MAP)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(["convert", str(source), str(tmp_path / "out"), "--map", NAME, "--json"]) == 141
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert capfd.readouterr().err == ""
