"""The `mapdsl` command as a whole: help, exit statuses, bad input, terminals and pipes."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mapdsl
from mapdsl.cli import main as entry
from mapdsl.cli.main import COMMANDS, main

ROOT = Path(__file__).parent.parent
GOOD = "map good: hf <-> native\n\nparam L = layers\n\nindex i < L\n\na.{i} [x y] <-> b.{i} [x y]\n"
MEGABYTE = "m" * 1_000_000

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with `good.map` and a config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.map").write_text(GOOD)
    (tmp_path / "config.json").write_text('{"layers": 2}')
    return tmp_path


def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mapdsl", *words]
    settings = {"capture_output": True, "text": True, "env": ENVIRONMENT, "timeout": 120, **options}
    return subprocess.run(command, **settings)  # type: ignore[call-overload, no-any-return]


# --- help, version, commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: mapdsl {command}")
    assert "-h, --help" in shown


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("    ") and line[4] != " "] == list(
        COMMANDS
    )


def test_a_line_for_an_output_is_standard_output(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "good.map"]) == 0
    expected = capsys.readouterr().out
    assert main(["compile", "good.map", "-o", "-"]) == 0
    assert capsys.readouterr().out == expected and not (good / "-").exists()


def test_no_command_module_is_forgotten() -> None:
    modules = {p.stem for p in (ROOT / "mapdsl" / "cli").glob("*.py") if "def add_parser" in p.read_text()}
    assert modules == set(COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mapdsl {mapdsl.__version__}\n"


def test_python_m_mapdsl() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mapdsl {mapdsl.__version__}\n", "")


# --- exit statuses: nobody sees a traceback ----------------------------------------------------------------------

BAD_USAGE = [
    [],
    ["nope"],
    ["check"],
    ["check", "good.map", "--nope"],
    ["check", "good.map", "--\x1b[31m\n"],
    ["check", "good.map", "--conf", "config.json"],
    ["check", "good.map", "--param", "L"],
    ["check", "good.map", "--param", "=1"],
    ["check", "good.map", "--param", "L=[1"],
    ["check", "good.map", "--param", "L=[{}]"],
    ["check", "good.map", "--param", "L=" + "[" * 100_000],
    ["check", "good.map", "--param", "L=1", "--param", "L=2"],
    ["compile"],
    ["compile", "good.map", "-o", "good.map"],
    ["compile", "good.map", "-o", "a.py", "--tests", "a.py"],
    ["compile", "megatron/gpt", "--target", "automodel"],
    ["explain"],
    ["explain", "K999"],
    ["explain", MEGABYTE],
    ["keys", "good.map"],
    ["keys", "good.map", "--config", "config.json", "--side", "megatron"],
    ["laws"],
    ["fmt"],
    ["snapshot"],
    ["snapshot", ".", "-o", "names.txt"],
    ["snapshot", ".", "--with-config"],
    [MEGABYTE],
    ["\x1b[31m\n"],
]


@pytest.mark.parametrize("words", BAD_USAGE, ids=lambda words: " ".join(words)[:60] or "nothing")
def test_bad_usage_is_status_2(words: list[str], good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("usage: mapdsl")
    assert ": error: " in shown.err
    _is_printable(shown.err)
    assert sorted(p.name for p in good.iterdir()) == ["config.json", "good.map"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["chek", "good.map"], "mapdsl: error: there is no command `chek`; did you mean check?"),
        (["zzz"], "mapdsl: error: there is no command `zzz`; commands are check, compile, "),
        (
            ["check", "good.map", "--agianst=x"],
            "check: error: unrecognized arguments: --agianst=x; did you mean --against?",
        ),
        (["maps", "--json"], "usage: mapdsl maps [-h]\nmapdsl maps: error: unrecognized arguments: --json\n"),
    ],
)
def test_words_that_look_like_others(
    words: list[str], expected: str, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert expected in capsys.readouterr().err


def test_a_map_without_its_suffix(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "good"]) == 1
    assert "`good`\nhelp: did you mean good.map?\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["check", "fmt", "compile", "laws"])
@pytest.mark.parametrize("name", ["pipe.map", "pipe"])
def test_a_pipe_is_no_map(command: str, name: str, good: Path) -> None:
    """To open it would be to wait for somebody who writes to it."""
    os.mkfifo(good / name)
    done = run(command, name, cwd=good, timeout=20)
    assert done.returncode == 1
    assert f"{name}: error[N116]: the file cannot be read: expected a regular file" in done.stdout + done.stderr


BAD_INPUT = [
    (["check", "nope.map"], "nope.map: error[N116]"),
    (["check", "nope"], "no shipped map `nope`\nhelp: `mapdsl maps` lists the shipped maps"),
    (["compile", "GPT-OSS"], "help: did you mean gpt_oss?"),
    (["check", "."], "error[N116]"),
    (["check", "folder.map"], "folder.map: error[N116]"),
    (["check", "empty.map"], "empty.map:1:1: error[S101]"),
    (["check", "binary.map"], "binary.map:1:5: error[S101]"),
    (["check", "a\0b"], "error[N116]"),
    (["check", MEGABYTE], "error[N116]"),
    (["check", MEGABYTE + ".map"], "error[N116]"),
    (["check", "mega.map"], "error[S101]"),
    (["check", '\x1b[31m\n"{}\\'], '\\x1b[31m\\n"{}\\'),
    (["check", "good.map", "--config", "nope.json"], "nope.json: error[C507]"),
    (["check", "good.map", "--config", "folder.map"], "error[C507]"),
    (["check", "good.map", "--config", "good.map"], "good.map: error[C507]"),
    (["check", "good.map", "--config", "binary.map"], "error[C507]"),
    (["check", "good.map", "--config", "empty.map"], "error[C507]"),
    (["check", "good.map", "--config", "deep.json"], "nested too deeply"),
    (["check", "good.map", "--config", MEGABYTE], "error[C507]"),
    (["check", "good.map", "--config", "list.json"], "a JSON list, expected an object"),
    (["check", "good.map", "--config", "null.json"], "a JSON null, expected an object"),
    (["check", "good.map", "--param", "Q=1"], "error[N111]: the map has no param `Q`"),
    (["check", "good.map", "--param", f"{MEGABYTE}=1"], "error[N111]"),
    (["check", "good.map", "--param", "L=-1"], "error[C505]"),
    (["check", "good.map", "--param", "L=many"], "error[N118]"),
    (["check", "good.map", "--param", "L=99999999999"], "error[C505]"),
    (["check", "good.map", "--against", "nope"], "nope: error[C507]"),
    (["check", "good.map", "--against", "folder.map"], "error[C507]"),
    (["check", "good.map", "--against", "good.map"], "error[C507]"),
    (["check", "good.map", "--against", "binary.safetensors"], "error[C507]"),
    (["check", "good.map", "--against", MEGABYTE], "error[C507]"),
    (["compile", "nope.map"], "error[N116]"),
    (["compile", "empty.map"], "error[S101]"),
    (["compile", "good.map", "-o", "folder.map"], "folder.map: error[C507]: the file cannot be written"),
    (["compile", "good.map", "-o", "nowhere/a.py"], "nowhere/a.py: error[C507]"),
    (["compile", "good.map", "-o", MEGABYTE], "error[C507]"),
    (["compile", "good.map", "-o", "a\0b"], "error[C507]"),
    (["explain", "good.map", "c.0"], "error[C501]: no rule of this map reads or makes `c.0`"),
    (["explain", "good.map", ""], "error[C501]"),
    (["explain", "good.map", MEGABYTE], "error[C501]"),
    (["explain", "good.map", "a." + "1" * 1_000_000], "error[C501]"),
    (["explain", "good.map", '\x1b[31m"\n{}\\'], '`\\x1b[31m"\\n{}\\`'),
    (["explain", "nope.map", "a.0"], "error[N116]"),
    (["keys", "good.map", "--config", "nope.json"], "error[C507]"),
    (["keys", "good.map", "--config", "bare.json"], "error[N115]"),
    (["laws", "nope.map"], "error[N116]"),
    (["fmt", "nope.map"], "error[N116]"),
    (["fmt", "empty.map"], "error[S101]"),
    (["snapshot", "nope"], "nope: error[C507]"),
    (["snapshot", "binary.safetensors"], "binary.safetensors: error[C507]"),
    (["snapshot", MEGABYTE], "error[C507]"),
]


@pytest.mark.parametrize(
    ("words", "told"), BAD_INPUT, ids=lambda value: (value if isinstance(value, str) else " ".join(value))[:60]
)
def test_bad_input_is_status_1(words: list[str], told: str, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (good / "empty.map").write_text("")
    (good / "binary.map").write_bytes(b"map \xff\x00\x1b")
    (good / "binary.safetensors").write_bytes(b"\xff" * 64)
    (good / "mega.map").write_text(f"map mega: hf <-> native\n\n{MEGABYTE} <-> b\n")
    (good / "deep.json").write_text("[" * 100_000)
    (good / "list.json").write_text("[1]")
    (good / "null.json").write_text("null")
    (good / "bare.json").write_text("{}")
    (good / "folder.map").mkdir()
    before = sorted(p.name for p in good.iterdir())
    assert main(words) == 1
    shown = capsys.readouterr()
    assert told in shown.out + shown.err
    _is_printable(shown.out + shown.err)
    assert len(shown.out + shown.err) < 4000
    assert sorted(p.name for p in good.iterdir()) == before


def _is_printable(text: str) -> None:
    assert all(c.isprintable() for c in text.replace("\n", ""))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (good / "good.map").chmod(0)
    assert main(["check", "good.map"]) == 1
    assert "error[N116]: the file cannot be read: Permission denied" in capsys.readouterr().out


def test_a_file_that_fails_while_it_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    # Opens like any file, and reading fails: what a bad disk does.
    assert main(["check", "/proc/self/mem"]) == 1
    assert "/proc/self/mem: error[N116]: the file cannot be read" in capsys.readouterr().out


def test_a_defect_is_not_swallowed(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: object) -> int:
        raise ValueError("a defect")

    monkeypatch.setattr("mapdsl.cli.maps.run", broken)
    with pytest.raises(ValueError, match="a defect"):
        main(["maps"])


def test_errors_of_the_runtime_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(arguments: object) -> int:
        raise mapdsl.ConversionError("R605", "norm.weight\x1b is missing")

    monkeypatch.setattr("mapdsl.cli.maps.run", failing)
    assert main(["maps"]) == 1
    assert capsys.readouterr().err == "error[R605]: norm.weight\\x1b is missing\n"


# --- pipes, signals, terminals -----------------------------------------------------------------------------------


def test_a_reader_that_leaves_early(good: Path) -> None:
    (good / "config.json").write_text('{"layers": 90000}')
    command = [sys.executable, "-m", "mapdsl", "keys", "good.map", "--config", "config.json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"a.0 ? ?,?\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == entry.BROKEN_PIPE


def test_a_full_disk(good: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run("check", "good.map", stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert done.returncode == 1
    assert done.stderr == "standard output: error[C507]: the file cannot be written: No space left on device\n"


def test_a_closed_standard_output(good: Path) -> None:
    words = f"{sys.executable} -m mapdsl check good.map >&-"
    done = subprocess.run(["sh", "-c", words], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_control_c(good: Path) -> None:
    command = [sys.executable, "-u", "-m", "mapdsl", "demo", "--keep", "kept"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, cwd=good
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while not process.stdout.readline().startswith(b"4. mapdsl convert"):
            pass
        process.send_signal(signal.SIGINT)
        assert b"Every byte" not in process.stdout.read()
        assert process.stderr.read() == b"interrupted: mapdsl demo did not come to its end\n"
        assert process.wait(60) == 130
    assert [path.name for path in (good / "kept").iterdir()] == ["released"]


def test_names_that_the_terminal_cannot_show(good: Path) -> None:
    (good / "good.map").write_text("map good: hf <-> native\n\né <-> ü\n", encoding="utf-8")
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = run("explain", "good.map", "é", env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("\\xe9\n")


def on_a_terminal(folder: Path, *words: str, **environment: str) -> str:
    """What a command prints to a terminal."""
    ours, theirs = pty.openpty()
    full = {k: v for k, v in ENVIRONMENT.items() if k not in ("NO_COLOR", "TERM")} | {"TERM": "xterm"} | environment
    command = [sys.executable, "-m", "mapdsl", *words]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=full, cwd=folder) as process:
        os.close(theirs)
        pieces = []
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not piece:
                break
            pieces.append(piece)
        process.wait(60)
    os.close(ours)
    return b"".join(pieces).decode()


def test_colours_on_a_terminal_only(good: Path) -> None:
    (good / "bad.map").write_text("map bad: hf <-> native\n\nq [\n")
    assert "\x1b[1;31merror[S102]\x1b[0m" in on_a_terminal(good, "check", "bad.map")
    assert "\x1b" not in on_a_terminal(good, "check", "bad.map", NO_COLOR="1")
    assert "\x1b" not in on_a_terminal(good, "check", "bad.map", TERM="dumb")
    assert "\x1b" not in run("check", "bad.map", cwd=good).stdout


def test_no_colours_from_outside(good: Path) -> None:
    shown = on_a_terminal(good, "explain", "good.map", "\x1b[31mred\x1b]0;title\x07")
    assert "\\x1b[31mred\\x1b]0;title\\x07" in shown
    assert "\x1b[31m" not in shown.replace("\x1b[1;31m", "")
