"""Documentation that runs: every map in it is checked, every command in it gives the output shown."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mapdsl.compiler.check import check
from mapdsl.language.diagnostics import MapError
from mapdsl.language.source import Source
from mapdsl.language.syntax import parse

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.M | re.S)
DEFINITION = re.compile(r"^def (test_\w+)", re.M)


def blocks(language: str) -> list[tuple[str, str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 1
                found.append((f"{page.relative_to(ROOT)}:{line}", match[2].strip(), match[3]))
    return found


@pytest.mark.parametrize(("place", "code", "text"), blocks("map"), ids=lambda value: str(value)[:40])
def test_maps_shown_are_checked(place: str, code: str, text: str) -> None:
    """A block without a code holds; one with a code has exactly that error."""
    try:
        check(parse(Source(place, text)))
        found = set()
    except MapError as err:
        found = {d.code for d in err.diagnostics if d.severity == "error"}
    assert found == ({code} if code else set()), place


@pytest.mark.parametrize(("place", "info", "text"), blocks("console"), ids=lambda value: str(value)[:40])
def test_commands_shown_give_the_output_shown(place: str, info: str, text: str, tmp_path: Path) -> None:
    """`$ command` lines run in one empty folder with the repository's `rules` beside; `...` stands for any text."""
    del info
    for name in ("docs", "rules", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NO_COLOR": "1"}
    steps = re.split(r"^\$ ", text, flags=re.M)[1:]
    assert steps, f"{place}: no command"
    for step in steps:
        command, _, expected = step.partition("\n")
        words = shlex.split(command)
        run = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        output = (run.stdout + run.stderr).rstrip("\n")
        pattern = ".*".join(map(re.escape, expected.rstrip("\n").split("...")))
        assert re.fullmatch(pattern, output, re.S), f"{place}: {command}\n{output}"


@pytest.mark.parametrize(("place", "file", "text"), blocks("python"), ids=lambda value: str(value)[:40])
def test_python_shown_is_python_and_the_file_that_is_named(place: str, file: str, text: str) -> None:
    """A block that names a file has its text; such a file is run by a command on the page, or by a test."""
    ast.parse(text)
    assert not file or text == (ROOT / file).read_text(encoding="utf-8"), place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_are_there(page: Path) -> None:
    """A name that ends in `...` is the beginning of one."""
    named = re.findall(r"`(test_\w+(?:\.\.\.|\*?\.py)?)`", page.read_text(encoding="utf-8"))
    files = {file.name for file in (ROOT / "tests").rglob("test_*.py")}
    known = {name for file in (ROOT / "tests").rglob("test_*.py") for name in DEFINITION.findall(file.read_text())}
    missing = [
        name
        for name in named
        if name not in known | files and not any(one.startswith(name.rstrip(".")) for one in known if "..." in name)
    ]
    assert missing == []
