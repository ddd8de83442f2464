"""Runs the examples of the pages behind `mapdsl explain K202`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import mapdsl
from mapdsl.checkpoint.against import check_against
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.dtypes import torch_dtype
from mapdsl.checkpoint.listing import read_listing
from mapdsl.compiler.expand import expand, param_values
from mapdsl.compiler.sharding import Sharding
from mapdsl.explain.pages import Block


def codes_of(blocks: Iterable[Block], folder: Path) -> set[str]:
    """The codes of everything that is found in an example, laid out in an empty folder."""
    found: set[str] = set()
    try:
        _run(list(blocks), folder, found)
    except mapdsl.MapError as problem:
        found |= {diagnostic.code for diagnostic in problem.diagnostics}
    except mapdsl.ConversionError as problem:
        found.add(problem.code)
    return found


def _run(blocks: list[Block], folder: Path, found: set[str]) -> None:
    for block in blocks:
        if block.kind == "map":
            (folder / (block.argument or "example.map")).write_text(block.text, encoding="utf-8")
    config: dict[str, Any] | None = next((json.loads(b.text) for b in blocks if b.kind == "config"), None)
    loaded = mapdsl.load(folder / "example.map")
    found |= {diagnostic.code for diagnostic in loaded.check()}
    checked = loaded.checked
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
        expansion = expand(checked, param_values(checked, config, {}))
        expansion.keys("left")
        expansion.keys("right")
    adapter = None
    for block in blocks:
        if block.kind == "listing":
            (folder / "example.list").write_text(block.text)
            diagnostics, _ = check_against(checked, open_checkpoint(folder / "example.list"))
            found |= {diagnostic.code for diagnostic in diagnostics}
        elif block.kind == "ranks":
            counts = (line.split(" = ") for line in block.text.splitlines())
            sharding = Sharding(
                expand(checked, param_values(checked, config, {})), {name: int(count) for name, count in counts}
            )
            found |= {diagnostic.code for diagnostic in sharding.problems()}
        elif block.kind == "python":
            with _inside(folder):
                exec(block.text, {})
        elif block.kind in ("read", "write"):
            adapter = adapter or loaded.adapter(config)
            state = _state(block.text, folder)
            if block.kind == "read":
                adapter.read(state)
            else:
                adapter.write(state, quantization=block.argument == "quantized")


def _state(text: str, folder: Path) -> dict[str, torch.Tensor]:
    """`NAME DTYPE SIZES = VALUE`, a line; names may fold ranges as listings do."""
    state = {}
    for line in text.splitlines():
        header, _, value = line.partition(" = ")
        (folder / "line.list").write_text(header + "\n")
        for name, stored in read_listing(folder / "line.list").items():
            tensor = torch.full(stored.shape, float(value or 0), dtype=torch.float32)
            state[name] = tensor.to(torch_dtype(stored.dtype))
    return state


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
