"""docs/maps.md says how large the shipped maps are and which releases they are held against; so it is."""

from __future__ import annotations

import re
from pathlib import Path

from mapdsl.resources import shipped_maps
from tests.test_deepseek_v4_released import LISTING as DEEPSEEK_V4
from tests.test_rules_released import RELEASES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/maps.md").read_text(encoding="utf-8")


def rows(heading: str) -> dict[str, list[str]]:
    """The first table below a heading: the other cells of each row, by the name in its first cell."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("| `")]
    return {first.strip(" `"): [cell.strip() for cell in rest] for first, *rest in cells}


def size(name: str) -> tuple[int, int]:
    """The lines of a map, and those that are neither blank nor a comment."""
    lines = (ROOT / f"rules/{name}.map").read_text(encoding="utf-8").splitlines()
    return len(lines), sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in lines)


def test_sizes_of_maps_are_those_of_the_files() -> None:
    shown = {name: tuple(map(int, re.findall(r"\d+", cell)[:2])) for name, (cell, _) in rows("Size").items()}
    assert shown == {name: size(name) for name in shown}


def test_every_map_of_a_model_is_in_the_table() -> None:
    assert set(rows("Size")) == {name for name in shipped_maps() if not name.startswith("megatron/")}


def test_releases_are_those_that_tests_hold_the_maps_against() -> None:
    shown = {name: re.findall(r"`(\w+)`", cell) for name, (cell,) in rows("Released checkpoints").items()}
    held: dict[str, list[str]] = {"deepseek_v4": [DEEPSEEK_V4.stem]}
    for release in RELEASES.values():
        held.setdefault(release.map, []).append(release.listing)
    assert shown == held


def test_the_size_of_deepseek_v4_is_the_same_on_the_page_of_comparisons() -> None:
    lines, code = size("deepseek_v4")
    assert f"`deepseek_v4.map`: {lines} lines, {code} of them code" in (ROOT / "docs/comparison.md").read_text()
