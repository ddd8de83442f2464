"""`mapdsl compile --standalone`: one file that needs torch alone and converts as the ordinary adapter does."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mapdsl.cli.main import main
from mapdsl.emit import standalone
from mapdsl.emit.standalone import standalone_source
from mapdsl.language.source import Source
from mapdsl.map import Map, load
from mapdsl.resources import shipped_maps
from mapdsl.testing import load_suite, run
from tests.helpers.deepseek_v4 import Storage, checkpoint, differences, tiny_config

CASES = sorted((Path(__file__).parent / "cases" / "testing").glob("*.map"))

# Converts a saved state there and back in a process in which mapdsl cannot be imported.
SCRIPT = """
import importlib.abc, sys, torch

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mapdsl", "lark", "jinja2", "safetensors"):
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Refuse())
try:
    import mapdsl
except ImportError as err:
    print("refused:", err)
import standalone
given, made = sys.argv[1:]
config, state = torch.load(given)
adapter = standalone.DeepseekV4Adapter(config)
native = adapter.from_hf(state)
torch.save((native, adapter.to_hf(native, quantization=True)), made)
try:
    adapter.from_hf({**state, "stranger": torch.zeros(1)})
except standalone.ConversionError as err:
    print("error:", err.code)
"""


def test_it_converts_as_the_adapter_does_without_mapdsl(tmp_path: Path) -> None:
    config = tiny_config()
    state = checkpoint(config, Storage(wild=True))
    (tmp_path / "script.py").write_text(SCRIPT)
    module, given, made = (str(tmp_path / name) for name in ("standalone.py", "given.pt", "made.pt"))
    assert main(["compile", "deepseek_v4", "--standalone", "-o", module]) == 0
    torch.save((config, state), given)
    command = [sys.executable, str(tmp_path / "script.py"), given, made]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["refused: mapdsl must not be imported", "error: R603"]
    native, back = torch.load(made)
    ordinary = load("deepseek_v4").adapter(config)
    assert not differences(native, ordinary.from_hf(state))
    assert not differences(back, state)


@pytest.mark.parametrize("path", [*shipped_maps().values(), *CASES], ids=lambda path: path.stem)
def test_it_imports_torch_alone(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(standalone_source(load(path).checked))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported |= {name.partition(".")[0] for name in names}
    assert imported - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("name", ["bloom", "codecs", "fused", "tie", "nested_else"])
def test_it_keeps_the_properties(name: str, tmp_path: Path) -> None:
    path = next(path for path in CASES if path.stem == name)
    module = tmp_path / "adapter.py"
    module.write_text(standalone_source(load(path).checked))
    report = run(load_suite(path, module), examples=5)
    assert not report.failures, report.failures[0].text(str(path))


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check", "--diff")], ids=["check", "format"])
def test_ruff_has_nothing_to_say_of_it(arguments: tuple[str, ...], tmp_path: Path) -> None:
    for path in [*shipped_maps().values(), *CASES]:
        (tmp_path / f"{path.stem}.py").write_text(standalone_source(load(path).checked))
    command = [sys.executable, "-m", "ruff", *arguments, "--isolated", "--no-cache", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_it_tells_its_origin_and_licence() -> None:
    text = standalone_source(load("deepseek_v4").checked, "mapdsl compile --standalone deepseek_v4")
    title = ast.get_docstring(ast.parse(text)) or ""
    assert "Generated from deepseek_v4.map" in title
    assert "run `mapdsl compile --standalone deepseek_v4`" in title
    assert "Apache License 2.0" in title
    assert "# --- mapdsl.runtime.take\n" in text


def test_a_module_stands_behind_those_that_it_needs() -> None:
    text = standalone_source(load("deepseek_v4").checked)
    order = [line.removeprefix("# --- ") for line in text.splitlines() if line.startswith("# --- mapdsl.")]
    for name in order:
        needs = standalone._module(name, standalone._source_of(name)).needs
        assert set(needs) <= set(order[: order.index(name)]), name


def test_text_of_a_map_stays_text() -> None:
    # Text is spelled in code as a string, and in a comment; in neither it ends what it stands in.
    text = """map m: a <-> b
param t = kind ?? "it's '''; import os #{t}"
x.w <-> y.w where t == "it's '''; import os #{t}"
{n:..} <-> {n:..} else
"""
    source = standalone_source(Map(Source('evil"""\n.map', text)).checked)
    scope: dict[str, Any] = {"__name__": __name__}
    exec(source, scope)
    hostile = 'z.{x}"""\n\\'
    made = scope["MAdapter"]({}).from_a({"x.w": torch.zeros(1), hostile: torch.zeros(2)})
    assert list(made) == ["y.w", hostile]


# --- taking modules in ------------------------------------------------------------------------------------------------


def test_inner_imports_and_exports_go() -> None:
    source = (
        '"""A title."""\nfrom __future__ import annotations\nimport re\nfrom typing import TYPE_CHECKING\n'
        "from mapdsl.runtime.names import captures\n\nif TYPE_CHECKING:\n    from mapdsl.runtime.take import Take\n\n\n"
        "def f():\n    from mapdsl.runtime.put import Put\n\n    return Put, captures, re\n\n\n# Names for others.\n"
        '__all__ = ["f"]\n'
    )
    module = standalone._module("m", source)
    assert module.title == "A title."
    assert module.needs == ["mapdsl.runtime.names", "mapdsl.runtime.put"]
    assert module.code == "def f():\n\n    return Put, captures, re"
    assert standalone._import_lines([module]) == ["import re", ""]


@pytest.mark.parametrize(
    "line",
    ["import mapdsl.runtime.take", "from mapdsl.runtime.take import Take as T", "from mapdsl.runtime import take"],
)
def test_imports_that_cannot_be_taken_in_are_refused(line: str) -> None:
    with pytest.raises(AssertionError, match="taken in"):
        list(standalone._in_order(standalone._module("m", line).needs, {}))


def test_one_name_has_one_meaning() -> None:
    one = standalone._module("one", "# How many.\nLIMIT = 3\n\n\ndef f():\n    return 1\n")
    same = standalone._module("same", "LIMIT = 3\nOTHER = 2\n")
    standalone._unite([one, same])
    assert same.code == "OTHER = 2"
    other = standalone._module("other", "def f():\n    return 2\n")
    with pytest.raises(AssertionError, match="f is defined in one and in other"):
        standalone._unite([one, other])
