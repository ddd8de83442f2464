"""Conversions that are cut short: the same call with `resume` goes on, to the files of a run that was not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mapdsl
from mapdsl.checkpoint import engine
from mapdsl.checkpoint.journal import JOURNAL_FILE, Journal, partial_folder
from mapdsl.cli.main import main
from mapdsl.demo import small_config, write_release
from mapdsl.language.diagnostics import MapError

KILLED = """
import os, signal, sys
import mapdsl
from mapdsl.checkpoint import engine, journal

engine.SMALL_BYTES = 0
source, destination, count, workers = sys.argv[1:]
add = journal.Journal.add

def counted(self, record):
    if len(self.done) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, record)

journal.Journal.add = counted
mapdsl.convert(source, destination, "deepseek_v4", workers=int(workers))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A release, the model that it converts to, and what that converts back to."""
    folder = tmp_path_factory.mktemp("resume")
    write_release(folder / "released", small_config())
    mapdsl.convert(folder / "released", folder / "model", "deepseek_v4")
    mapdsl.convert(folder / "model", folder / "back", "deepseek_v4")
    return folder / "released", folder / "model", folder / "back"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stopping(after: int, problem: BaseException) -> Callable[..., None]:
    """`Journal.add` that raises once so many units are done."""
    add = Journal.add

    def stopped(self: Journal, record: Any) -> None:
        if len(self.done) == after:
            raise problem
        add(self, record)

    return stopped


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("count", [1, 7, 60])
@pytest.mark.parametrize("way", [0, 1], ids=["to the model", "and back"])
def test_a_killed_run_is_gone_on_with(
    folders: tuple[Path, Path, Path], tmp_path: Path, way: int, count: int, workers: int
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(folders[way]), str(out), str(count), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    lines = (tmp_path / ".out.partial" / JOURNAL_FILE).read_text().splitlines()
    assert len(lines) == 1 + count
    with pytest.raises(MapError, match=f"an unfinished conversion to this destination is there, {count} unit"):
        mapdsl.convert(folders[way], out, "deepseek_v4")
    mapdsl.convert(folders[way], out, "deepseek_v4", resume=True)
    assert contents(out) == contents(folders[way + 1])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_done_is_not_done_again(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stopping(90, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            mapdsl.convert(folders[0], tmp_path / "out", "deepseek_v4")
    written: list[str] = []
    sink = engine._Worker._sink

    def counted(self: Any, name: str, tensor: Any) -> None:
        if not tensor.is_meta:
            written.append(name)
        sink(self, name, tensor)

    monkeypatch.setattr(engine._Worker, "_sink", counted)
    done = mapdsl.convert(folders[0], tmp_path / "out", "deepseek_v4", resume=True)
    assert len(written) == done.tensors_written - 90
    assert contents(tmp_path / "out") == contents(folders[1])


def test_a_last_line_that_is_cut_off_says_nothing(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stopping(20, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            mapdsl.convert(folders[0], tmp_path / "out", "deepseek_v4")
    journal = partial_folder(tmp_path / "out") / JOURNAL_FILE
    journal.write_bytes(journal.read_bytes()[:-9])
    mapdsl.convert(folders[0], tmp_path / "out", "deepseek_v4", resume=True)
    assert contents(tmp_path / "out") == contents(folders[1])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"dtype": "f32"}, "an option"),
        ({"max_shard_size": "1MB"}, "the size of shards"),
        ({"use_complement": False}, "an option"),
        ({"source": True}, "the source"),
    ],
)
def test_a_conversion_that_is_another_is_refused(
    folders: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    what: str,
) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders[0], source)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stopping(5, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            mapdsl.convert(source, tmp_path / "out", "deepseek_v4")
    if change.pop("source", False):
        os.utime(source / "model-00001-of-00002.safetensors", (1, 1))
    with pytest.raises(MapError) as caught:
        mapdsl.convert(source, tmp_path / "out", "deepseek_v4", resume=True, **change)
    (found,) = caught.value.diagnostics
    assert found.code == "C507" and "remove" in found.help
    assert found.message == f"the unfinished conversion was another: {what} changed"
    assert partial_folder(tmp_path / "out").exists()


def test_nothing_to_go_on_with(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(MapError, match="there is no unfinished conversion"):
        mapdsl.convert(folders[0], tmp_path / "out", "deepseek_v4", resume=True)
    assert not list(tmp_path.iterdir())


def test_a_second_run_is_refused(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    first = Journal(tmp_path / "out", {"the map": "x"})
    for resume in (False, True):
        with pytest.raises(MapError, match="another run is converting to this destination"):
            mapdsl.convert(folders[0], tmp_path / "out", "deepseek_v4", resume=resume)
    assert first.path.exists()
    first.close()
    mapdsl.convert(folders[0], tmp_path / "out", "deepseek_v4")
    assert contents(tmp_path / "out") == contents(folders[1])


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_files_of_an_earlier_run_that_are_not_what_they_were(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stopping(5, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            mapdsl.convert(folders[0], tmp_path / "out", "deepseek_v4")
    (file,) = partial_folder(tmp_path / "out").glob("*.safetensors")
    if damage == "gone":
        file.unlink()
    else:
        os.truncate(file, 1000)
    with pytest.raises(MapError, match="a file of the unfinished conversion is not what it was"):
        mapdsl.convert(folders[0], tmp_path / "out", "deepseek_v4", resume=True)


def test_a_full_disk_can_be_gone_on_with(
    folders: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["convert", str(folders[0]), str(tmp_path / "out"), "--map", "deepseek_v4"]
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stopping(30, OSError(28, "No space left on device")))
        assert main(command) == 1
    error = capsys.readouterr().err
    assert "no space left on device" in error and "--resume" in error
    assert main([*command, "--resume"]) == 0
    assert contents(tmp_path / "out") == contents(folders[1])


def test_an_interrupt_says_how_to_go_on(
    folders: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Journal, "add", stopping(3, KeyboardInterrupt()))
    monkeypatch.setattr(sys, "argv", ["mapdsl"])
    words = ["convert", str(folders[0]), str(tmp_path / "out"), "--map", "deepseek_v4"]
    assert main(words) == 130
    command = f"mapdsl {' '.join(words)} --resume"
    assert capsys.readouterr().err == f"interrupted: what is done is kept. Resume with:\n  {command}\n"


@pytest.mark.parametrize("text", ["[]", "{}", "nonsense", json.dumps({"format": "another", "identity": {}})])
def test_a_journal_that_cannot_be_read(folders: tuple[Path, Path, Path], tmp_path: Path, text: str) -> None:
    partial_folder(tmp_path / "out").mkdir()
    (partial_folder(tmp_path / "out") / JOURNAL_FILE).write_text(f"{text}\n{text}\n")
    with pytest.raises(MapError, match="cannot be read"):
        mapdsl.convert(folders[0], tmp_path / "out", "deepseek_v4", resume=True)
