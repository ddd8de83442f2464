"""An installed wheel works by itself, far from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel of this checkout was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, ROOT], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True, cwd=folder)
    return folder / "site"


def run(site: Path, *arguments: str) -> str:
    """What the installed command prints."""
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(site / "bin" / "mapdsl"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=site.parent, check=True)
    return done.stdout


def test_the_wheel_holds_grammar_templates_and_maps(installed: Path) -> None:
    data = installed / "mapdsl" / "_data"
    assert (data / "grammars" / "map.lark").is_file()
    assert (data / "rules" / "deepseek_v4.map").is_file()
    assert (data / "rules" / "megatron" / "loader.map").is_file()
    assert list((data / "codegen").glob("*.jinja"))
    assert (installed / "mapdsl" / "py.typed").is_file()


def test_the_installed_command_checks_compiles_and_explains(installed: Path) -> None:
    assert "deepseek_v4" in run(installed, "maps")
    assert "rules hold" in run(installed, "check", "deepseek_v4")
    assert "class DeepseekV4Adapter" in run(installed, "compile", "deepseek_v4")
    assert "K202" in run(installed, "explain", "K202")


def test_the_installed_loader_finds_its_map(installed: Path, tmp_path: Path) -> None:
    code = """
import torch
from mapdsl.deepspeed import SDLoaderFactory
torch.save({"module": {"mlp.dense_h_to_4h.bias": torch.arange(4)}}, "a.pt")
print(SDLoaderFactory.get_sd_loader(["a.pt"]).load(2, 1)[1]["module"]["mlp.dense_h_to_4h.bias"].tolist())
"""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "[2, 3]"


def test_the_installed_command_is_the_one_that_runs(installed: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    code = "import mapdsl; print(mapdsl.__file__)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=installed)
    assert done.stdout.strip() == str(installed / "mapdsl" / "__init__.py")
