"""What docs/automodel.md and docs/maps.md say of NeMo Automodel, as installed."""

from __future__ import annotations

import ast
import importlib.util
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from tests.test_docs_maps import PAGE, ROOT, rows

pytestmark = pytest.mark.heavy

NOT_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
FOLDERS = {"ernie4_5_moe": "ernie4_5"}  # of a family whose map is called otherwise


def test_the_example_holds(tmp_path: Path) -> None:
    adapter, source = tmp_path / "tiny_adapter.py", ROOT / "docs/examples/tiny.map"
    command = [sys.executable, "-m", "mapdsl", "compile", str(source), "--target", "automodel", "-o", str(adapter)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    subprocess.run(command, env=environment, check=True, timeout=300)
    example = [sys.executable, str(ROOT / "docs/examples/automodel.py")]
    done = subprocess.run(example, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout == "loaded twice\n", done.stderr[-3000:]


def size(path: Path) -> tuple[int, int]:
    """The lines of a module, and those that are code: no blank lines, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            code -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return text.count("\n"), len(code)


def test_sizes_of_automodels_adapters_are_those_of_the_files() -> None:
    found = importlib.util.find_spec("nemo_automodel")
    assert found is not None and found.origin is not None
    components = Path(found.origin).parent / "components"
    shown = {
        name: tuple(map(int, re.findall(r"\d+", cell)[:2]))
        for name, (_, cell) in rows("Size").items()
        if cell[0].isdigit()
    }
    assert len(shown) == 12
    file = "state_dict_adapter.py"
    assert shown == {name: size(components / "models" / FOLDERS.get(name, name) / file) for name in shown}
    for module in ("moe/state_dict_mixin.py", "moe/state_dict_utils.py"):
        lines, code = size(components / module)
        assert f"`{Path(module).name}` ({lines} | {code})" in PAGE
    assert "120 \\| 53 of" in PAGE
    assert size(components / "models/common/gated_delta_net_fp32.py") == (120, 53)
