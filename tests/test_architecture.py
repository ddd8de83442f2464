"""The house keeps its shape: imports go one way, files stay short, light commands stay light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mapdsl"

# What each part may import of mapdsl. What of the runtime knows no torch, header checks may use.
ALLOWED = {
    "language": {"language", "resources"},
    "compiler": {
        "language",
        "compiler",
        "resources",
        "runtime.sizes",
        "runtime.shares",
        "runtime.part_shares",
        "runtime.place",
        "runtime.codecs.likeness",
        "runtime.codecs.storage",
        "runtime.codecs.integer_storage",
    },
    "emit": {
        "language",
        "compiler",
        "emit",
        "resources",
        "runtime.sizes",
        "runtime.shares",
        "runtime.codecs.storage",
        "runtime.codecs.integer_storage",
    },
    "runtime": {"runtime"},
    "checkpoint": {"language", "compiler", "emit", "checkpoint", "runtime", "map", "resources"},
    "deepspeed": {"checkpoint", "deepspeed", "map", "runtime"},
    "testing": {"language", "compiler", "emit", "checkpoint", "runtime", "testing", "map", "resources"},
    "explain": {"language", "compiler", "checkpoint", "explain", "map", "resources", "runtime.sizes"},
}


def imports(path: Path) -> set[str]:
    """Modules of mapdsl that a file imports, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.removeprefix("mapdsl.") for name in names if name and name.startswith("mapdsl.")}
    return found


def forbidden(part: str, modules: set[str]) -> set[str]:
    """Those of the modules that a part may not import."""
    return {m for m in modules if not any(m == a or m.startswith(f"{a}.") for a in ALLOWED[part])}


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_go_one_way(part: str) -> None:
    wrong = {p.name: bad for p in (PACKAGE / part).rglob("*.py") if (bad := forbidden(part, imports(p)))}
    assert not wrong


def test_the_import_test_can_fail() -> None:
    assert forbidden("runtime", {"compiler.ir", "runtime.take"}) == {"compiler.ir"}
    assert forbidden("compiler", {"runtime.take"}) == {"runtime.take"}


def test_files_stay_short() -> None:
    files = [p for folder in ("mapdsl", "grammars", "codegen") for p in (ROOT / folder).rglob("*.*")]
    long = {p.name: n for p in files if p.suffix in (".py", ".lark") and (n := len(p.read_text().splitlines())) > 400}
    assert not long


def loaded_by(*arguments: str) -> set[str]:
    """The modules that a command of mapdsl leaves in `sys.modules`."""
    code = "import sys, mapdsl.cli.main as m\ntry: m.main(sys.argv[1:])\nexcept SystemExit: pass\nprint(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(run.stdout.splitlines()[-1].split())


HEAVY = {"torch", "numpy", "jinja2", "tqdm", "safetensors"}
LISTING = "tests/data/listings/deepseek_v4_flash.list"
LIGHT = [
    ("check", "deepseek_v4"),
    ("check", "deepseek_v4", "--against", LISTING),
    ("fmt", "--check", "rules/deepseek_v4.map"),
    ("explain", "K202"),
    ("explain", "deepseek_v4", "embed.weight"),
    ("laws", "deepseek_v4"),
    ("maps",),
]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_commands_import_nothing_heavy(arguments: tuple[str, ...]) -> None:
    assert not loaded_by(*arguments) & HEAVY


def test_the_light_test_can_fail() -> None:
    assert "jinja2" in loaded_by("compile", "deepseek_v4", "-o", os.devnull) & HEAVY
