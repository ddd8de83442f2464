"""What the tests of `convert` share: small checkpoints, ways to spoil them, and folders compared byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mapdsl
from mapdsl.checkpoint.dtypes import dtype_name, stored_shape
from mapdsl.checkpoint.writer import CheckpointWriter
from mapdsl.demo import random_state, small_config
from mapdsl.language.diagnostics import MapError

NAME = "deepseek_v4"
MAP = mapdsl.load(NAME)  # compiled once for all tests

RENAMES = """\
map renames: old <-> new
param N = n
index i < N
{i}.a <-> layer.{i}.a [x y]
top   <-> head
"""


def tiny_config(**changes: Any) -> dict[str, Any]:
    """Two layers, the first with a hash router, the second with compressed attention; two experts."""
    shape = {"num_hidden_layers": 2, "compress_ratios": [0, 4, 0], "n_routed_experts": 2, "vocab_size": 31}
    return small_config(**{**shape, **changes})


def write_state(
    folder: Path, state: Mapping[str, Tensor], config: dict[str, Any] | None = None, *, shard_bytes: int = 10**9
) -> Path:
    entries = [(name, dtype_name(tensor.dtype), stored_shape(tensor)) for name, tensor in state.items()]
    with CheckpointWriter(folder, entries, max_shard_bytes=shard_bytes) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
        if config is not None:
            writer.write_json("config.json", config)
        writer.write_bytes("tokenizer.json", b'{"odd": "\xc3\xa9"}\r\n')
        writer.commit()
    return folder


def write_tiny(folder: Path, experts: str = "fp4", *, shard_bytes: int = 400_000, **changes: Any) -> Path:
    config = tiny_config(**changes)
    return write_state(folder, random_state(config, experts), config, shard_bytes=shard_bytes)


def renames(folder: Path) -> tuple[Path, Path]:
    """A map of names alone, and a checkpoint of its left side."""
    file = folder / "renames.map"
    file.write_text(RENAMES)
    state = {f"{i}.a": torch.randn(3, 4) for i in range(3)} | {"top": torch.arange(5)}
    return file, write_state(folder / "old", state, {"n": 3})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_files(found: Path, expected: Path) -> None:
    mine, theirs = contents(found), contents(expected)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def only(problem: MapError) -> Any:
    """The one diagnostic of an error."""
    assert len(problem.diagnostics) == 1
    return problem.diagnostics[0]
