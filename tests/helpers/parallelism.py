"""The table of layouts in docs/parallelism.md: its rows, their maps, and how a line is held against another opinion."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mapdsl.map import Map
from tests.helpers.elements import LEFT
from tests.helpers.execution import assert_same, drawn, map_of
from tests.helpers.reference import Reference

State = dict[str, Tensor]
Ranks = dict[str, int]
# What one rank holds of the right side, of the whole left one: by the state, all ranks, and this rank.
ShareOf = Callable[[State, Ranks, Ranks], State]

PAGE = Path(__file__).parent.parent.parent / "docs" / "parallelism.md"
SECTION = "\n## Every layout, one line\n"
PEERS_WRONG = "Where the peers go wrong"
# What the config says, by the params of the page's declarations, and the sizes of free axes. The size of a head is no
# other's, nor a number of a shape: axes that change places are seen.
CONFIG = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 5,
    "vocab_size": 12,
    "num_experts": 4,
    "num_hidden_layers": 8,
    "virtual_stages": 2,
    "ranks_written": 2,
}
FREE = {"d": 7, "f": 8, "s": 2, "x": 3}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    section: str
    layout: str
    meshes: tuple[str, ...]
    line: str
    test: str

    @property
    def map(self) -> Map:
        return self._map_of(self.line)

    def _map_of(self, line: str) -> Map:
        meshes = "".join(f"mesh {mesh}\n" for mesh in self.meshes)
        return map_of(f"{declarations()}{meshes}{line}\n")

    def opened(self, **sizes: int) -> Opened:
        """The row with an adapter and a state; `sizes` are of free axes and of fields of the config."""
        config = CONFIG | {name: size for name, size in sizes.items() if name in CONFIG}
        free = FREE | {name: size for name, size in sizes.items() if name in FREE}
        # The left has a tensor whichever rank holds it, and the reference interpreter knows of no ranks.
        whole = self._map_of(self.line.partition(" where rank(")[0])
        left = drawn(Reference(whole.checked, config), LEFT, {"free": free})
        return Opened(self, self.map.adapter(config), {n: t.to(torch.float32) for n, t in left.items()}, config | free)


@dataclass(frozen=True)
class Opened:
    """A row under one config: its adapter, a whole state of the left, and all sizes."""

    row: Row
    adapter: Any
    left: State
    sizes: Mapping[str, int]

    @property
    def right(self) -> State:
        return dict(self.adapter.from_hf(self.left))

    def agree(self, share_of: ShareOf, *all_ranks: Ranks) -> None:
        """Each rank holds what `share_of` says, cut or converted, and what it says merges to the whole."""
        right = self.right
        for ranks in all_ranks:
            said = [share_of(self.left, ranks, place) for place in places(ranks)]
            for place, expected in zip(places(ranks), said, strict=True):
                what = f"{self.row.line}, rank {place} of {ranks}"
                expected = {name: tensor.contiguous() for name, tensor in expected.items()}
                assert_same(self.adapter.shard(right, ranks, place), expected, what)
                mine = self.adapter.shard(self.left, ranks, place, side="hf")
                assert_same(self.adapter.at(ranks, place).from_hf(mine), expected, what)
            assert_same(self.adapter.merge(said, ranks), right, f"{self.row.line}, merged from {ranks}")

    def one(self) -> Tensor:
        """The whole of the only tensor of the right."""
        (tensor,) = self.right.values()
        return tensor


def places(ranks: Ranks) -> Iterator[Ranks]:
    """The ranks, the last mesh the fastest."""
    for numbers in itertools.product(*(range(count) for count in ranks.values())):
        yield dict(zip(ranks, numbers, strict=True))


def over(mesh: str, *counts: int) -> list[Ranks]:
    return [{mesh: count} for count in counts]


# --- the page ---


def section() -> str:
    text = PAGE.read_text(encoding="utf-8").partition(SECTION)[2]
    assert text, f"{PAGE} has no section{SECTION}"
    return re.split(r"^## ", text, maxsplit=1, flags=re.M)[0]


def declarations() -> str:
    """The block of declarations above the tables."""
    found = re.search(r"^```map\n(.*?)^```$", section(), re.M | re.S)
    assert found, "no declarations"
    return found[1]


def cells(table: str) -> Iterator[list[str]]:
    """The cells of a table's rows, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    for line in lines[2:]:
        yield [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def parts() -> dict[str, str]:
    """What stands below each `### heading`."""
    _, *rest = re.split(r"^### (.*)$", section(), flags=re.M)
    return dict(zip(rest[::2], rest[1::2], strict=True))


def rows() -> list[Row]:
    """Every row that has a line."""
    found = []
    for heading, text in parts().items():
        for layout, meshes, line, test in cells(text) if heading != PEERS_WRONG else ():
            if line.startswith("`"):
                found.append(Row(heading, layout, tuple(coded(meshes)), *coded(line), *coded(test)))
    return found


def rows_of(test: str) -> list[Row]:
    """The rows that name a test, which is to run on nothing else."""
    found = [row for row in rows() if row.test == test]
    assert found, f"no row of docs/parallelism.md names {test}"
    return found


def each_row(function: Callable[..., None]) -> Any:
    """A test of every row that names it."""
    found = rows_of(function.__name__)
    return pytest.mark.parametrize("row", found, ids=[row.line for row in found])(function)


def coded(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)
