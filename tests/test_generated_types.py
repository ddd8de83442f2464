"""Generated modules as type checkers see them: nothing to say, however strict."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import mapdsl
from mapdsl.emit.standalone import standalone_source
from mapdsl.language.source import Source
from mapdsl.map import Map
from tests.helpers.execution import all_cases

# One name for things of several types: spellings, positions, sizes and wildcards; names and tensors; dicts by one axis
# and by two; several narrower wildcards.
CLASHES = """\
map clashes: hf <-> native
param L = layers
param F = f
index i < L
index e < 2
mlp.{j:gate|up}.w [F d] <-> mlp.{j}.w
e.{j:gate|up}.w [F d] <-> w13 [(j F) d]
k.{d:*}.w <-> m.{d:*}.w
s.{i}.{e}.w [F d] <-> s.w [i e d F]
t.{i}.w [F d] <-> t.w [d i F]
u.w [d i F] <-> u.{i}.w [F d]
a.{..} <-> b.{..} else
a.x.{..} <-> b.x.{..} else
a.x_y.{..} <-> b.x_y.{..} else
c.{..} <-> d.{..} else
c.x.{..} <-> d.x.{..} else
"""


def test_mypy_has_nothing_to_say_of_generated_modules(tmp_path: Path) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    clashes = Map(Source("clashes.map", CLASHES))
    deepseek = mapdsl.load("deepseek_v4")
    texts = {f"case_{case.name}": case.map().compile() for case in all_cases()}
    texts |= {"clashes": clashes.compile(), "deepseek_v4": deepseek.compile()}
    texts |= {f"{m.checked.map.name}_alone": standalone_source(m.checked) for m in (clashes, deepseek)}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    (tmp_path / "mypy.ini").write_text("[mypy]\n")
    root = str(Path(mapdsl.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", "mypy.ini", *(f"{name}.py" for name in texts)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"MYPYPATH": root, "PATH": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
