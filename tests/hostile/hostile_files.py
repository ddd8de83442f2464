"""Builders of broken and hostile files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mapdsl.language.diagnostics import MapError


def entry(dtype: str = "U8", shape: Any = (1,), offsets: Any = (0, 1)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def with_length(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file around any header text."""
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def safetensors(header: Any, data: bytes = b"") -> bytes:
    return with_length(json.dumps(header).encode(), data)


def write_shard(path: Path, *names: str) -> None:
    """A sound file with one byte per tensor."""
    header = {name: entry(offsets=(n, n + 1)) for n, name in enumerate(names)}
    path.write_bytes(safetensors(header, bytes(len(names))))


def write_index(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> Path:
    path = folder / name
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def messages(problem: MapError) -> list[str]:
    return [f"{d.code} {d.message}" for d in problem.diagnostics]
