"""The end of a conversion: killed when the output has its name; places and sources that go or come meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mapdsl
from mapdsl.checkpoint.journal import Journal, partial_folder
from mapdsl.cli.main import main
from mapdsl.demo import small_config, write_release
from mapdsl.language.diagnostics import MapError
from tests.conversions import assert_same_files, renames
from tests.helpers.ranks import torchrun

NAME = "deepseek_v4"

KILLED = """
import os, pathlib, signal, sys
owner, name, count, *words = sys.argv[1:]
owner, left = {"os": os, "Path": pathlib.Path}[owner], [int(count)]
function = getattr(owner, name)

def counted(*arguments, **options):
    found = function(*arguments, **options)
    place = str(arguments[0])
    left[0] -= place.endswith(".partial") or ".mapdsl." in place  # the folder, or what is of no use any more
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return found

setattr(owner, name, counted)
from mapdsl.cli.main import main
sys.exit(main(words))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A release, and the model that it converts to."""
    folder = tmp_path_factory.mktemp("end")
    write_release(folder / "released", small_config())
    mapdsl.convert(folder / "released", folder / "model", NAME)
    return folder / "released", folder / "model"


def killed(source: Path, out: Path, *words: str, call: str = "os rename 1") -> list[str]:
    """A run that is killed after a call; gives its words."""
    command = ["convert", str(source), str(out), "--map", NAME, *words]
    done = subprocess.run([sys.executable, "-c", KILLED, *call.split(), *command], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    return command


@pytest.mark.parametrize("form", ["safetensors", "dcp"])
@pytest.mark.parametrize("call", ["os rename 1", "Path unlink 1", "Path unlink 2", "Path unlink 3"])
def test_killed_before_the_end_of_the_clean_up(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], call: str, form: str
) -> None:
    out = tmp_path / "out"
    command = killed(folders[0], out, "--verify", "--checksums", "--format", form, call=call)
    assert list(out.glob(".mapdsl.*"))
    assert main(command) == 1
    assert "the destination exists already" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    told = capsys.readouterr().out
    assert "all of it was done by the run that was killed; what that left over is removed" in told
    assert "verified: 296 tensors" in told and "mapdsl.complement keeps 211.8 kB" in told
    mapdsl.convert(folders[0], tmp_path / "other", NAME, checksums=True, format=form)
    assert_same_files(out, tmp_path / "other")
    assert main([*command, "--resume"]) == 1
    told = capsys.readouterr().err
    assert "no unfinished conversion to go on with, and the destination exists" in told and "remove" not in told


def test_events_tell_what_had_been_done(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = killed(folders[0], tmp_path / "out")
    assert main([*command, "--resume", "--json"]) == 0
    first, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert main(["convert", str(folders[0]), str(tmp_path / "other"), "--map", NAME, "--json"]) == 0
    other = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["event"] == "plan" and first["done_units"] == 143
    assert last.pop("was_complete") and other.pop("was_complete") is False
    differing = ("destination", "seconds")
    assert {key: last[key] for key in last if key not in differing} == {
        key: other[key] for key in other if key not in differing
    }


@pytest.mark.parametrize(
    "change", [{"dtype": "f32"}, {"verify": True}, {"checksums": True}, "{", '{"identity": {}}'], ids=str
)
def test_what_was_complete_was_another(folders: tuple[Path, Path], tmp_path: Path, change: Any) -> None:
    out = tmp_path / "out"
    killed(folders[0], out)
    if isinstance(change, str):
        (out / ".mapdsl.outcome").write_text(change)
        change, message = {}, "the destination is complete, but .mapdsl.outcome, which says of what, cannot be read"
    elif "dtype" in change:
        message = "the destination is of another conversion: an option changed"
    else:
        message = "the conversion was complete already, and not (verified|given checksums)"
    with pytest.raises(MapError, match=message):
        mapdsl.convert(folders[0], out, NAME, resume=True, **change)
    for path in out.glob(".mapdsl.*"):
        path.unlink()
    assert_same_files(out, folders[1])


def test_ranks_finish_what_was_complete(folders: tuple[Path, Path], tmp_path: Path) -> None:
    command = killed(folders[0], tmp_path / "out")
    done = torchrun(2, *command, "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all of it was done by the run that was killed") == 1
    assert_same_files(tmp_path / "out", folders[1])


def test_a_destination_that_comes_meanwhile_costs_no_work(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        add = Journal.add
        patch.setattr(Journal, "add", lambda *arguments: (out.mkdir(exist_ok=True), add(*arguments)))
        with pytest.raises(MapError) as caught:
            mapdsl.convert(folders[0], out, NAME)
    assert "remove it first; what is done is kept" in caught.value.diagnostics[0].help
    assert not list(out.iterdir())
    out.rmdir()
    monkeypatch.setattr(Journal, "add", None)  # all is done
    mapdsl.convert(folders[0], out, NAME, resume=True)
    assert_same_files(out, folders[1])


def test_a_hidden_folder_that_goes_meanwhile(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, add = partial_folder(tmp_path / "out"), Journal.add

    def removing(self: Journal, record: Any) -> None:
        add(self, record)
        if len(self.done) == 20:
            shutil.rmtree(hidden)

    monkeypatch.setattr(Journal, "add", removing)
    with pytest.raises(MapError) as caught:
        mapdsl.convert(folders[0], tmp_path / "out", NAME)
    (found,) = caught.value.diagnostics
    assert found.help == f"{hidden}, with what was done, is no longer there: begin anew, without --resume"


@pytest.mark.parametrize("how", ["copied", "mapped"])
def test_a_source_that_goes_meanwhile(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    source, out, add = tmp_path / "source", tmp_path / "out", Journal.add
    if how == "copied":
        map_file, source = renames(tmp_path)
        expected = tmp_path / "expected"
        mapdsl.convert(source, expected, map_file)
    else:
        map_file, expected = NAME, folders[1]
        shutil.copytree(folders[0], source)
    file = max(source.glob("*.safetensors"))

    def moving(self: Journal, record: Any) -> None:
        add(self, record)
        if len(self.done) == 1:
            os.rename(file, tmp_path / "elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", moving)
        with pytest.raises(MapError) as caught:
            mapdsl.convert(source, out, map_file)
    (found,) = caught.value.diagnostics
    assert found.subject == str(file) and "no such file or directory" in found.message
    assert f"cannot {'copy tensor' if how == 'copied' else 'map the file'}" in found.message
    assert found.help.startswith("what is done is kept: the same command with --resume goes on")
    os.rename(tmp_path / "elsewhere", file)
    mapdsl.convert(source, out, map_file, resume=True)
    assert_same_files(out, expected)
