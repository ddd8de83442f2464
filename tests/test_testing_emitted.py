"""`mapdsl compile --tests`: a readable test file that runs the properties of one map, and fails for a wrong adapter."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mapdsl.cli.main import main
from mapdsl.emit.tests import tests_source as source_of
from mapdsl.language.source import Source
from mapdsl.map import Map, load
from mapdsl.resources import shipped_maps
from mapdsl.testing import PROPERTIES, load_suite, properties_for

CASES = Path(__file__).parent / "cases" / "testing"


def pytest_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_the_tests_of_deepseek_v4_pass(tmp_path: Path) -> None:
    adapter, tests = tmp_path / "deepseek_v4_adapter.py", tmp_path / "test_deepseek_v4.py"
    assert main(["compile", "deepseek_v4", "-o", str(adapter), "--tests", str(tests)]) == 0
    assert 'load_suite("deepseek_v4", HERE / "deepseek_v4_adapter.py")' in tests.read_text()
    # All of it takes a minute; `mapdsl test` runs the other properties on this map.
    done = pytest_run(tmp_path, tests.name, "-k", "placed or there_and_back")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 passed" in done.stdout


def test_the_tests_of_a_map_file_pass(tmp_path: Path) -> None:
    shutil.copy(CASES / "lists.map", tmp_path / "lists.map")
    (tmp_path / "tests").mkdir()
    tests = tmp_path / "tests" / "test_lists.py"
    assert main(["compile", str(tmp_path / "lists.map"), "-o", str(tmp_path / "a.py"), "--tests", str(tests)]) == 0
    assert 'load_suite(HERE / "../lists.map", HERE / "../a.py")' in tests.read_text()
    done = pytest_run(tmp_path, "tests")
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{len(properties_for(load_suite(CASES / 'lists.map')))} passed" in done.stdout


def test_a_wrong_adapter_fails_them(tmp_path: Path) -> None:
    text = (CASES / "gpt2.map").read_text()
    (tmp_path / "gpt2.map").write_text(text)
    (tmp_path / "wrong.map").write_text(text.replace("[d (j h c)]", "[d (h j c)]"))
    tests = tmp_path / "test_gpt2.py"
    assert main(["compile", str(tmp_path / "wrong.map"), "-o", str(tmp_path / "adapter.py")]) == 0
    tests.write_text(source_of(load(tmp_path / "gpt2.map").checked, tests, tmp_path / "adapter.py"))
    done = pytest_run(tmp_path, tests.name, "-k", "placed or there_and_back")
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout
    assert "the first difference is at" in done.stdout


def test_the_standalone_adapter_passes_them(tmp_path: Path) -> None:
    arguments = ["-o", str(tmp_path / "a.py"), "--standalone", "--tests", str(tmp_path / "test_qkv.py")]
    assert main(["compile", str(CASES / "qkv.map"), *arguments]) == 0
    done = pytest_run(tmp_path, "test_qkv.py")
    assert done.returncode == 0, done.stdout[-3000:]


def test_without_an_adapter_the_map_is_compiled() -> None:
    text = source_of(load("deepseek_v4").checked, "tests/test_it.py")
    assert 'SUITE = load_suite("deepseek_v4")\n' in text
    assert "HERE" not in text


@pytest.mark.parametrize("path", ["deepseek_v4", CASES / "ranks.map"])
def test_every_property_has_its_test(path: str | Path) -> None:
    tree = ast.parse(source_of(load(path).checked))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    found = [name.removeprefix("test_") for name in names if name.startswith("test_")]
    assert found == properties_for(load_suite(path))
    assert (set(found) == set(PROPERTIES)) == (path != "deepseek_v4")


def test_the_tests_of_a_map_with_ranks(tmp_path: Path) -> None:
    """They pass; and where the adapter cuts in another way than the map says, they fail."""
    text = (CASES / "ranks_codecs.map").read_text()
    (tmp_path / "good.map").write_text(text)
    (tmp_path / "wrong.map").write_text(text.replace("mesh ep shards e", "mesh ep shards e by ceil"))
    tests = tmp_path / "test_ranks.py"
    for adapter, verdict in (("good", "2 passed"), ("wrong", "1 failed, 1 passed")):
        assert main(["compile", str(tmp_path / f"{adapter}.map"), "-o", str(tmp_path / f"{adapter}.py")]) == 0
        tests.write_text(source_of(load(tmp_path / "good.map").checked, tests, tmp_path / f"{adapter}.py"))
        done = pytest_run(tmp_path, tests.name, "-k", "cuts_refused or placed")
        assert verdict in done.stdout, done.stdout[-3000:]


def test_configs_are_spelled_out() -> None:
    text = source_of(load(CASES / "nested.map").checked)
    assert '"text_config.hidden_size": st.sampled_from([2, 3, 5, 7]),' in text
    assert '"text_config.num_layers": st.one_of(st.none(), st.integers(0, 4)),' in text
    assert '"model.type": st.one_of(st.none(), st.sampled_from(["plain", "other"])),' in text


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check", "--diff")], ids=["check", "format"])
def test_ruff_has_nothing_to_say_of_them(arguments: tuple[str, ...], tmp_path: Path) -> None:
    for path in [*shipped_maps().values(), *sorted(CASES.glob("*.map"))]:
        (tmp_path / f"test_{path.stem}.py").write_text(source_of(load(path).checked, tmp_path / "x.py"))
    command = [sys.executable, "-m", "ruff", *arguments, "--isolated", "--no-cache", str(tmp_path)]
    # Elsewhere than in this repository: there mapdsl is installed, not the project's own.
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_text_of_a_map_stays_text(tmp_path: Path) -> None:
    words = "it's '''; import os #{t}"
    source = Source(
        str(tmp_path / 'evil"""\n\\.map'), f'map m: a <-> b\nparam t = kind\nx <-> y where t == "{words}"\n'
    )
    text = source_of(Map(source).checked, tmp_path / "test_m.py")
    literals = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    assert words in literals
    assert 'evil"""\n\\.map' in literals


def test_another_maps_adapter_is_refused(tmp_path: Path) -> None:
    tests = tmp_path / "test_qkv.py"
    assert main(["compile", str(CASES / "gpt2.map"), "-o", str(tmp_path / "gpt2.py")]) == 0
    tests.write_text(source_of(load(CASES / "qkv.map").checked, tests, tmp_path / "gpt2.py"))
    done = pytest_run(tmp_path, tests.name)
    assert "it is compiled from another map" in done.stdout
    tests.write_text(source_of(load(CASES / "qkv.map").checked, tests, tmp_path / "nowhere.py"))
    done = pytest_run(tmp_path, tests.name)
    assert "there is no adapter module" in done.stdout
