"""Shipped maps and NeMo Automodel's hand-written adapters: the same names, shapes, dtypes and bytes, both ways.

Families that go other ways in one of these have tests of their own, as have formats and deviations.
"""

from __future__ import annotations

import pytest

from tests.differential.automodel import Case
from tests.differential.automodel_glm import CASES as GLM
from tests.differential.automodel_qwen import CASES as QWEN
from tests.differential.test_automodel_deepseek_v3 import PLAIN as DEEPSEEK_V3
from tests.differential.test_automodel_hy_v3 import CASES as HY
from tests.differential.test_automodel_minimax_m2 import CASES as MINIMAX
from tests.differential.test_automodel_nemotron_v3 import CASES as NEMOTRON

pytestmark = pytest.mark.heavy

CASES = {**DEEPSEEK_V3, **GLM, **HY, **MINIMAX, **NEMOTRON, **QWEN}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@EVERY
def test_the_native_side_is_the_state_of_the_model(case: Case) -> None:
    assert case.model_differences() == []


@EVERY
def test_the_config_may_be_as_its_class_spells_it(case: Case) -> None:
    assert case.parsed_differences() == []


@EVERY
def test_writing_gives_the_same_bytes(case: Case) -> None:
    assert case.writing_differences() == []


@EVERY
def test_reading_gives_the_same_bytes(case: Case) -> None:
    assert case.reading_differences() == []


@EVERY
def test_one_tensor_at_a_time_gives_the_same(case: Case) -> None:
    assert case.single_differences() == []


@EVERY
def test_what_is_written_comes_back(case: Case) -> None:
    assert case.returning_differences() == []
