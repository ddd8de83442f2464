"""`mapdsl compile`, `fmt`, `snapshot` and `maps`: what they print and what they write."""

from __future__ import annotations

import ast
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import mapdsl
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.listing import read_listing
from mapdsl.cli import output
from mapdsl.cli.main import main

ROOT = Path(__file__).parent.parent
LISTING = ROOT / "tests" / "data" / "listings" / "deepseek_v4_flash.list"
GOOD = "map good: hf <-> native\n\nnorm.weight <-> model.norm.weight\n"
UGLY = "map good: hf <-> native\n\nnorm.weight    <->   model.norm.weight # kept\n"
TIDY = "map good: hf <-> native\n\nnorm.weight <-> model.norm.weight  # kept\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.map").write_text(GOOD)
    (tmp_path / "ugly.map").write_text(UGLY)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- whole files or none -----------------------------------------------------------------------------------------


def test_a_new_file_has_usual_permissions(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        output.write_text("new.txt", "text\n")
    finally:
        os.umask(before)
    assert (folder / "new.txt").read_bytes() == b"text\n"
    assert stat.S_IMODE((folder / "new.txt").stat().st_mode) == 0o640


def test_a_replaced_file_keeps_permissions_and_links(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "real.txt").write_text("old")
    (folder / "deep" / "real.txt").chmod(0o604)
    (folder / "link.txt").symlink_to("deep/real.txt")
    output.write_text("link.txt", "new")
    assert (folder / "link.txt").is_symlink()
    assert (folder / "deep" / "real.txt").read_text() == "new"
    assert stat.S_IMODE((folder / "deep" / "real.txt").stat().st_mode) == 0o604
    assert names(folder / "deep") == ["real.txt"]


@pytest.mark.parametrize("failure", ["replace", "chmod"])
def test_a_failure_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (folder / "old.txt").write_text("old")
    monkeypatch.setattr(os, failure, fail)
    with pytest.raises(mapdsl.MapError, match=r"old\.txt: error\[C507\]: the file cannot be written: No space left"):
        output.write_text("old.txt", "new")
    assert (folder / "old.txt").read_text() == "old"
    assert names(folder) == ["good.map", "old.txt", "ugly.map"]


def test_an_interruption_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    assert main(["compile", "good.map", "-o", "good.py"]) == 130
    assert names(folder) == ["good.map", "ugly.map"]


def test_a_pipe_or_device_is_written_to_not_replaced(folder: Path) -> None:
    command = [sys.executable, "-m", "mapdsl", "compile", "good.map", "-o", "/dev/stdout"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    assert done.stdout == mapdsl.load("good.map").compile()
    assert main(["compile", "good.map", "-o", os.devnull]) == 0
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


# --- compile -----------------------------------------------------------------------------------------------------


def test_compile_prints_the_module(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "good.map"]) == 0
    assert capsys.readouterr().out == mapdsl.load("good.map").compile()
    assert names(folder) == ["good.map", "ugly.map"]


def test_compile_writes_the_module(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "good.map", "-o", "adapter.py"]) == 0
    assert (folder / "adapter.py").read_text() == mapdsl.load("good.map").compile()
    assert capsys.readouterr() == ("", "")


def test_compile_writes_the_tests_too(folder: Path) -> None:
    assert main(["compile", "good.map", "-o", "adapter.py", "--tests", "test_adapter.py"]) == 0
    tree = ast.parse((folder / "test_adapter.py").read_text())
    assert any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in ast.walk(tree))


