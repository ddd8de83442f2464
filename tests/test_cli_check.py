"""`mapdsl check`: findings, summaries, JSON, configs and checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mapdsl.cli.inputs import assignment
from mapdsl.cli.main import main

ROOT = Path(__file__).parent.parent
LISTING = str(ROOT / "tests" / "data" / "listings" / "deepseek_v4_flash.list")
CONFIG = str(ROOT / "tests" / "data" / "listings" / "deepseek_v4_flash.config.json")

GOOD = "map good: hf <-> native\n\nparam L = layers\n\nindex i < L\n\na.{i} [x y] <-> b.{i} [x y]\n"
BAD = "map bad: hf <-> native\n\na <-> b\nc <-> b\nd [x] <-> e [y]\n"
COLLIDING = "map two: hf <-> native\n\na.x <-> b\nc <-> b\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.map").write_text(GOOD)
    (tmp_path / "bad.map").write_text(BAD)
    (tmp_path / "two.map").write_text(COLLIDING)
    (tmp_path / "config.json").write_text('{"layers": 2}')
    return tmp_path


def test_a_map_that_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "good.map"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "good.map: 1 rule holds: 1 hf name, 1 native name, no two alike\n"
    assert shown.err == ""


def test_a_shipped_map_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "deepseek_v4"]) == 0
    assert "deepseek_v4.map: " in capsys.readouterr().out


def test_findings_with_their_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "two.map"]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("two.map:3:9: error[K202]: two rules write the same tensor\n3 | a.x <-> b\n")
    assert shown.endswith("\n\ntwo.map: 1 error\n")


def test_every_file_is_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "bad.map", "good.map", "nope.map", "two.map"]) == 1
    shown = capsys.readouterr().out
    for line in ("good.map: 1 rule holds", "nope.map: 1 error", "two.map: 1 error", "bad.map: "):
        assert f"\n{line}" in shown or shown.startswith(line)


def test_lints_and_warnings_do_not_fail(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "unused.map").write_text("map unused: hf <-> native\n\nindex i < 2\n\na <-> b\n")
    assert main(["check", "unused.map"]) == 0
    shown = capsys.readouterr().out
    assert "unused.map:3:1: lint[L701]" in shown
    assert shown.endswith("no two alike (1 lint)\n")


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "good.map", "two.map", "nope.map", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    good, two, nope = found["files"]
    assert (found["ok"], good["ok"], two["ok"], nope["ok"]) == (False, True, False, False)
    assert (good["file"], good["rules"], good["diagnostics"]) == ("good.map", 1, [])
    (finding,) = two["diagnostics"]
    assert (finding["code"], finding["name"], finding["severity"]) == ("K202", "written-twice", "error")
    assert [(p["file"], p["line"], p["column"]) for p in finding["places"]] == [("two.map", 3, 9), ("two.map", 4, 7)]
    assert [d["code"] for d in nope["diagnostics"]] == ["N116"]
    assert main(["check", "good.map", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_a_config_counts_the_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--config", "config.json"], ["--config", "."], ["--param", "L=2"]):
        assert main(["check", "good.map", *words]) == 0
        assert capsys.readouterr().out.endswith("\n  this config has 2 hf names and 2 native names\n")


def test_params_win_over_the_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "good.map", "--config", "config.json", "--param", "L=5"]) == 0
    assert "5 hf names" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("P=1", 1),
        ("P=-1", -1),
        ("P = 12 ", 12),
        ("P=true", True),
        ("P=false", False),
        ("P=0.5", 0.5),
        ("P=1e4", 1e4),
        ("P=" + "9" * 30, 10**30 - 1),
        ("P=full", "full"),
        ('P="12"', "12"),
        ("P=", ""),
        ("P=007", "007"),
        ("P=a=b", "a=b"),
        ("P=[0, 4, 128]", [0, 4, 128]),
        ('P=["full", true]', ["full", True]),
    ],
)
def test_values_of_params(text: str, value: object) -> None:
    name, found = assignment(text)
    assert (name, found, type(found)) == ("P", value, type(value))


def test_the_released_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "deepseek_v4", "--against", LISTING]) == 0
    assert "69,187 tensors" in capsys.readouterr().out


def test_against_another_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "names.list").write_text("a.{0..1} F32 2,3\n")
    assert main(["check", "good.map", "--against", "names.list"]) == 0
    assert "names.list: 2 tensors" in capsys.readouterr().out
    (folder / "other.json").write_text('{"layers": 3}')
    assert main(["check", "good.map", "--against", "names.list", "--config", "other.json"]) == 1
    assert "error[C502]: a.2 is missing" in capsys.readouterr().out
    assert main(["check", "good.map", "--against", "names.list", "--param", "L=1"]) == 1
    assert "error[C501]: no rule reads a.1" in capsys.readouterr().out


def test_against_a_checkpoint_of_the_other_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "names.list").write_text("b.{0..1} F32 2,3\n")
    assert main(["check", "good.map", "--against", "names.list", "--param", "L=2"]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("names.list: error[C501]: 2 of its 2 names are those of the native side\nhelp: ")
    assert shown.endswith("\ngood.map: 1 error\n")


def test_against_a_checkpoint_of_another_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "names.list").write_text("c.{0..1} F32 2,3\n")
    (folder / "names.config.json").write_text('{"depth": 2}')
    assert main(["check", "good.map", "--against", "names.list"]) == 1
    assert "help: the config has no such field: is it that of another model?" in capsys.readouterr().out
    assert main(["check", "good.map", "--against", "names.list", "--param", "L=2"]) == 1
    shown = capsys.readouterr().out
    assert "error[C501]: no rule reads c.0, c.1\n" in shown
    assert "error[C502]: a.0, a.1 are missing\n" in shown


def test_against_sizes_that_another_tensor_tells(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "heads.map").write_text("map heads: hf <-> native\na [(h c) d] + b [c d] <-> x [h c d] + y [c d]\n")
    (folder / "names.list").write_text("a F32 12,3\nb F32 4,3\n")
    assert main(["check", "heads.map", "--against", "names.list"]) == 0
    capsys.readouterr()
    (folder / "names.list").write_text("a F32 14,3\nb F32 4,3\n")
    assert main(["check", "heads.map", "--against", "names.list"]) == 1
    assert "error[X305]: a: 14 does not divide by 4: [(h c) d] against [14, 3] with c=4" in capsys.readouterr().out


def test_against_dtypes_that_cannot_be_laid_into_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "stack.map").write_text("map stack: hf <-> native\nindex e < 3\ne.{e} [x y] <-> all [e x y]\n")
    (folder / "renames.map").write_text("map renames: hf <-> native\nindex e < 3\ne.{e} [x y] <-> r.{e} [x y]\n")
    (folder / "names.list").write_text("e.{0,2} BF16 2,3\ne.1 F32 2,3\n")
    assert main(["check", "stack.map", "--against", "names.list"]) == 1
    shown = capsys.readouterr().out
    assert "names.list: error[C504]: e.1 has dtype F32, expected BF16 as in the rest of its group\n" in shown
    assert main(["check", "renames.map", "--against", "names.list"]) == 0


def test_a_name_of_the_checkpoint_cannot_write_to_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "names.list").write_text('a.{0..1} F32 2,3\n"x\\u001b[31m\\n\\"{}\\\\" F32 1\n')
    assert main(["check", "good.map", "--against", "names.list"]) == 1
    shown = capsys.readouterr().out
    assert 'no rule reads x\\x1b[31m\\n"{}\\' in shown
    assert "\x1b" not in shown


# --- what must not be imported -----------------------------------------------------------------------------------

HEAVY = {"torch", "numpy", "jinja2"}


def heavy_modules_of(*words: str) -> set[str]:
    """Those of the heavy modules that a command imports."""
    code = f"import sys; from mapdsl.cli.main import main; main({list(words)!r}); print(*sys.modules, file=sys.stderr)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return HEAVY & set(done.stderr.split())


@pytest.mark.parametrize("words", [["--against", LISTING], ["--config", CONFIG], ["--json"]], ids=" ".join)
def test_check_imports_nothing_heavy(words: list[str]) -> None:
    assert heavy_modules_of("check", "deepseek_v4", *words) == set()


def test_that_an_import_would_be_seen() -> None:
    assert heavy_modules_of("compile", "deepseek_v4", "-o", os.devnull) == {"jinja2"}
