"""The adapter that the shipped DeepSeek-V4 map compiles to, kept so that every change of it is seen.

After a change that is meant: `python -m tests.test_golden`, then read the difference.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mapdsl

GOLDEN = Path(__file__).parent / "golden" / "deepseek_v4_adapter.py"


def test_the_compiled_adapter_is_the_one_kept() -> None:
    found, kept = mapdsl.load("deepseek_v4").compile(), GOLDEN.read_text(encoding="utf-8")
    assert found == kept, "the adapter changed; if that is meant: python -m tests.test_golden"


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check", "--diff")], ids=["check", "format"])
def test_ruff_has_nothing_to_say_of_it(arguments: tuple[str, ...]) -> None:
    ruff = shutil.which("ruff") or str(Path(sys.executable).parent / "ruff")
    run = subprocess.run([ruff, *arguments, "--isolated", str(GOLDEN)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_comparison_counts_right() -> None:
    """The lines that `docs/comparison.md` sets against those of the hand-written adapter."""
    root = Path(__file__).parent.parent
    page = (root / "docs" / "comparison.md").read_text(encoding="utf-8")
    text = (root / "rules" / "deepseek_v4.map").read_text(encoding="utf-8").splitlines()
    code = [line for line in text if line.strip() and not line.strip().startswith("#")]
    assert f"`deepseek_v4.map`: {len(text)} lines, {len(code)} of them code" in page
    assert f"{len(GOLDEN.read_text(encoding='utf-8').splitlines())} generated lines" in page


if __name__ == "__main__":
    GOLDEN.write_text(mapdsl.load("deepseek_v4").compile(), encoding="utf-8")