def test_compile_standalone(folder: Path) -> None:
    assert main(["compile", "good.map", "--standalone", "-o", "adapter.py"]) == 0
    tree = ast.parse((folder / "adapter.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any((module or "").startswith("mapdsl") for module in imported)


def test_compile_of_a_bad_map_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.map").write_text("map bad: hf <-> native\n\na [x] <-> b [y]\n")
    assert main(["compile", "bad.map", "-o", "bad.py", "--tests", "test_bad.py"]) == 1
    assert "bad.map:3:1: error[X301]" in capsys.readouterr().err
    assert names(folder) == ["bad.map", "good.map", "ugly.map"]


def test_compile_never_writes_over_its_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "link.py").symlink_to("good.map")
    assert main(["compile", "good.map", "-o", "link.py"]) == 2
    assert (folder / "good.map").read_text() == GOOD
    assert "different files" in capsys.readouterr().err


# --- fmt ---------------------------------------------------------------------------------------------------------


def test_fmt_writes_in_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fmt", "good.map", "ugly.map"]) == 0
    assert (folder / "ugly.map").read_text() == TIDY
    assert capsys.readouterr() == ("", "formatted ugly.map\n")
    assert main(["fmt", "--check", "good.map", "ugly.map"]) == 0
    assert capsys.readouterr() == ("", "")


def test_fmt_leaves_a_formatted_file_alone(folder: Path) -> None:
    os.utime(folder / "good.map", ns=(1, 1))
    assert main(["fmt", "good.map"]) == 0
    assert (folder / "good.map").stat().st_mtime_ns == 1


def test_fmt_check_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fmt", "--check", "good.map", "ugly.map"]) == 1
    assert (folder / "ugly.map").read_text() == UGLY
    assert capsys.readouterr() == ("", "ugly.map: lint[L703]: would be formatted\n")


def test_fmt_diff_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fmt", "--diff", "good.map", "ugly.map"]) == 0
    assert (folder / "ugly.map").read_text() == UGLY
    assert capsys.readouterr().out.splitlines() == [
        "--- ugly.map (as it is)",
        "+++ ugly.map (formatted)",
        "@@ -1,3 +1,3 @@",
        " map good: hf <-> native",
        " ",
        "-norm.weight    <->   model.norm.weight # kept",
        "+norm.weight <-> model.norm.weight  # kept",
    ]
    assert main(["fmt", "--diff", "--check", "ugly.map"]) == 1


def test_fmt_shows_line_ends_that_change(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "good.map").write_bytes(GOOD.replace("\n", "\r\n").encode().rstrip())
    assert main(["fmt", "--diff", "good.map"]) == 0
    shown = capsys.readouterr().out
    assert "\n-map good: hf <-> native\\r\n" in shown
    assert "\n-\\ no newline at the end\n" in shown
    assert main(["fmt", "good.map"]) == 0
    assert (folder / "good.map").read_bytes() == GOOD.encode()


def test_fmt_goes_on_after_a_bad_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.map").write_text("map bad: hf <-> native\n\na [\n")
    assert main(["fmt", "bad.map", "ugly.map"]) == 1
    assert (folder / "bad.map").read_text() == "map bad: hf <-> native\n\na [\n"
    assert (folder / "ugly.map").read_text() == TIDY
    assert "bad.map:3:3: error[S102]" in capsys.readouterr().err


def test_shipped_maps_are_formatted() -> None:
    assert main(["fmt", "--check", *mapdsl.map.shipped_maps()]) == 0


# --- snapshot ----------------------------------------------------------------------------------------------------


def test_a_snapshot_of_a_listing_says_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["snapshot", str(LISTING)]) == 0
    (folder / "copy.list").write_text(capsys.readouterr().out)
    assert read_listing(folder / "copy.list") == read_listing(LISTING)


def test_a_snapshot_with_its_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["snapshot", str(LISTING), "-o", "copy.list", "--with-config"]) == 0
    assert capsys.readouterr() == ("", "wrote copy.list\nwrote copy.config.json\n")
    copy, original = open_checkpoint("copy.list"), open_checkpoint(LISTING)
    assert (copy.tensors, copy.config) == (original.tensors, original.config)


def test_a_snapshot_of_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = {"norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert main(["snapshot", "."]) == 0
    assert capsys.readouterr().out == "# tensors 1\n# parameters 2\nnorm.weight F32 2\n"


def test_a_snapshot_without_a_config_to_write(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bare.list").write_text("norm.weight F32 2\n")
    assert main(["snapshot", "bare.list", "-o", "copy.list", "--with-config"]) == 2
    assert "bare.list has no config.json to write" in capsys.readouterr().err
    assert not (folder / "copy.list").exists()


# --- maps --------------------------------------------------------------------------------------------------------


def test_maps_has_a_line_on_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["maps"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == list(mapdsl.map.shipped_maps())
    assert all(len(line) == 2 for line in lines)
