"""What tests by execution share: cases read from files, maps of a text, tensors that are their own provenance."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mapdsl.language.source import Source
from mapdsl.map import Map
from mapdsl.runtime.errors import ConversionError
from tests.helpers.drawing import draw
from tests.helpers.elements import LEFT, RIGHT, State
from tests.helpers.reference import Reference

CASES = Path(__file__).parent.parent / "cases" / "execute"


@dataclass(frozen=True)
class Case:
    """A map and what to run it with: configs, params, sizes of free axes, names that wildcards carry."""

    name: str
    text: str
    runs: tuple[dict[str, Any], ...]

    @property
    def path(self) -> Path:
        return CASES / f"{self.name}.map"

    def map(self) -> Map:
        return Map(Source(str(self.path), self.text))


def read_case(path: Path) -> Case:
    """A case file: a map, `---`, and one JSON object a line: `{"config": {...}, "free": {...}}`."""
    text, _, runs = path.read_text(encoding="utf-8").partition("\n---\n")
    return Case(path.stem, text + "\n", tuple(json.loads(line) for line in runs.splitlines() if line.strip()))


def all_cases() -> list[Case]:
    return [read_case(path) for path in sorted(CASES.glob("*.case"))]


def map_of(text: str, path: str = "test.map") -> Map:
    """A map of a text; a header is put before it if it has none."""
    return Map(Source(path, text if text.startswith("map ") else f"map m: hf <-> native\n{text}"))


def refused(text: str, config: dict[str, Any], left: dict[str, Any] | None = None, right: Any = None, **params: Any):
    """The error of reading `left`, or writing `right`, or of making the adapter."""
    with pytest.raises(ConversionError) as caught:
        adapter = map_of(text).adapter(config, **params)
        if left is not None:
            adapter.read(left)
        if right is not None:
            adapter.write(right)
    assert "\n" not in caught.value.message
    return caught.value


def provenance() -> Callable[[list[int]], Tensor]:
    """A maker of int64 tensors in which no two elements, of any tensor it makes, are the same."""
    counter = itertools.count(1)

    def fill(shape: list[int]) -> Tensor:
        count = int(torch.tensor(shape).prod()) if shape else 1
        return torch.tensor(list(itertools.islice(counter, count)), dtype=torch.int64).reshape(shape)

    return fill


def drawn(reference: Reference, side: int, run: Mapping[str, Any]) -> State:
    """A state of one side for a run, with the names that its wildcards carry; constants are made as they are."""
    fill = provenance()
    answers = run.get("found", {})
    reference._answer({}, answers)
    state = draw(reference, side, run.get("free", {}), fill)
    extra = run.get("extra", {}).get("left" if side == LEFT else "right", {})
    return state | {name: fill(shape) for name, shape in extra.items()}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """The same names, shapes, dtypes and bytes."""
    assert set(found) == set(expected), f"{what}: names differ: {sorted(set(found) ^ set(expected))}"
    for name, tensor in expected.items():
        one = found[name]
        assert one.shape == tensor.shape and one.dtype == tensor.dtype, (
            f"{what}: {name} is {list(one.shape)} {one.dtype}, expected {list(tensor.shape)} {tensor.dtype}"
        )
        assert one.is_contiguous() or one.is_meta, f"{what}: {name} is no tensor of its own memory"
        if not one.is_meta:
            bytes_ = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, tensor)]
            assert torch.equal(*bytes_), f"{what}: {name} differs:\n{one}\nexpected\n{tensor}"


def on_meta(state: Mapping[str, Tensor]) -> State:
    return {name: tensor.to("meta") for name, tensor in state.items()}


__all__ = [
    "CASES",
    "LEFT",
    "RIGHT",
    "Case",
    "all_cases",
    "assert_same",
    "drawn",
    "map_of",
    "on_meta",
    "provenance",
    "refused",
]
