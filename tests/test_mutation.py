"""A wrong map is noticed: one planted fault of each kind. `make mutation` plants them all."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.mutation.judge import noticed
from tests.mutation.operators import Mutant, mutants
from tests.mutation.survivors import why_it_survives

TEXT = (Path(__file__).parents[1] / "rules" / "deepseek_v4.map").read_text(encoding="utf-8")


def sample() -> list[Mutant]:
    """One mutant of each operator, of those that nobody has explained."""
    by_operator: dict[str, list[Mutant]] = {}
    for mutant in mutants(TEXT):
        if why_it_survives(mutant) is None:
            by_operator.setdefault(mutant.operator, []).append(mutant)
    return [random.Random(7).choice(planted) for planted in by_operator.values()]


@pytest.mark.parametrize("mutant", sample(), ids=lambda mutant: mutant.operator)
def test_a_planted_fault_is_noticed(mutant: Mutant) -> None:
    assert noticed(mutant.text), mutant.name


def test_the_map_itself_is_not_taken_for_a_fault() -> None:
    assert noticed(TEXT) == ""


def test_mutants_are_many_and_none_is_the_map() -> None:
    planted = list(mutants(TEXT))
    assert len(planted) > 800
    assert len({mutant.text for mutant in planted} | {TEXT}) == len(planted) + 1
