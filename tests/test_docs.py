"""Documentation that runs: every map in it is checked, every command in it gives the output shown."""

from __future__ import annotations

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
